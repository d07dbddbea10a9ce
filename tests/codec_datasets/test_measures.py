# SPDX-License-Identifier: Apache-2.0
"""Hold and coverage PSNR against a plain pixel implementation of their definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_datasets import clip_from_frames, coverage_psnr, hold_psnr, make_grid

PATCH = 8


def _clip(seed, height=40, width=24):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (4, height, width, 3), dtype=np.uint8)
    frames[2:] = frames[:2] // 2 + 30  # similar enough that what is nearest matters
    clip = clip_from_frames(frames, size=40)
    return clip.frames, make_grid(4, clip.placement, PATCH)


def _some_positions(seed, grid):
    rng = np.random.default_rng(seed)
    return np.argwhere(rng.random(grid.shape) < rng.random())


def _cut(frames, h, w):
    return frames[:, h * PATCH : (h + 1) * PATCH, w * PATCH : (w + 1) * PATCH].astype(np.int64)


def _psnr(total, frames):
    return 10 * np.log10(255**2 * frames.size / total) if total else float("inf")


def _naive_hold(frames, grid, positions):
    kept = {tuple(position) for position in positions.tolist()}
    rebuilt = np.zeros_like(frames)
    held = np.zeros_like(frames[0])
    for t in range(grid.num_frames):
        for _, h, w in (place for place in kept if place[0] == t):
            area = slice(h * PATCH, (h + 1) * PATCH), slice(w * PATCH, (w + 1) * PATCH)
            held[area] = frames[t][area]
        rebuilt[t] = held
    return _psnr(((rebuilt.astype(np.int64) - frames) ** 2).sum(), frames)


def _naive_coverage(frames, grid, positions):
    total = 0
    for h in range(grid.grid_h):
        for w in range(grid.grid_w):
            here = _cut(frames, h, w)
            shown = [here[t] for t, row, column in positions if (row, column) == (h, w)] or [np.zeros_like(here[0])]
            total += sum(min(((patch - other) ** 2).sum() for other in shown) for patch in here)
    return _psnr(total, frames)


@given(st.integers(0, 10**6))
def test_measures_follow_their_definition(seed):
    frames, grid = _clip(seed % 7)
    positions = _some_positions(seed, grid)
    assert hold_psnr(frames, grid, positions) == pytest.approx(_naive_hold(frames, grid, positions))
    assert coverage_psnr(frames, grid, positions) == pytest.approx(_naive_coverage(frames, grid, positions))
    shuffled = np.random.default_rng(seed).permutation(positions)
    assert hold_psnr(frames, grid, shuffled) == hold_psnr(frames, grid, positions)


def test_everything_kept_is_perfect():
    frames, grid = _clip(0)
    everything = np.argwhere(np.ones(grid.shape, bool))
    assert hold_psnr(frames, grid, everything) == coverage_psnr(frames, grid, everything) == float("inf")


def test_nothing_kept_is_black():
    frames, grid = _clip(0)
    nothing = np.zeros((0, 3), np.int32)
    expected = _psnr((frames.astype(np.int64) ** 2).sum(), frames)
    assert hold_psnr(frames, grid, nothing) == pytest.approx(expected)
    assert coverage_psnr(frames, grid, nothing) == pytest.approx(expected)


@pytest.mark.parametrize("measure", [hold_psnr, coverage_psnr])
def test_what_does_not_fit_is_refused(measure):
    frames, grid = _clip(0)
    with pytest.raises(ValueError, match=r"frames must be \(4, 40, 40, 3\) uint8 for this grid, got \(3, 40, 40, 3\)"):
        measure(frames[:3], grid, np.zeros((0, 3), int))
    with pytest.raises(ValueError, match=r"patch_positions must be \(N, 3\), got \(2, 2\)"):
        measure(frames, grid, np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="must lie in"):
        measure(frames, grid, np.array([[4, 0, 0]]))
