# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from onevision_encoder.inputs_onevision_encoder import grid_positions, patchify, tokens_from_frames


def test_patches_times_weight_are_the_convolution():
    frames, convolution = torch.randn(2, 3, 4, 8, 12), torch.nn.Conv2d(3, 16, 4, 4, bias=False)
    expected = torch.stack([convolution(frames[:, :, t]) for t in range(4)], dim=1)  # (B, T, D, grid_h, grid_w)
    expected = expected.permute(0, 1, 3, 4, 2).flatten(1, 3)
    found = patchify(frames, 4) @ convolution.weight.flatten(1).T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_grid_positions_count_columns_first():
    assert grid_positions(torch.tensor([[0, 1, 3, 6, 11]]), 2, 3)[0].tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 1, 0],
        [1, 0, 0],
        [1, 1, 2],
    ]


def test_fewer_indices_select_and_as_many_only_place():
    frames = torch.randn(1, 3, 2, 8, 8)
    patches, _ = tokens_from_frames(frames, None, None, 4)
    selected, positions = tokens_from_frames(frames, torch.tensor([[5, 2]]), None, 4)
    assert torch.equal(selected, patches[:, [5, 2]])
    assert positions[0].tolist() == [[1, 0, 1], [0, 1, 0]]
    placed, positions = tokens_from_frames(frames, torch.arange(7, -1, -1)[None], None, 4)
    assert torch.equal(placed, patches)
    assert positions[0, 0].tolist() == [1, 1, 1]


def _changed(sample, place, value):
    sample = {name: tensor.clone() for name, tensor in sample.items()}
    name, index = place
    sample[name][index] = value
    return sample


IMAGE = {"pixel_values": torch.zeros(2, 3, 8, 12)}
VIDEO = {"pixel_values": torch.zeros(2, 3, 3, 8, 12)}
SEQUENCE = {
    "pixel_values": torch.zeros(2, 5, 48),
    "image_position_ids": torch.zeros(2, 5, 3, dtype=torch.long),
}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": torch.zeros(2, 3, 8, 12, dtype=torch.uint8)}, r"floating-point.*uint8.*\(2, 3, 8, 12\)"),
        ({"pixel_values": torch.zeros(8, 12)}, r"\(B, C, H, W\).*got \(8, 12\)"),
        ({"pixel_values": torch.zeros(0, 3, 8, 12)}, r"non-empty.*\(0, 3, 8, 12\)"),
        ({"pixel_values": torch.zeros(2, 4, 8, 12)}, r"3 channels.*\(2, 4, 8, 12\)"),
        ({"pixel_values": torch.zeros(2, 3, 8, 13)}, r"multiples of patch_size=4.*\(2, 3, 8, 13\)"),
        ({"pixel_values": torch.zeros(2, 3, 2, 9, 12)}, r"multiples of patch_size=4.*\(2, 3, 2, 9, 12\)"),
        (_changed(IMAGE, ("pixel_values", (1, 0, 0, 0)), float("nan")), r"\(2, 3, 8, 12\) has NaN or infinite"),
        (_changed(VIDEO, ("pixel_values", (1, 0, 0, 0, 0)), float("inf")), r"\(2, 3, 3, 8, 12\) has NaN or infinite"),
        ({**IMAGE, "visible_indices": torch.tensor([[0, 6]])}, r"\(1, 2\) lies in \[0, 6\].*\[0, 5\]"),
        ({**VIDEO, "visible_indices": torch.tensor([[-1, 6]])}, r"lies in \[-1, 6\]"),
        ({**VIDEO, "visible_indices": torch.tensor([[0, 18]])}, r"lies in \[0, 18\].*\[0, 17\]"),
        ({**VIDEO, "visible_indices": torch.full((1, 18), 64 * 6)}, r"lies in \[384, 384\].*\[0, 383\]"),
        ({**VIDEO, "visible_indices": torch.zeros(3, 4, dtype=torch.long)}, r"\(B or 1, S\).*got \(3, 4\)"),
        ({**VIDEO, "visible_indices": torch.zeros(1, 4)}, "integer visible_indices, got torch.float32"),
        ({**VIDEO, "patch_positions": torch.zeros(1, 17, 3)}, r"\(B or 1, 18, 3\).*got \(1, 17, 3\)"),
        ({**VIDEO, "patch_positions": torch.zeros(3, 18, 3)}, r"\(B or 1, 18, 3\).*got \(3, 18, 3\)"),
        ({**VIDEO, "patch_positions": torch.full((1, 18, 3), -1)}, r"\(1, 18, 3\) has negative values"),
        ({**IMAGE, "image_position_ids": torch.zeros(2, 6, 3)}, "belongs to patch sequences.*pass patch_positions"),
        ({"pixel_values": torch.zeros(2, 3, 65, 4, 4)}, "65 frames, more than the 64 time slots"),
        ({"pixel_values": torch.zeros(2, 5, 47)}, r"3\*4\*4 = 48 values.*\(2, 5, 47\)"),
        ({"pixel_values": torch.zeros(2, 5, 48)}, r"needs image_position_ids of shape \(2, 5, 3\)"),
        ({**SEQUENCE, "patch_positions": torch.zeros(2, 5, 3)}, "is a patch sequence: pass image_position_ids"),
        ({**SEQUENCE, "image_position_ids": torch.zeros(2, 4, 3)}, r"\(2, 5, 3\).*got \(2, 4, 3\)"),
        ({**SEQUENCE, "image_position_ids": torch.zeros(2, 5, 3)}, "integer image_position_ids, got torch.float32"),
        (_changed(SEQUENCE, ("image_position_ids", (1, 2, 0)), -1), r"\(2, 5, 3\) has 1 rows that are neither"),
        (_changed(SEQUENCE, ("image_position_ids", (1, 2)), -2), r"\(2, 5, 3\) has 1 rows that are neither"),
        (_changed(SEQUENCE, ("image_position_ids", (1,)), -1), r"Item 1 .*\(2, 5, 3\) holds no patch"),
        (_changed(SEQUENCE, ("pixel_values", (0, 3, 7)), float("nan")), r"\(2, 5, 48\) has NaN .* in 1 patches"),
    ],
)
def test_inputs_that_do_not_fit_raise(build_model, inputs, message):
    with pytest.raises(ValueError, match=message):
        build_model()(**inputs)


def test_more_frames_than_slots_run_with_positions(build_model):
    pixel_values = torch.randn(1, 3, 65, 4, 4)
    positions = torch.tensor([[[t, 0, 0] for t in range(65)]])
    with torch.no_grad():
        expected = build_model(rope_temporal_size=None)(pixel_values)
        found = build_model()(pixel_values, patch_positions=positions)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def test_indices_that_neither_select_nor_place_go_unread(build_model):
    pixel_values, positions = torch.randn(1, 3, 2, 4, 4), torch.tensor([[[3, 0, 0], [9, 0, 0]]])
    with torch.no_grad():
        expected = build_model()(pixel_values, patch_positions=positions)
        found = build_model()(pixel_values, patch_positions=positions, visible_indices=torch.tensor([[3, 999]]))
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def test_nan_on_padding_is_no_error(build_model, ragged):
    assert build_model()(**ragged).last_hidden_state.isfinite().all()
