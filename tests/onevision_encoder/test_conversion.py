# SPDX-License-Identifier: Apache-2.0
import contextlib
import os
import warnings
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from typer.testing import CliRunner

from onevision_encoder.cli import app
from onevision_encoder.conversion import ConversionError, convert, infer_config, read_state_dict

SIZES = {"hidden_size": 128, "num_attention_heads": 2, "image_size": 448}  # 64 channels a head, as published
HEADS = ["--num-attention-heads", "2"]


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
    converted = convert(tmp_path / "backbone.pt", tmp_path / "out", num_attention_heads=2)
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
    convert(tmp_path / "weights.safetensors", tmp_path / "one", dtype="bfloat16", num_attention_heads=2)
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
    config = convert(tmp_path, tmp_path / "out", num_attention_heads=2).config
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
        convert(tmp_path / "backbone.pt", tmp_path / "out", num_attention_heads=2)
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
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(ConversionError, match=r"broken\.safetensors: not a readable safetensors"):
        convert(tmp_path / "broken.safetensors", tmp_path / "out")
    with pytest.raises(ConversionError, match="expected a weight file, or a folder"):
        convert(tmp_path / "absent", tmp_path / "out")


@pytest.mark.parametrize("content", [b"no zip", b"hello world\n", b"a\n", b'{"a": 1}', b"(((", b"I1.5\n."])
def test_text_is_no_checkpoint(tmp_path, content):
    (tmp_path / "notes.pt").write_bytes(content)
    with pytest.raises(ConversionError, match=r"notes\.pt: not a PyTorch file"):
        convert(tmp_path / "notes.pt", tmp_path / "out")


def test_empty_file_is_named_empty(tmp_path):
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ConversionError, match=r"empty\.pt: the file is empty\."):
        convert(tmp_path / "empty.pt", tmp_path / "out")


@pytest.mark.parametrize("is_zip", [True, False])
def test_every_damaged_byte_is_translated(tmp_path, is_zip):
    torch.save({"a": torch.zeros(1)}, tmp_path / "whole.pt", _use_new_zipfile_serialization=is_zip)
    whole = (tmp_path / "whole.pt").read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        damaged = whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
        for content in (damaged, whole[:place]):
            (tmp_path / "damaged.pt").write_bytes(content)
            with warnings.catch_warnings(action="ignore"), contextlib.suppress(ConversionError):
                read_state_dict(tmp_path / "damaged.pt")


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": [1]}'])
def test_unusable_index_is_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConversionError, match=r"index\.json: not an index with a weight_map"):
        convert(tmp_path, tmp_path / "out")


def test_long_lists_are_counted(tmp_path, source_model):
    state = source_model.state_dict()
    torch.save({key: value for key, value in state.items() if "layers.1." not in key}, tmp_path / "backbone.pt")
    source_model.config.save_pretrained(tmp_path)
    missing = [key for key in sorted(state) if "layers.1." in key]
    with pytest.raises(ConversionError) as raised:
        convert(tmp_path / "backbone.pt", tmp_path / "out")
    assert f"16 missing: {', '.join(missing[:8])} and 8 more." in str(raised.value)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_are_not_guessed(tmp_path, build_model, ragged, heads):
    model = build_model(**{**SIZES, "num_attention_heads": heads})
    torch.save(model.state_dict(), tmp_path / "backbone.pt")
    with pytest.raises(ConversionError, match=r"hidden_size 128 .*--config FILE or --num-attention-heads N\."):
        convert(tmp_path / "backbone.pt", tmp_path / "out")
    converted = convert(tmp_path / "backbone.pt", tmp_path / "out", num_attention_heads=heads).eval()
    with torch.no_grad():
        found, expected = converted(**ragged).pooler_output, model(**ragged).pooler_output
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    with pytest.raises(ConversionError, match="must be divisible by num_attention_heads"):
        convert(tmp_path / "backbone.pt", tmp_path / "out", num_attention_heads=3)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 20)])
def test_published_widths_have_the_published_heads(build_model, width, heads):
    state = build_model(hidden_size=width, num_attention_heads=heads, num_hidden_layers=1).state_dict()
    assert infer_config(state).num_attention_heads == heads


def test_config_beside_the_weights_is_used(tmp_path, build_model):
    build_model(rope_theta=500.0).save_pretrained(tmp_path / "in")
    config = convert(tmp_path / "in" / "model.safetensors", tmp_path / "out").config
    assert (config.rope_theta, config.num_attention_heads) == (500.0, 2)


def test_unusable_arguments_raise(tmp_path, build_model):
    torch.save(build_model().state_dict(), tmp_path / "backbone.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "config.json").write_text('{"hidden_size": 100, "num_attention_heads": 3}')
    for arguments, message in (
        ({"dtype": "int8"}, "Unknown dtype 'int8'"),
        ({"preset": "giant"}, "Unknown preset 'giant'.*base.*huge.*large"),
        ({"preset": "base", "config": tmp_path}, "either a config or a preset"),
        ({"config": tmp_path / "config.json"}, "divisible by num_attention_heads"),
        ({"config": tmp_path / "nope.json"}, r"nope\.json: no such file"),
        ({"config": tmp_path / "folder"}, r"folder.config\.json: no such file"),
        ({"preset": "base", "num_attention_heads": 2}, "does not apply: base says how many"),
        ({"num_attention_heads": 2}, r"does not apply: .*config\.json says how many"),
        ({"preset": "base"}, "of another shape"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(tmp_path / "backbone.pt", tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()


def run(*command):
    return CliRunner().invoke(app, [str(part) for part in command])


def test_command_line_names_what_it_assumed(tmp_path, build_model, source_model):
    torch.save(source_model.state_dict(), tmp_path / "backbone.pt")
    done = run("convert", tmp_path / "backbone.pt", tmp_path / "out", "--num-attention-heads", 2, "--dtype", "float16")
    assert done.exit_code == 0
    assert "parameters, torch.float16, 2 heads of 64 channels" in done.output
    assumed = "layer_norm_eps=1e-06, rope_theta=10000.0, rope_temporal_size=64, hidden_act=gelu, image_size=448"
    assert done.stdout.splitlines()[1] == f"assumed, because weights do not show it: {assumed}"
    torch.save(build_model(hidden_size=768, num_attention_heads=12).state_dict(), tmp_path / "base.pt")
    assert "12 heads of 64 channels" in run("convert", tmp_path / "base.pt", tmp_path / "base").output
    done = run("convert", tmp_path / "out", tmp_path / "again")  # with a config
    assert (done.exit_code, len(done.stdout.splitlines())) == (0, 1)


@pytest.mark.parametrize(
    ("source", "target", "arguments", "message"),
    [
        ("backbone.pt", "out", ["--preset", "large"], "error: backbone.pt: The checkpoint does not fit the config."),
        ("backbone.pt", "out", [], "error: backbone.pt: hidden_size 128 is no published size"),
        ("backbone.pt", "out", ["--config", "nope.json"], "error: nope.json: no such file"),
        ("backbone.pt", "backbone.pt", HEADS, "error: backbone.pt: cannot be a folder, because "),
        ("backbone.pt", "backbone.pt/out", HEADS, "error: backbone.pt/out: cannot be a folder, because "),
        ("backbone.pt", "/proc/out", HEADS, "error: /proc/out: cannot be written"),
        ("empty.pt", "out", [], "error: empty.pt: the file is empty."),
        ("notes.pt", "out", [], "error: notes.pt: not a PyTorch file"),
        ("absent.pt", "out", [], "error: absent.pt: expected a weight file"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, monkeypatch, source_model, source, target, arguments, message):
    monkeypatch.chdir(tmp_path)
    torch.save(source_model.state_dict(), "backbone.pt")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "notes.pt").write_text("hello world\n")
    done = run("convert", source, target, *arguments)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert done.output.startswith(message)
    assert len(done.output.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_raises(tmp_path, source_model):
    torch.save(source_model.state_dict(), tmp_path / "backbone.pt")
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ConversionError, match="no permission in"):
        convert(tmp_path / "backbone.pt", tmp_path / "closed" / "out", num_attention_heads=2)


def test_help_and_version_are_plain():
    assert run("--version").output == f"onevision-encoder {version('onevision-encoder')}\n"
    for command in ([], ["--help"], ["convert", "--help"]):
        done = run(*command)
        assert "Usage: " in done.output
        assert "╭" not in done.output
