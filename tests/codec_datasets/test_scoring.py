# SPDX-License-Identifier: Apache-2.0
"""Energy scores: the matrix products equal the direct way, and scores turn with the picture."""

import numpy as np
import pytest

from codec_datasets import compute_signals, make_grid, place_picture, read_clip, score_patches
from codec_datasets.scoring import RESIDUAL_WEIGHT
from codec_datasets.signals import Signals


def _bilinear(plane, height, width):
    """Half-pixel centres, edges repeated, no filtering: the way of OpenCV's INTER_LINEAR."""
    y, x = (
        np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1) for new, old in zip((height, width), plane.shape)
    )
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    bottom, right = np.minimum(top + 1, plane.shape[0] - 1), np.minimum(left + 1, plane.shape[1] - 1)
    dy, dx = (y - top)[:, None], (x - left)[None]
    upper = plane[top][:, left] * (1 - dx) + plane[top][:, right] * dx
    lower = plane[bottom][:, left] * (1 - dx) + plane[bottom][:, right] * dx
    return upper * (1 - dy) + lower * dy


def _percentile_energy(values, floor):
    return np.minimum(values / max(np.percentile(values, 95), floor), 1)


def _direct_scores(signals, grid, placement):
    """Enlarge, resize, pad and sum picture by picture."""
    height, width = signals.picture_size
    scores = np.zeros(grid.shape)
    for t in range(grid.num_frames):
        vectors = signals.motion_vectors[t, ..., :2] / 4
        length = np.hypot(*np.moveaxis(vectors - np.median(vectors, (0, 1)), -1, 0))
        motion = _percentile_energy(length, 1e-6)
        rows = np.minimum(np.arange(height) * motion.shape[0] // height, motion.shape[0] - 1)
        columns = np.minimum(np.arange(width) * motion.shape[1] // width, motion.shape[1] - 1)
        for energy, weight in (
            (motion[rows][:, columns], 1),
            (_percentile_energy(signals.residual[t], 1), RESIDUAL_WEIGHT),
        ):
            resized = _bilinear(energy, placement.resized_height, placement.resized_width)
            canvas = np.zeros((placement.height, placement.width))
            canvas[placement.content] = resized[placement.crop]
            patch = grid.patch_size
            scores[t] += weight * canvas.reshape(grid.grid_h, patch, grid.grid_w, patch).sum((1, 3))
    return scores


def _random_signals(height, width, stride):
    rng = np.random.default_rng(height)
    vectors = rng.integers(-9, 9, (3, height // 4, width // 4, 4)).astype(np.int16)
    residual = rng.exponential(8, (3, -(-height // stride), -(-width // stride))).astype(np.float32)
    return Signals(vectors, residual, (height, width), 0, stride, "bitstream", ("isolated",) * 3)


@pytest.mark.parametrize(("height", "width", "stride"), [(96, 128, 1), (101, 359, 2), (360, 640, 4), (50, 30, 1)])
@pytest.mark.parametrize(
    ("size", "fit"), [(96, "letterbox"), ((96, 160), "resize"), ((160, 96), "crop"), (224, "letterbox")]
)
def test_scores_are_those_of_the_direct_way(height, width, stride, size, fit):
    signals = _random_signals(height, width, stride)
    placement = place_picture(height, width, size, fit)
    grid = make_grid(3, placement, 16)
    scores = score_patches(signals, grid, placement)
    assert scores.dtype == np.float32
    # sums of up to 256 float32 values per patch, in another order
    assert np.allclose(scores, _direct_scores(signals, grid, placement), atol=2e-3)
    assert (scores[:, ~grid.content] == 0).all()


@pytest.mark.parametrize("clockwise", [90, 180, 270])
def test_scores_turn_with_the_picture(clips, square_clip, clockwise):
    path = clips.turned(f"square{clockwise}.mp4", square_clip, clockwise)
    upright, turned = (_scores_of(name) for name in (square_clip, path))
    assert upright[5:].max() > 50
    # the letterbox resize commutes with turning up to rounding
    assert np.allclose(turned, np.rot90(upright, -clockwise // 90, axes=(1, 2)), atol=0.05)


def _scores_of(path):
    clip = read_clip(path, 12, 160, coded=True)
    return score_patches(compute_signals(clip), make_grid(12, clip.placement, 16), clip.placement)


def test_the_moving_square_scores_most(square_clip):
    scores = _scores_of(square_clip)
    for t in range(2, 12):
        row, column = np.unravel_index(scores[t].argmax(), scores[t].shape)
        assert 32 + 32 - 16 < (row + 1) * 16 <= 32 + 80 + 16  # 32 px of letterbox above
        assert 16 + 4 * t - 16 < (column + 1) * 16 <= 16 + 4 * t + 48 + 16
