# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of every origin to one folder that `from_pretrained` loads: weights, config, processors, code.

Sources are files of PyTorch (`backbone.pt`, raw or nested) or safetensors, and folders of transformers. Nothing is
guessed quietly: a key that is missing, left over or of another shape ends the conversion.
"""

import json
import os
import re
import struct
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
# 64 channels each in every published size; weights do not show heads, so other widths are not guessed
PUBLISHED_HEADS = {sizes["hidden_size"]: sizes["num_attention_heads"] for sizes in PRESETS.values()}
NOT_IN_WEIGHTS = ("layer_norm_eps", "rope_theta", "rope_temporal_size", "hidden_act", "image_size")
NESTING_KEYS = ("state_dict", "model", "backbone")
WRAPPER_NAMES = {"module", "_orig_mod"}  # left by DistributedDataParallel and torch.compile, at any depth
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "backbone.pt")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
NUM_NAMED_KEYS = 8  # of a longer list, the others are counted
TORCH_FILE_STARTS = (b"PK\x03\x04", b"\x80")  # zip archive, pickle of PyTorch before 1.6
# what the restricted unpickler of `torch.load` lets through for files that are damaged or something else
TORCH_LOAD_ERRORS = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    UnpicklingError,
    struct.error,
)
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
            return _shards(source / name)
    for name in WEIGHT_FILES:
        if (source / name).is_file():
            return [source / name]
    raise ConversionError(f"{source}: expected a weight file, or a folder with one of {WEIGHT_FILES + INDEX_FILES}.")


def _shards(index: Path) -> list[Path]:
    """List the shards that an index file names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index}: not an index with a weight_map ({type(error).__name__}: {error}).") from error
    return [index.parent / name for name in sorted(names)]


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
    except TORCH_LOAD_ERRORS as error:
        raise ConversionError(f"{path}: {_why_unreadable(path, error)}") from error
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


def _why_unreadable(path: Path, error: Exception) -> str:
    """Say why `torch.load` refused a file: its own messages speak of pickle internals."""
    if isinstance(error, OSError):
        return f"not readable ({error.strerror or error})."
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "the file is empty."
    if not start.startswith(TORCH_FILE_STARTS):
        return "not a PyTorch file: it was not written by torch.save."
    if isinstance(error, UnpicklingError):
        return (
            "damaged, or holds Python objects besides tensors, which are not loaded because they can run code. Save "
            "the bare state_dict instead."
        )
    return f"damaged PyTorch file ({type(error).__name__}: {str(error).partition(chr(10))[0]})."


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


def read_sizes(state: StateDict) -> dict[str, int | str | bool]:
    """Read the config fields that a state dict under published names shows; the number of heads is not among them.

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
    return {
        "hidden_size": hidden_size,
        "intermediate_size": first_mlp.shape[0],
        "num_hidden_layers": max(layers) + 1,
        "num_channels": channels,
        "patch_size": patch_size,
        "layer_norm_type": "layer_norm" if "layernorm_pre.bias" in state else "rms_norm",
        "use_head": any(key.startswith("head.") for key in state),
    }


def infer_config(state: StateDict, num_attention_heads: int | None = None) -> OneVisionEncoderConfig:
    """Build the config that the weights imply; `NOT_IN_WEIGHTS` take the published defaults.

    Args:
        state: weights under published names.
        num_attention_heads: heads of the model; default: the published number, for a published width only.

    Raises:
        ConversionError: if the sizes or the number of heads cannot be known, or do not fit together.
    """
    sizes = read_sizes(state)
    heads = PUBLISHED_HEADS.get(sizes["hidden_size"]) if num_attention_heads is None else num_attention_heads
    if heads is None:
        raise ConversionError(
            f"hidden_size {sizes['hidden_size']} is no published size {sorted(PUBLISHED_HEADS)}, and the head count "
            "cannot be read off the weights: pass --config FILE or --num-attention-heads N."
        )
    try:
        return OneVisionEncoderConfig(**sizes, num_attention_heads=heads)
    except StrictDataclassError as error:
        raise ConversionError(str(error.__cause__ or error)) from error


def find_config(source: Path, config: Path | None = None) -> Path | None:
    """Find the config file of a conversion: the one named, else the one in the source's folder, else None.

    Raises:
        ConversionError: if a config is named and does not exist.
    """
    folder = _folder_of(source) if config is None else config
    path = folder / "config.json" if folder.is_dir() else folder
    if path.is_file():
        return path
    if config is not None:
        raise ConversionError(f"{path}: no such file; --config takes a config.json or a folder with one.")
    return None


def _folder_of(source: Path) -> Path:
    """Name the folder where the config and the preprocessing of a weight file or folder lie."""
    return source if source.is_dir() else source.parent


def choose_config(
    source: Path,
    state: StateDict,
    config: Path | None = None,
    preset: str | None = None,
    num_attention_heads: int | None = None,
) -> OneVisionEncoderConfig:
    """Take the config that is named, else the one beside the weights, else the one the weights imply.

    Args:
        source: file or folder that is converted.
        state: its weights under published names.
        config: a `config.json`, or a folder with one.
        preset: a name in `PRESETS`; patch size, norm and head still come from the weights.
        num_attention_heads: see `infer_config`; only where neither config nor preset says it.

    Raises:
        ConversionError: if they exclude each other, do not exist or do not fit together.
    """
    if config is not None and preset is not None:
        raise ConversionError("Pass either a config or a preset, not both.")
    path = find_config(source, config) if preset is None else None
    if num_attention_heads is not None and (path or preset) is not None:
        raise ConversionError(f"--num-attention-heads does not apply: {path or preset} says how many heads there are.")
    if preset is not None:
        if preset not in PRESETS:
            raise ConversionError(f"Unknown preset {preset!r}, expected one of {sorted(PRESETS)}.")
        sizes = read_sizes(state)
        seen = {name: sizes[name] for name in ("patch_size", "layer_norm_type", "use_head")}
        return OneVisionEncoderConfig(**PRESETS[preset], **seen)
    if path is None:
        return infer_config(state, num_attention_heads)
    try:
        return OneVisionEncoderConfig.from_pretrained(path)
    except (OSError, StrictDataclassError) as error:
        raise ConversionError(f"{path}: no usable config.json ({error}).") from error


def check_state_dict(state: StateDict, expected: StateDict) -> None:
    """Compare weights with what the model expects.

    Raises:
        ConversionError: counting missing keys, unexpected keys and shapes that differ, the first 8 of each by name.
    """
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    problems = [
        f"{len(found)} {what}: {_first_names(found)}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise ConversionError("The checkpoint does not fit the config. " + "; ".join(problems) + ".")


def _first_names(names: list[str]) -> str:
    """Name the first few and count the rest."""
    rest = len(names) - NUM_NAMED_KEYS
    return ", ".join(names[:NUM_NAMED_KEYS]) + (f" and {rest} more" if rest > 0 else "")


def convert(
    source: str | Path,
    target: str | Path,
    config: str | Path | None = None,
    preset: str | None = None,
    dtype: str | None = None,
    num_attention_heads: int | None = None,
) -> OneVisionEncoderModel:
    """Convert a checkpoint into a folder with model, image processor, video processor and their code.

    Args:
        source: a weight file or a folder, see `read_state_dict`.
        target: folder to write; files of the same names are replaced.
        config: a `config.json` or a folder with one; default: the one beside the weights, else inferred from them.
        preset: `"base"`, `"large"` or `"huge"` in place of a config.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; default: as in the source.
        num_attention_heads: heads of the model where the config is inferred, needed for widths that are not published.

    Returns:
        The model that was written.

    Raises:
        ConversionError: if source, config and weights do not fit each other, and nothing is written then; or if the
            target cannot be written.
    """
    source, target = Path(source), Path(target)
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"Unknown dtype {dtype!r}, expected one of {sorted(DTYPES)}.")
    _require_folder(target)
    state = rename_keys(read_state_dict(source))
    config = None if config is None else Path(config)
    model_config = choose_config(source, state, config, preset, num_attention_heads)
    with torch.device("meta"):
        model = OneVisionEncoderModel(model_config)
    check_state_dict(state, model.state_dict())
    model.load_state_dict(state, assign=True)
    model.to(DTYPES[dtype] if dtype is not None else state["embeddings.patch_embedding.weight"].dtype)
    video_processor = OneVisionEncoderVideoProcessor(patch_size=model_config.patch_size)
    parts = (model, _image_processor(_folder_of(source), model_config), video_processor)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for part in parts:
            part.save_pretrained(target)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{target}: cannot be written ({getattr(error, 'strerror', None) or error}).") from error
    return model


def _require_folder(target: Path) -> None:
    """Refuse a target that cannot become a folder before a large checkpoint is read."""
    place = target.absolute()
    existing = next(path for path in (place, *place.parents) if os.path.exists(path))
    if not existing.is_dir():
        raise ConversionError(f"{target}: cannot be a folder, because {existing} is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConversionError(f"{target}: cannot be written, no permission in {existing}.")


def _image_processor(folder: Path, config: OneVisionEncoderConfig) -> OneVisionEncoderImageProcessor:
    """Take the preprocessing beside the weights if there is one, else the published one at the config's image size."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        try:
            return OneVisionEncoderImageProcessor.from_pretrained(folder, patch_size=config.patch_size)
        except OSError as error:
            raise ConversionError(f"{path}: not readable ({error}).") from error
    side = config.image_size
    return OneVisionEncoderImageProcessor(
        patch_size=config.patch_size, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


__all__ = ["ConversionError", "convert", "find_config"]
