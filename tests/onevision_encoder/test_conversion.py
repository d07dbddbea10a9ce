# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from typer.testing import CliRunner

from onevision_encoder.cli import app
from onevision_encoder.conversion import ConversionError, convert

SIZES = {"hidden_size": 128, "num_attention_heads": 2, "image_size": 448}  # 64 channels a head, as published


@pytest.fixture
def source_model(build_model):
    return build_model(**SIZES)


def wrapped(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def pre_release(state):
    """The names before the first release, queries, keys and values in one projection."""
    names = {
        "embeddings.patch_embedding.": "conv1.",
        "layernorm_pre.": "ln_pre.",
        "layernorm_post.": "ln_post.",
        "encoder.layers.": "transformer.layers.",
        "layer_norm1.": "ln_1.",
        "layer_norm2.": "ln_2.",
        "self_attn.": "attn.",
        "head.attn.": "head.attention.",
    }
    renamed = {}
    for key, value in state.items():
        if not key.startswith("head."):
            key = key.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")
        for today, before in names.items():
            key = key.replace(today, before)
        renamed[key] = value
    for layer in range(2):
        for kind in ("weight", "bias"):
            parts = [renamed.pop(f"transformer.layers.{layer}.attn.{x}_proj.{kind}") for x in "qkv"]
            renamed[f"transformer.layers.{layer}.attn.in_proj.{kind}"] = torch.cat(parts)
    return renamed


FORMS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": wrapped(state, "module."), "step": 7},
    "model": lambda state: {"model": wrapped(state, "_orig_mod.module."), "epoch": 1.5},
    "backbone": lambda state: {"backbone": wrapped(state, "module._orig_mod."), "head": {}},
    "twice": lambda state: {"model": {"state_dict": wrapped(state, "backbone."), "lr": 0.1}},
    "inner": lambda state: {k.replace("layers.0.", "layers.0._orig_mod."): v for k, v in state.items()},
    "pre_release": pre_release,
}


@pytest.mark.parametrize("form", FORMS)
def test_training_checkpoints(tmp_path, source_model, ragged, form):
    torch.save(FORMS[form](source_model.state_dict()), tmp_path / "backbone.pt")
    converted = convert(tmp_path / "backbone.pt", tmp_path / "out")
    assert converted.config.num_attention_heads == 2
    loaded, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    for name, value in source_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with torch.no_grad():
        found, expected = loaded(**ragged).pooler_output, source_model(**ragged).pooler_output
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_safetensors_file_and_folder(tmp_path, source_model):
    save_file(source_model.state_dict(), tmp_path / "weights.safetensors")
    convert(tmp_path / "weights.safetensors", tmp_path / "one", dtype="bfloat16")
    convert(tmp_path / "one", tmp_path / "two")
    loaded = AutoModel.from_pretrained(tmp_path / "two")
    assert loaded.dtype == torch.bfloat16
    for name, value in source_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16())


def test_sharded_folder(tmp_path, source_model):
    source_model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    convert(tmp_path / "shards", tmp_path / "out")
    for name, value in AutoModel.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(value, source_model.state_dict()[name])


def test_published_folder(tmp_path, case_folder):
    converted = convert(case_folder, tmp_path)
    original = AutoModel.from_pretrained(case_folder)
    assert converted.config.to_diff_dict().items() >= {"rope_theta": converted.config.rope_theta}.items()
    for name, value in AutoModel.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, original.state_dict()[name])


@pytest.mark.parametrize("fields", [{"use_head": False}, {"layer_norm_type": "rms_norm"}])
def test_switches_are_inferred(tmp_path, build_model, fields):
    torch.save(build_model(**SIZES, **fields).state_dict(), tmp_path / "backbone.pt")
    config = convert(tmp_path, tmp_path / "out").config
    assert {name: getattr(config, name) for name in fields} == fields
    assert (config.patch_size, config.intermediate_size, config.num_hidden_layers) == (4, 96, 2)


def test_processors_come_with_the_model(tmp_path, build_model):
    build_model(image_size=32).save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    image_processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (image_processor.patch_size, dict(image_processor.crop_size)) == (4, {"height": 32, "width": 32})
    assert AutoVideoProcessor.from_pretrained(tmp_path / "out").patch_size == 4


def test_everything_wrong_is_listed(tmp_path, source_model):
    state = source_model.state_dict()
    state["rope.inv_freq"] = torch.zeros(3)
    del state["head.probe"], state["layernorm_pre.weight"]
    state["head.norm.weight"] = torch.zeros(5)
    torch.save(state, tmp_path / "backbone.pt")
    with pytest.raises(ConversionError) as raised:
        convert(tmp_path / "backbone.pt", tmp_path / "out")
    message = str(raised.value)
    assert "2 missing: head.probe, layernorm_pre.weight" in message
    assert "1 unexpected: rope.inv_freq" in message
    assert "1 of another shape: head.norm.weight (5,), expected (128,)" in message
    assert not (tmp_path / "out").exists()


class Payload:
    """Something a pickle could run code with."""


def test_unusable_sources_raise(tmp_path, source_model):
    weights = source_model.state_dict()
    cases = {
        "objects.pt": ({"model": weights, "args": Payload()}, "Python objects besides tensors"),
        "list.pt": ([1, 2], "expected a state dict, got list"),
        "other.pt": ({"weights": weights}, r"or one under .*got keys \['weights'\]"),
        "twice.pt": ({**weights, **wrapped(weights, "module.")}, "Two keys become"),
        "little.pt": ({"a": torch.zeros(1)}, "none can be inferred"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ConversionError, match=message):
            convert(tmp_path / name, tmp_path / "out")
    (tmp_path / "broken.pt").write_bytes(b"no zip")
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(ConversionError, match=r"broken\.pt: "):
        convert(tmp_path / "broken.pt", tmp_path / "out")
    with pytest.raises(ConversionError, match=r"broken\.safetensors: not a readable safetensors"):
        convert(tmp_path / "broken.safetensors", tmp_path / "out")
    with pytest.raises(ConversionError, match="expected a weight file, or a folder"):
        convert(tmp_path / "absent", tmp_path / "out")


def test_unusable_arguments_raise(tmp_path, build_model):
    torch.save(build_model().state_dict(), tmp_path / "backbone.pt")
    (tmp_path / "config.json").write_text('{"hidden_size": 100, "num_attention_heads": 3}')
    for arguments, message in (
        ({"dtype": "int8"}, "Unknown dtype 'int8'"),
        ({"preset": "giant"}, "Unknown preset 'giant'.*base.*huge.*large"),
        ({"preset": "base", "config": tmp_path}, "either a config or a preset"),
        ({"config": tmp_path / "config.json"}, "divisible by num_attention_heads"),
        ({"preset": "base"}, "of another shape"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(tmp_path / "backbone.pt", tmp_path / "out", **arguments)
    odd = build_model(hidden_size=96, num_attention_heads=3).state_dict()
    torch.save(odd, tmp_path / "odd.pt")
    with pytest.raises(ConversionError, match="number of heads cannot be inferred"):
        convert(tmp_path / "odd.pt", tmp_path / "out")


def test_command_line(tmp_path, source_model):
    torch.save(source_model.state_dict(), tmp_path / "backbone.pt")
    command = ["convert", str(tmp_path / "backbone.pt"), str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--dtype", "float16"])
    assert done.exit_code == 0
    assert "parameters, torch.float16" in done.output
    done = CliRunner().invoke(app, [*command, "--preset", "large"])
    assert done.exit_code == 1
    assert "backbone.pt: The checkpoint does not fit the config." in done.output
    assert "Traceback" not in done.output
