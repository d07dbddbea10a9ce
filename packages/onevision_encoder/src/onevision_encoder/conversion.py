# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of every origin to one folder that `from_pretrained` loads: weights, config, processors, code.

Sources are files of PyTorch (`backbone.pt`, raw or nested) or safetensors, and folders of transformers. Nothing is
guessed quietly: a key that is missing, left over or of another shape ends the conversion.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file

from .configuration_onevision_encoder import OneVisionEncoderConfig
from .image_processing_onevision_encoder import OneVisionEncoderImageProcessor
from .modeling_onevision_encoder import OneVisionEncoderModel
from .video_processing_onevision_encoder import OneVisionEncoderVideoProcessor

StateDict = dict[str, torch.Tensor]

PRESETS = {
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "huge": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
}
PUBLISHED_HEAD_DIM = 64  # of every published size; a state dict does not show the number of heads
NESTING_KEYS = ("state_dict", "model", "backbone")
WRAPPER_NAMES = {"module", "_orig_mod"}  # left by DistributedDataParallel and torch.compile, at any depth
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "backbone.pt")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# names before the first release: pattern -> name today
PRE_RELEASE_NAMES = (
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^ln_pre\.", "layernorm_pre."),
    (r"^ln_post\.", "layernorm_post."),
    (r"^transformer\.layers\.(\d+)\.ln_1\.", r"encoder.layers.\1.layer_norm1."),
    (r"^transformer\.layers\.(\d+)\.ln_2\.", r"encoder.layers.\1.layer_norm2."),
    (r"^transformer\.layers\.(\d+)\.attn\.in_proj[._]", r"encoder.layers.\1.self_attn.in_proj."),
    (r"^transformer\.layers\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"^transformer\.layers\.(\d+)\.mlp\.0\.", r"encoder.layers.\1.mlp.fc1."),
    (r"^transformer\.layers\.(\d+)\.mlp\.2\.", r"encoder.layers.\1.mlp.fc2."),
)


class ConversionError(ValueError):
    """A checkpoint that cannot become a folder; the message lists everything that is wrong with it."""


def read_state_dict(source: Path) -> StateDict:
    """Read the weights of a file or folder, under the names they have there.

    Args:
        source: a `.safetensors` file, a file written by `torch.save`, or a folder with one of these.

    Raises:
        ConversionError: if there is nothing to read, or a file does not hold a state dict.
    """
    state: StateDict = {}
    for path in _weight_files(source):
        state.update(_load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path))
    return state


def _weight_files(source: Path) -> list[Path]:
    """Find the weight files of a source, all shards of a folder with an index."""
    if source.is_file():
        return [source]
    for name in INDEX_FILES:
        if (source / name).is_file():
            index = json.loads((source / name).read_text(encoding="utf-8"))
            return [source / shard for shard in sorted(set(index["weight_map"].values()))]
    for name in WEIGHT_FILES:
        if (source / name).is_file():
            return [source / name]
    raise ConversionError(f"{source}: expected a weight file, or a folder with one of {WEIGHT_FILES + INDEX_FILES}.")


def _load_safetensors(path: Path) -> StateDict:
    """Load one safetensors file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path}: not a readable safetensors file ({error}).") from error


def _load_pickle(path: Path) -> StateDict:
    """Load a file of `torch.save`, tensors only, and unwrap the dicts around the state dict."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ConversionError(
            f"{path}: damaged, or holds Python objects besides tensors, which are not loaded because they can run "
            "code. Save the bare state_dict instead."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ConversionError(f"{path}: not a readable PyTorch file ({error}).") from error
    while isinstance(content, dict) and not _is_state_dict(content):
        key = next((name for name in NESTING_KEYS if isinstance(content.get(name), dict)), None)
        if key is None:
            raise ConversionError(
                f"{path}: expected a state dict, or one under {NESTING_KEYS}, got keys {list(content)[:8]}."
            )
        content = content[key]
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: expected a state dict, got {type(content).__name__}.")
    return dict(content)


def _is_state_dict(content: dict) -> bool:
    """Say whether a dict maps names to tensors and nothing else."""
    return bool(content) and all(isinstance(value, torch.Tensor) for value in content.values())


def rename_keys(state: StateDict) -> StateDict:
    """Bring keys to the published names: wrappers dropped, pre-release names translated, fused projections split.

    Raises:
        ConversionError: if two keys become one.
    """
    renamed: StateDict = {}
    for key, tensor in state.items():
        for name, value in _renamed(key, tensor):
            if name in renamed:
                raise ConversionError(f"Two keys become {name!r}, one of them is {key!r}.")
            renamed[name] = value
    return renamed


def _renamed(key: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the published name and tensor of one key; of a fused query-key-value projection, three of each."""
    name = ".".join(part for part in key.split(".") if part not in WRAPPER_NAMES)
    name = re.sub(r"^(?:backbone|model)\.", "", name)
    for pattern, today in PRE_RELEASE_NAMES:
        name = re.sub(pattern, today, name)
    if ".self_attn.in_proj." not in name or tensor.shape[0] % 3:
        yield name, tensor
        return
    for letter, part in zip("qkv", tensor.chunk(3)):
        yield name.replace(".in_proj.", f".{letter}_proj."), part.clone()


def infer_config(state: StateDict) -> OneVisionEncoderConfig:
    """Read the sizes off a state dict under published names; heads are 64 channels wide, as in all published sizes.

    Raises:
        ConversionError: if the keys that carry the sizes are missing.
    """
    patch, first_mlp = state.get("embeddings.patch_embedding.weight"), state.get("encoder.layers.0.mlp.fc1.weight")
    if patch is None or patch.ndim != 4 or first_mlp is None:
        raise ConversionError(
            "No config is given and none can be inferred: embeddings.patch_embedding.weight and "
            f"encoder.layers.0.mlp.fc1.weight are needed, the checkpoint has {sorted(state)[:6]}."
        )
    layers = {int(match[1]) for match in (re.match(r"encoder\.layers\.(\d+)\.", key) for key in state) if match}
    hidden_size, channels, patch_size, _ = patch.shape
    if hidden_size % PUBLISHED_HEAD_DIM:
        raise ConversionError(
            f"hidden_size {hidden_size} is no multiple of {PUBLISHED_HEAD_DIM}, so the number of heads cannot be "
            "inferred. Pass a config."
        )
    return OneVisionEncoderConfig(
        hidden_size=hidden_size,
        intermediate_size=first_mlp.shape[0],
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=hidden_size // PUBLISHED_HEAD_DIM,
        num_channels=channels,
        patch_size=patch_size,
        layer_norm_type="layer_norm" if "layernorm_pre.bias" in state else "rms_norm",
        use_head=any(key.startswith("head.") for key in state),
    )


def choose_config(source: Path, state: StateDict, config: Path | None, preset: str | None) -> OneVisionEncoderConfig:
    """Take the config that is named, else the source folder's own, else the one the weights imply.

    Args:
        source: file or folder that is converted.
        state: its weights under published names.
        config: a `config.json`, or a folder with one.
        preset: a name in `PRESETS`; patch size, norm and head still come from the weights.

    Raises:
        ConversionError: if both are named, or the preset does not exist.
    """
    if config is not None and preset is not None:
        raise ConversionError("Pass either a config or a preset, not both.")
    if preset is not None:
        if preset not in PRESETS:
            raise ConversionError(f"Unknown preset {preset!r}, expected one of {sorted(PRESETS)}.")
        inferred = infer_config(state)
        seen = {name: getattr(inferred, name) for name in ("patch_size", "layer_norm_type", "use_head")}
        return OneVisionEncoderConfig(**PRESETS[preset], **seen)
    if config is None and (source / "config.json").is_file():
        config = source
    if config is None:
        return infer_config(state)
    try:
        return OneVisionEncoderConfig.from_pretrained(config)
    except (OSError, StrictDataclassError) as error:
        raise ConversionError(f"{config}: no usable config.json ({error}).") from error


def check_state_dict(state: StateDict, expected: StateDict) -> None:
    """Compare weights with what the model expects.

    Raises:
        ConversionError: listing every missing key, unexpected key and shape that differs.
    """
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    problems = [
        f"{len(found)} {what}: {', '.join(found)}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise ConversionError("The checkpoint does not fit the config. " + "; ".join(problems) + ".")


def convert(
    source: str | Path,
    target: str | Path,
    config: str | Path | None = None,
    preset: str | None = None,
    dtype: str | None = None,
) -> OneVisionEncoderModel:
    """Convert a checkpoint into a folder with model, image processor, video processor and their code.

    Args:
        source: a weight file or a folder, see `read_state_dict`.
        target: folder to write; files of the same names are replaced.
        config: a `config.json` or a folder with one; default: the source folder's, else inferred from the weights.
        preset: `"base"`, `"large"` or `"huge"` in place of a config.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; default: as in the source.

    Returns:
        The model that was written.

    Raises:
        ConversionError: if source, config and weights do not fit each other; nothing is written then.
    """
    source, target = Path(source), Path(target)
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"Unknown dtype {dtype!r}, expected one of {sorted(DTYPES)}.")
    state = rename_keys(read_state_dict(source))
    model_config = choose_config(source, state, None if config is None else Path(config), preset)
    with torch.device("meta"):
        model = OneVisionEncoderModel(model_config)
    check_state_dict(state, model.state_dict())
    model.load_state_dict(state, assign=True)
    model.to(DTYPES[dtype] if dtype is not None else state["embeddings.patch_embedding.weight"].dtype)
    model.save_pretrained(target)
    _image_processor(source, model_config).save_pretrained(target)
    OneVisionEncoderVideoProcessor(patch_size=model_config.patch_size).save_pretrained(target)
    return model


def _image_processor(source: Path, config: OneVisionEncoderConfig) -> OneVisionEncoderImageProcessor:
    """Take the source folder's preprocessing if it has one, else the published one at the config's image size."""
    if (source / "preprocessor_config.json").is_file():
        return OneVisionEncoderImageProcessor.from_pretrained(source, patch_size=config.patch_size)
    side = config.image_size
    return OneVisionEncoderImageProcessor(
        patch_size=config.patch_size, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


__all__ = ["ConversionError", "convert"]
