# SPDX-License-Identifier: Apache-2.0
"""Squared distances are exact integers, whatever the patch size and the values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_datasets.distances import patch_distances


def _units(frames, unit):
    """`(L, T, features)` int64."""
    num_frames, height, width = frames.shape[:3]
    cells = frames.reshape(num_frames, height // unit, unit, width // unit, unit, 3).astype(np.int64)
    return cells.transpose(1, 3, 0, 2, 4, 5).reshape(-1, num_frames, unit * unit * 3)


def _brute_force(frames, unit):
    units = _units(frames, unit)
    return ((units[:, :, None] - units[:, None]) ** 2).sum(-1), (units**2).sum(-1)


def _exact_pairs(distances):
    gram = distances.gram.astype(np.int64)
    return distances.norms[:, :, None] + distances.norms[:, None] - 2 * gram


def _everywhere(frames, unit):
    return slice(0, frames.shape[1] // unit), slice(0, frames.shape[2] // unit)


# plain patch sizes, and those of 2 x 2 blocks
UNITS = pytest.mark.parametrize("unit", [1, 8, 13, 14, 16, 28, 32, 56, 64])
EXTREMES = {
    "random": lambda rng, shape: rng.integers(0, 256, shape, dtype=np.uint8),
    "black and white": lambda rng, shape: (rng.integers(0, 2, shape) * 255).astype(np.uint8),
    "black": lambda rng, shape: np.zeros(shape, np.uint8),
    "white after black": lambda rng, shape: (
        np.full(shape, 255, np.uint8) * (np.arange(shape[0]) % 2)[:, None, None, None].astype(np.uint8)
    ),
}


@UNITS
@pytest.mark.parametrize("content", EXTREMES)
def test_distances_are_exact(unit, content):
    frames = EXTREMES[content](np.random.default_rng(unit), (7, 2 * unit, 3 * unit, 3))
    pairs, dark = _brute_force(frames, unit)
    distances = patch_distances(frames, unit, *_everywhere(frames, unit))
    assert np.array_equal(_exact_pairs(distances), pairs)
    assert np.array_equal(distances.dark, dark)
    assert np.array_equal(distances.steps()[:, 1:], np.diagonal(pairs, 1, 1, 2))
    assert not distances.steps()[:, 0].any()
    # rounded to float32
    assert np.allclose(distances.all_pairs(), pairs, rtol=1e-6, atol=4 * np.spacing(np.float32(dark.max() + 1)) + 4)
    assert (distances.all_pairs() >= 0).all()


@UNITS
def test_one_slot_against_another(unit):
    frames = np.random.default_rng(3).integers(0, 256, (5, unit * 2, unit * 2, 3), dtype=np.uint8)
    pairs, dark = _brute_force(frames, unit)
    distances = patch_distances(frames, unit, *_everywhere(frames, unit))
    slots = np.array([0, 2, -1, 3])
    expected = [pairs[0, 0, 4], pairs[1, 2, 4], dark[2, 4], pairs[3, 3, 4]]
    assert distances.from_slots(slots, 4).tolist() == expected


@given(
    st.integers(1, 6), st.integers(0, 3), st.integers(1, 4), st.integers(0, 3), st.integers(1, 4), st.integers(0, 9)
)
def test_any_rectangle(num_frames, top, num_rows, left, num_columns, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, 7 * 8, 7 * 8, 3), dtype=np.uint8)
    rows, columns = slice(top, top + num_rows), slice(left, left + num_columns)
    part = np.ascontiguousarray(frames[:, top * 8 : rows.stop * 8, left * 8 : columns.stop * 8])
    distances = patch_distances(frames, 8, rows, columns)
    pairs, dark = _brute_force(part, 8)
    assert np.array_equal(_exact_pairs(distances), pairs)
    assert np.array_equal(distances.dark, dark)


def test_views_are_as_good_as_copies():
    frames = np.random.default_rng(4).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    for view in (frames[::2], frames[:, ::-1], frames[:, :32], frames[..., ::-1]):
        distances = patch_distances(view, 16, *_everywhere(view, 16))
        assert np.array_equal(_exact_pairs(distances), _brute_force(view, 16)[0])


def test_distances_to_black_are_optional():
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    assert patch_distances(frames, 16, slice(0, 1), slice(0, 1), with_dark=False).dark is None


def test_patches_too_large_to_be_exact_are_refused():
    frames = np.zeros((1, 400, 400, 3), np.uint8)
    with pytest.raises(ValueError, match="patches of 400 px are too large; the largest side is 341"):
        patch_distances(frames, 400, slice(0, 1), slice(0, 1))
