# SPDX-License-Identifier: Apache-2.0
"""The rules of replenish, rate_distortion and coverage against direct loops and brute force."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_datasets import SelectionConfig, clip_from_frames, make_grid, select_patches
from codec_datasets.policies import _search_price

PATCH = 4
FIRST = pytest.mark.parametrize("first_frame", ["full", "selected"])


def _clip(frames):
    return frames, make_grid(len(frames), clip_from_frames(frames, size=frames.shape[1:3]).placement, PATCH)


def _random_clip(seed, num_frames, columns):
    """One row of patches; contents come back and drift."""
    rng = np.random.default_rng(seed)
    contents = rng.integers(0, 256, (3, PATCH, PATCH * columns, 3))
    choice = rng.integers(0, 3, (num_frames, columns)).repeat(PATCH, 1)[:, None, :, None]
    frames = np.take_along_axis(contents, choice, axis=0) + rng.integers(-9, 9, (num_frames, 1, 1, 1))
    return _clip(np.clip(frames, 0, 255).astype(np.uint8))


def _cells(frames):
    """`(T, L, features)` int64."""
    num_frames, height, width = frames.shape[:3]
    cells = frames.reshape(num_frames, height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(num_frames, -1, PATCH * PATCH * 3).astype(np.int64)


def _hold_error(cells, kept):
    held, total = np.zeros_like(cells[0]), 0
    for t in range(len(cells)):
        held = np.where(kept[t][:, None], cells[t], held)
        total += int(((cells[t] - held) ** 2).sum())
    return total


def _coverage_error(cells, kept):
    total = 0
    for location in range(cells.shape[1]):
        here = cells[:, location]
        shown = here[kept[:, location]] if kept[:, location].any() else np.zeros_like(here[:1])
        total += int(((here[:, None] - shown[None]) ** 2).sum(-1).min(1).sum())
    return total


def _kept(frames, grid, **options):
    positions = select_patches(frames, grid, SelectionConfig(patch_size=PATCH, **options))
    kept = np.zeros(grid.shape, bool)
    kept[tuple(positions.T)] = True
    return kept.reshape(grid.num_frames, -1)


def _all_selections(shape, first_frame):
    """Every `(T, L)` selection, by number of kept patches."""
    first = shape[1] if first_frame == "full" else 0
    free = np.arange(first, np.prod(shape))
    for count in range(len(free) + 1):
        for chosen in combinations(free, count):
            kept = np.zeros(shape, bool)
            kept.reshape(-1)[[*range(first), *chosen]] = True
            yield first + count, kept


@FIRST
@given(st.integers(0, 10**6), st.floats(1, 150))
def test_replenish_is_a_loop_over_frames(first_frame, seed, threshold):
    frames, grid = _random_clip(seed, 6, 3)
    kept = _kept(frames, grid, num_patches=18, first_frame=first_frame, stop_below_error=threshold)
    cells = _cells(frames)
    held, expected = np.zeros_like(cells[0]), []
    for t, patches in enumerate(cells):
        errs = ((patches - held) ** 2).sum(-1) > threshold**2 * PATCH**2 * 3
        if t == 0 and first_frame == "full":
            errs[:] = True
        held = np.where(errs[:, None], patches, held)
        expected.append(errs)
    assert np.array_equal(kept, expected)


@given(st.integers(0, 10**6), st.integers(1, 400), st.floats(0.5, 1e11))
def test_price_search_meets_the_budget(seed, budget, guess):
    """Where a count is the number of values above a price, the price found leaves as few unused as can be."""
    rng = np.random.default_rng(seed)
    values = np.exp(rng.uniform(np.log(0.6), np.log(1e9), rng.integers(1, 500))).round(rng.integers(0, 3))

    def count_at(price):
        return int((values > price).sum())

    price = _search_price(count_at, budget, guess, float(values.max()))
    assert count_at(price) <= budget
    is_close = count_at(price) >= 0.99 * budget
    assert is_close or price < 0.51 or count_at(price * (1 - 1e-6)) > budget


@FIRST
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 2))
def test_rate_distortion_is_optimal(first_frame, seed, num_frames, columns):
    """At every budget on the lower convex hull of (patches, error) nothing is better."""
    frames, grid = _random_clip(seed, num_frames, columns)
    cells = _cells(frames)
    least: dict[int, int] = {}
    for count, kept in _all_selections((num_frames, columns), first_frame):
        least[count] = min(least.get(count, 1 << 62), _hold_error(cells, kept))
    counts = sorted(count for count in least if count)
    for budget, error in _lower_hull([(count, least[count]) for count in counts]):
        options = {"num_patches": budget, "first_frame": first_frame, "policy": "rate_distortion"}
        assert error <= _hold_error(cells, _kept(frames, grid, **options)) <= error * (1 + 1e-5)


def _lower_hull(points):
    hull = []
    for point in points:
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(left, middle, right):
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])


@FIRST
@given(st.integers(0, 10**6), st.floats(5, 120))
def test_rate_distortion_at_a_price_is_optimal(first_frame, seed, error):
    frames, grid = _random_clip(seed, 4, 2)
    cells, price = _cells(frames), error**2 * PATCH**2 * 3
    kept = _kept(
        frames, grid, num_patches=8, first_frame=first_frame, policy="rate_distortion", stop_below_error=error
    )
    best = min(_hold_error(cells, other) + price * count for count, other in _all_selections((4, 2), first_frame))
    assert _hold_error(cells, kept) + price * kept.sum() <= best * (1 + 1e-5)


@FIRST
@given(st.integers(0, 10**6), st.floats(5, 120))
def test_rate_distortion_errs_no_more_than_replenish(first_frame, seed, error):
    frames, grid = _random_clip(seed, 6, 3)
    cells = _cells(frames)
    optimal = _kept(
        frames, grid, num_patches=18, first_frame=first_frame, policy="rate_distortion", stop_below_error=error
    )
    if count := int(optimal.sum()):
        causal = _kept(frames, grid, num_patches=count, first_frame=first_frame)
        assert _hold_error(cells, optimal) <= _hold_error(cells, causal) * (1 + 1e-5)


@FIRST
@given(st.integers(0, 10**6), st.integers(3, 18))
def test_coverage_is_greedy(first_frame, seed, budget):
    frames, grid = _random_clip(seed, 6, 3)
    cells = _cells(frames)
    kept = np.zeros((6, 3), bool)
    kept[0] = first_frame == "full"
    while kept.sum() < budget:
        now = _coverage_error(cells, kept)
        gains = {place: now - _coverage_error(cells, kept | _at(place)) for place in zip(*np.nonzero(~kept))}
        if max(gains.values()) <= 0:
            break
        kept |= _at(max(gains, key=gains.get))
    ours = _kept(frames, grid, num_patches=budget, first_frame=first_frame, policy="coverage")
    assert _coverage_error(cells, ours) <= _coverage_error(cells, kept) * (1 + 1e-5)


def test_coverage_budgets_are_nested_where_gains_are_equal():
    """Few grey levels: equal gains turn up in different rounds."""
    for seed in range(60):
        levels = np.random.default_rng(seed).choice(np.array([0, 60, 120], np.uint8), (5, 1, 6, 1))
        frames, grid = _clip(levels.repeat(PATCH, 1).repeat(PATCH, 2).repeat(3, 3))
        for first_frame, least in (("selected", 1), ("full", 6)):
            before = np.zeros((5, 6), bool)
            for budget in range(least, 31):
                kept = _kept(frames, grid, num_patches=budget, first_frame=first_frame, policy="coverage")
                assert not (before & ~kept).any()
                before = kept


def _at(place):
    single = np.zeros((6, 3), bool)
    single[place] = True
    return single


@pytest.mark.parametrize("policy", ["replenish", "rate_distortion", "coverage"])
@pytest.mark.parametrize("patch_size", [3, 4, 10, 13, 20])
@FIRST
def test_the_strongest_change_does_not_break_the_budget(policy, patch_size, first_frame):
    """Black and white in turn: every error is the largest that can occur."""
    frames = np.zeros((6, 2 * patch_size, 2 * patch_size, 3), np.uint8)
    frames[1::2] = 255
    grid = make_grid(6, clip_from_frames(frames, size=frames.shape[1]).placement, patch_size)
    for budget in range(4, 25):
        config = SelectionConfig(patch_size=patch_size, num_patches=budget, policy=policy, first_frame=first_frame)
        assert len(select_patches(frames, grid, config)) == budget


def test_a_flash_does_not_stop_the_search_for_a_price():
    """The strongest step is above every price worth paying: the search has to come down from it."""
    frames = np.full((8, 16, 16, 3), 12, np.uint8) + np.random.default_rng(0).integers(0, 3, (8, 16, 16, 3), np.uint8)
    frames[4, :4, :4] = 255
    frames, grid = _clip(frames)
    kept = _kept(frames, grid, num_patches=16, first_frame="selected", policy="rate_distortion")
    assert kept.any(0).sum() >= 15


def test_motion_weight_moves_patches_to_what_moves(clips):
    """A square moves, noise flickers elsewhere: with a weight more of the budget follows the square."""
    frames = clips.square(12, 96, 96, step=2).astype(int)
    frames[:, 80:] += np.random.default_rng(0).integers(-14, 14, frames[:, 80:].shape)
    frames = np.clip(frames, 0, 255).astype(np.uint8)
    grid = make_grid(12, clip_from_frames(frames, size=96).placement, 16)
    shares = []
    for weight in (0.0, 8.0):
        config = SelectionConfig(num_patches=90, motion_weight=weight)
        positions = select_patches(frames, grid, config)
        shares.append(((positions[:, 0] > 0) & (positions[:, 1] < 5)).mean())
    assert shares[1] >= shares[0]
