# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.integrations import flex_attention as flex_integration

from onevision_encoder.attention_onevision_encoder import Segments, TokenLayout, attend, segment_block_mask

ATOL = 2e-6  # float32 rounding of sums in another order
CPU = torch.device("cpu")


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """flex_attention without its compilation, which needs a C++ compiler and most of a minute on a CPU."""
    monkeypatch.setattr(flex_integration, "WrappedFlexAttention", lambda training: lambda: flex_attention)


@pytest.mark.parametrize("lengths", [[7, 20], [130, 300, 1, 5, 128, 256], [128, 128], [600], [1] * 9])
def test_segment_block_mask_is_the_block_diagonal(lengths):
    total = sum(lengths)
    item = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = create_block_mask(lambda b, h, q, k: item[q] == item[k], None, None, total, total, device="cpu")
    found = segment_block_mask(lengths, CPU)
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert torch.equal(found.full_kv_num_blocks, expected.full_kv_num_blocks)
    assert found.seq_lengths == (total, total)


def test_segments():
    segments = Segments.from_lengths([3, 1, 4], CPU, "sdpa")
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.max_length == 4
    assert segments.block_mask is None


def test_layout_packs_valid_tokens_and_puts_them_back(ragged):
    layout = TokenLayout.read(ragged["pixel_values"], ragged["image_position_ids"], "sdpa")
    packed = layout.enter(ragged["pixel_values"])
    assert layout.segments.lengths == (20, 5, 20, 1)
    assert packed.shape == (1, 46, 48)  # nothing is computed on the 34 padding rows
    assert packed.isfinite().all()
    assert torch.equal(layout.leave(packed), ragged["pixel_values"].nan_to_num(0))


def test_full_items_stay_a_batch(ragged):
    layout = TokenLayout.read(ragged["pixel_values"][::2], ragged["image_position_ids"][::2], "sdpa")
    assert layout == TokenLayout((2, 20))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "torch_varlen", "flex_attention"])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_implementations_agree(build_model, ragged, uncompiled_flex, attn_implementation, is_ragged):
    inputs = ragged if is_ragged else {"pixel_values": torch.randn(2, 3, 3, 8, 12)}
    with torch.no_grad():
        expected = build_model("eager")(**inputs, output_hidden_states=True)
        found = build_model(attn_implementation)(**inputs, output_hidden_states=True)
    for a, b in zip(expected.to_tuple(), found.to_tuple()):
        torch.testing.assert_close(a, b, atol=ATOL, rtol=0)


def test_flex_attention_over_several_blocks(build_model, uncompiled_flex):
    pixel_values, position_ids = torch.randn(3, 300, 48), torch.randint(0, 64, (3, 300, 3))
    position_ids[1, 100:] = -1
    position_ids[2, 131:] = -1
    with torch.no_grad():
        expected = build_model("eager")(pixel_values=pixel_values, image_position_ids=position_ids)
        found = build_model("flex_attention")(pixel_values=pixel_values, image_position_ids=position_ids)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=ATOL, rtol=0)


@pytest.mark.parametrize("attn_implementation", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_gets_the_boundaries(attn_implementation):
    calls = []

    def flash_attention(module, query, key, value, attention_mask, **kwargs):
        calls.append((attention_mask, kwargs))
        return query, None

    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attn_implementation))
    row = torch.zeros(1, 2, 8, 32)
    attend(flash_attention, module, row, row, row, segments=Segments.from_lengths([3, 1, 4], CPU, attn_implementation))
    attention_mask, kwargs = calls[0]
    assert attention_mask is None
    assert kwargs["cu_seq_lens_q"].tolist() == kwargs["cu_seq_lens_k"].tolist() == [0, 3, 4, 8]
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == 4


def test_implementation_can_be_switched(build_model, ragged):
    model = build_model("eager")
    with torch.no_grad():
        expected = model(**ragged).pooler_output
        model.set_attn_implementation("torch_varlen")
        assert model.encoder.layers[0].self_attn.config._attn_implementation == "torch_varlen"
        torch.testing.assert_close(model(**ragged).pooler_output, expected, atol=ATOL, rtol=0)


def test_eager_and_sdpa_call_equal_lengths_together(build_model, ragged, monkeypatch):
    batches = []
    original = torch.nn.functional.scaled_dot_product_attention

    def record(query, *args, **kwargs):
        batches.append(tuple(query.shape))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    with torch.no_grad():
        build_model("sdpa", num_hidden_layers=1)(**ragged)
    assert batches == [(2, 2, 20, 32), (1, 2, 5, 32), (1, 2, 1, 32), (4, 2, 1, 32)]  # the last one is the head


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attn_implementation", ["torch_varlen", "flex_attention", "flash_attention_2"])
def test_implementations_agree_on_cuda(build_model, ragged, attn_implementation):
    if attn_implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    inputs = {name: value.cuda() for name, value in ragged.items()}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        expected = build_model("sdpa").cuda().bfloat16()(**inputs).last_hidden_state
        found = build_model(attn_implementation).cuda().bfloat16()(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, atol=6e-2, rtol=0)  # bfloat16 keeps three digits
