# SPDX-License-Identifier: Apache-2.0
"""Outputs of the original implementation, on its weights and inputs."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from onevision_encoder.inputs_onevision_encoder import tokens_from_frames

ATOL = 2e-4  # the original's own float32 noise is up to 1.7e-5; the smallest injected error moves outputs by 1.1e-3
BF16_ATOL = 1e-1  # the original in bfloat16 is up to 0.095 away from itself in float32
ARGUMENTS = {"pixel_values", "patch_positions", "visible_indices"}


def load_case(folder, attn_implementation, **kwargs):
    model, info = AutoModel.from_pretrained(
        folder, attn_implementation=attn_implementation, output_loading_info=True, **kwargs
    )
    assert not any(info.values()), info
    inputs = {k: v for k, v in load_file(folder / "inputs.safetensors").items() if not k.startswith("aux.")}
    assert inputs.keys() <= ARGUMENTS, "a new kind of input needs a new test"
    return model.eval(), inputs, load_file(folder / "outputs.safetensors")


def as_sequence(inputs, patch_size):
    """The same call in the patch-sequence layout."""
    frames = inputs["pixel_values"] if inputs["pixel_values"].ndim == 5 else inputs["pixel_values"].unsqueeze(2)
    patches, positions = tokens_from_frames(
        frames, inputs.get("visible_indices"), inputs.get("patch_positions"), patch_size
    )
    return {"pixel_values": patches, "image_position_ids": positions.expand(patches.shape[0], -1, -1)}


def make_ragged(sequence):
    """Put two padding rows in front of each item and three behind it, and add a short item; undo by `[:-1, 2:-3]`."""
    items, size, dim = sequence["pixel_values"].shape
    pixel_values = torch.full((items + 1, size + 5, dim), float("nan"))
    position_ids = torch.full((items + 1, size + 5, 3), -1)
    pixel_values[:-1, 2:-3], position_ids[:-1, 2:-3] = sequence["pixel_values"], sequence["image_position_ids"]
    pixel_values[-1, :7], position_ids[-1, :7] = sequence["pixel_values"][0, :7], sequence["image_position_ids"][0, :7]
    return {"pixel_values": pixel_values, "image_position_ids": position_ids}


def outputs_by_name(outputs):
    named = {f"hidden_states.{i}": state for i, state in enumerate(outputs.hidden_states)}
    named["last_hidden_state"] = outputs.last_hidden_state
    if outputs.pooler_output is not None:
        named["pooler_output"] = outputs.pooler_output
    if outputs.attentions:
        named["attentions.0.head0_first8x8"] = outputs.attentions[0][:, :1, :8, :8]
    return named


@pytest.mark.parametrize("layout", ["published", "sequence", "ragged"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "torch_varlen"])
def test_outputs(case_folder, attn_implementation, layout):
    model, inputs, expected = load_case(case_folder, attn_implementation)
    expected = {name: value for name, value in expected.items() if not name.startswith("bf16_")}
    if layout != "published":
        inputs = as_sequence(inputs, model.config.patch_size)
    if layout == "ragged":
        inputs = make_ragged(inputs)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=attn_implementation == "eager")
    if layout == "ragged":
        outputs.attentions = outputs.attentions and tuple(x[:-1, :, 2:-3, 2:-3] for x in outputs.attentions)
        outputs.last_hidden_state = outputs.last_hidden_state[:-1, 2:-3]
        outputs.hidden_states = tuple(x[:-1, 2:-3] for x in outputs.hidden_states)
        outputs.pooler_output = None if outputs.pooler_output is None else outputs.pooler_output[:-1]
    found = outputs_by_name(outputs)
    if attn_implementation != "eager":
        expected.pop("attentions.0.head0_first8x8")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=ATOL, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_bfloat16_load(case_folder):
    model, inputs, expected = load_case(case_folder, "eager", dtype=torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        outputs = outputs_by_name(model(**inputs, output_hidden_states=True))
    for name, value in expected.items():
        if name.startswith("bf16_load."):
            torch.testing.assert_close(outputs[name.removeprefix("bf16_load.")].float(), value, atol=BF16_ATOL, rtol=0)


def test_state_dict_names_are_the_published_ones(case_folder):
    model, _, _ = load_case(case_folder, "sdpa")
    published = load_file(case_folder / "model.safetensors")
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in published.items()}
    assert json.loads((case_folder / "config.json").read_text())["use_head"] == (model.head is not None)
