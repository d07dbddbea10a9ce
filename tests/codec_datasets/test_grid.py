# SPDX-License-Identifier: Apache-2.0
"""Letterbox geometry, frame sizes and the masks of the patch lattice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_datasets import PatchGrid, make_grid, place_picture

SIDES = st.integers(1, 4000)


@given(SIDES, SIDES, st.sampled_from([224, 336, 504, 576]))
def test_letterbox_is_the_published_arithmetic(height, width, size):
    scale = min(size / height, size / width)
    expected = max(1, round(height * scale)), max(1, round(width * scale))
    placement = place_picture(height, width, size)
    assert (placement.resized_height, placement.resized_width) == expected
    assert (placement.top, placement.left) == ((size - expected[0]) // 2, (size - expected[1]) // 2)
    assert (placement.content_height, placement.content_width) == expected
    assert max(expected) == size


@given(SIDES, SIDES, st.integers(16, 600), st.integers(16, 600))
def test_crop_covers_the_whole_frame(height, width, frame_height, frame_width):
    placement = place_picture(height, width, (frame_height, frame_width), "crop")
    rows, columns = placement.crop
    assert (rows.stop - rows.start, columns.stop - columns.start) == (frame_height, frame_width)
    assert rows.start >= 0
    assert rows.stop <= placement.resized_height
    assert columns.stop <= placement.resized_width


def test_resize_fills_the_frame():
    placement = place_picture(100, 300, (64, 32), "resize")
    assert placement.content == (slice(0, 64), slice(0, 32))


@given(SIDES, SIDES, st.sampled_from([8, 14, 16, 28]))
def test_masks_say_what_shows_picture(height, width, patch_size):
    size = patch_size * 12
    placement = place_picture(height, width, size)
    picture = np.zeros((size, size), bool)
    picture[placement.content] = True
    lattice = picture.reshape(12, patch_size, 12, patch_size)
    grid = make_grid(3, placement, patch_size)
    assert np.array_equal(grid.content, lattice.any((1, 3)))
    assert np.array_equal(grid.valid, lattice.all((1, 3)))
    assert grid.shape == (3, 12, 12)


@pytest.mark.parametrize(
    ("size", "patch_size", "message"),
    [
        (100, 16, "100x100 is not divisible by patch_size 16.*96x96"),
        ((96, 100), 16, "96x100 is not divisible"),
        (8, 16, "8x8 is not divisible.*16x16"),
        (96, 0, "patch_size must be at least 1, got 0"),
    ],
)
def test_indivisible_sizes_are_refused(size, patch_size, message):
    with pytest.raises(ValueError, match=message):
        make_grid(1, place_picture(96, 96, size), patch_size)


@pytest.mark.parametrize("size", [0, -16, (0, 16), (16, -1)])
def test_empty_frames_are_refused(size):
    with pytest.raises(ValueError, match="size must be a positive"):
        place_picture(10, 10, size)


def test_unknown_fit_is_refused():
    with pytest.raises(ValueError, match=r"fit must be one of .*letterbox.*got 'stretch'"):
        place_picture(10, 10, 32, "stretch")


def test_masks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"valid must be \(2, 2\), got \(3, 2\)"):
        PatchGrid(1, 2, 2, 16, np.ones((2, 2), bool), np.ones((3, 2), bool))
