# SPDX-License-Identifier: Apache-2.0
"""Patches cut out of frames, laid out as mosaics in the published order, and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_datasets import gather_patches, pack_mosaics, unpack_mosaics


def _frames(num_frames, rows, columns, patch, seed=0):
    shape = (num_frames, rows * patch, columns * patch, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _random_positions(rng, count, shape):
    flat = rng.permutation(np.prod(shape))[:count]
    return np.stack(np.unravel_index(flat, shape), axis=1).astype(np.int32)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2, 7, 16]), st.integers(0, 99))
def test_patches_are_slices_of_the_frames(num_frames, rows, columns, patch, seed):
    frames = _frames(num_frames, rows, columns, patch, seed)
    rng = np.random.default_rng(seed)
    positions = _random_positions(rng, rng.integers(0, num_frames * rows * columns + 1), (num_frames, rows, columns))
    patches = gather_patches(frames, positions, patch)
    assert patches.shape == (len(positions), patch, patch, 3)
    for pixels, (t, h, w) in zip(patches, positions):
        assert np.array_equal(pixels, frames[t, h * patch : (h + 1) * patch, w * patch : (w + 1) * patch])


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 4, 16]), st.integers(0, 99))
def test_packing_and_unpacking_give_the_patches_in_order(num_mosaics, side, patch, seed):
    count = num_mosaics * side**2
    frames = _frames(5, 4, 4, patch, seed)
    positions = _random_positions(np.random.default_rng(seed), count, (5, 4, 4))
    patches = gather_patches(frames, positions, patch)
    mosaics, ordered = pack_mosaics(patches, positions, num_mosaics)
    assert mosaics.shape == (num_mosaics, side * patch, side * patch, 3)
    assert ordered.tolist() == sorted(positions.tolist())
    assert np.array_equal(unpack_mosaics(mosaics, patch), gather_patches(frames, ordered, patch))


def test_published_layout():
    """Row r of the positions is mosaic r // cells, cell r % cells, row by row."""
    frames = _frames(3, 4, 4, 8)
    positions = np.argwhere(np.ones((3, 4, 4), bool)).astype(np.int32)[:32]
    mosaics, ordered = pack_mosaics(gather_patches(frames, positions, 8), positions, 2)
    for r, (t, h, w) in enumerate(ordered):
        row, column = divmod(r % 16, 4)
        cell = mosaics[r // 16, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        assert np.array_equal(cell, frames[t, h * 8 : h * 8 + 8, w * 8 : w * 8 + 8])
    assert np.array_equal(mosaics[0], frames[0])  # a whole first frame is the first mosaic


@pytest.mark.parametrize("num_mosaics", [0, -1, 1, 3, 8])
def test_patches_that_fill_no_squares_are_refused(num_mosaics):
    positions = np.argwhere(np.ones((2, 3, 3), bool))
    patches = np.zeros((18, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=f"18 patches can't fill {num_mosaics} square mosaics"):
        pack_mosaics(patches, positions, num_mosaics)


def test_counts_must_agree():
    with pytest.raises(ValueError, match="3 patches, but 4 positions"):
        pack_mosaics(np.zeros((3, 4, 4, 3), np.uint8), np.zeros((4, 3), np.int32), 1)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0, 0, 3]], r"must lie in \(2, 2, 2\)"),
        ([[-1, 0, 0]], "must lie in"),
        ([[0, 0]], r"must be \(N, 3\) integers, got \(1, 2\)"),
        ([[0.0, 0.0, 0.0]], r"must be \(N, 3\) integers, got \(1, 3\) float64"),
    ],
)
def test_positions_that_are_none_are_refused(positions, message):
    with pytest.raises(ValueError, match=message):
        gather_patches(_frames(2, 2, 2, 4), np.array(positions), 4)


def test_sizes_must_be_divisible():
    with pytest.raises(ValueError, match="frames of 8x8 are not divisible by patch_size 3"):
        gather_patches(_frames(1, 2, 2, 4), np.zeros((0, 3), int), 3)
    with pytest.raises(ValueError, match="mosaics of 8x8 are not divisible by patch_size 3"):
        unpack_mosaics(_frames(1, 2, 2, 4), 3)
    with pytest.raises(ValueError, match=r"mosaics must be \(M, S, S, 3\), got \(8, 8, 3\)"):
        unpack_mosaics(_frames(1, 2, 2, 4)[0], 4)
