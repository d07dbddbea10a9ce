# SPDX-License-Identifier: Apache-2.0
"""Budgets, order, padding, blocks and determinism of every policy, on random clips."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_datasets import POLICIES, SelectionConfig, clip_from_frames, hold_psnr, make_grid, select_patches
from codec_datasets.selection import fit_budget

PATCH = 4
WEIGHING = ("replenish", "rate_distortion", "coverage")


@st.composite
def selections(draw, policies=tuple(POLICIES)):
    """Frames, grid, config and scores of a random selection that can be met."""
    policy = draw(st.sampled_from(policies))
    block = draw(st.sampled_from([1, 2]))
    num_frames = draw(st.integers(1, 6))
    height, width = draw(st.integers(3, 40)), draw(st.integers(3, 40))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    frames = _changing_frames(rng, num_frames, height, width)
    clip = clip_from_frames(frames, size=8 * PATCH)
    grid = make_grid(num_frames, clip.placement, PATCH)
    options = {
        "patch_size": PATCH,
        "policy": policy,
        "block": block,
        "first_frame": draw(st.sampled_from(["full", "selected"])),
        "padding": draw(st.sampled_from(["exclude", "zero"])),
        "motion_weight": draw(st.sampled_from([0.0, 1.0])) if policy in WEIGHING else 0.0,
    }
    least, capacity = _limits(grid, SelectionConfig(num_patches=4, **options))
    units = draw(st.integers(least // block**2, capacity // block**2))
    config = SelectionConfig(num_patches=units * block**2, **options)
    return clip.frames, grid, config, rng.random(grid.shape).astype(np.float32)


def _changing_frames(rng, num_frames, height, width):
    """Few distinct contents per place, so that ties, repeats and still places occur."""
    contents = rng.choice(np.array([0, 0, 30, 31, 200, 255], np.uint8), (3, height, width, 1)).repeat(3, -1)
    choice = rng.integers(0, 3, (num_frames, -(-height // 7), -(-width // 7))).repeat(7, 1).repeat(7, 2)
    choice = choice[:, :height, :width]
    return np.take_along_axis(contents[:, None], choice[None, ..., None], axis=0)[0]


def _limits(grid, config):
    block = config.block
    per_frame = grid.grid_h * grid.grid_w
    if config.padding == "exclude":
        units = grid.content.reshape(grid.grid_h // block, block, grid.grid_w // block, block).any((1, 3))
        per_frame = int(units.sum()) * block**2
    keeps_first = config.first_frame == "full" and config.policy != "uniform"
    return per_frame if keeps_first else block**2, per_frame * grid.num_frames


@given(selections())
def test_every_policy_meets_its_budget(selection):
    frames, grid, config, scores = selection
    positions = select_patches(frames, grid, config, scores)
    assert positions.shape == (config.num_patches, 3)
    assert positions.dtype == np.int32
    places = [tuple(place) for place in positions.tolist()]
    assert places == sorted(set(places))


@given(selections())
def test_places_are_allowed(selection):
    frames, grid, config, scores = selection
    lattice = np.zeros(grid.shape, bool)
    lattice[tuple(select_patches(frames, grid, config, scores).T)] = True
    block = config.block
    blocks = lattice.reshape(len(lattice), grid.grid_h // block, block, grid.grid_w // block, block)
    assert np.array_equal(blocks.any((2, 4)), blocks.all((2, 4)))  # whole blocks
    shows_picture = grid.content.reshape(blocks.shape[1:]).any((1, 3))
    if config.padding == "exclude":
        assert not blocks.any((2, 4))[:, ~shows_picture].any()
    if config.first_frame == "full" and config.policy != "uniform":
        allowed = shows_picture if config.padding == "exclude" else np.ones_like(shows_picture)
        assert np.array_equal(blocks.all((2, 4))[0], allowed)


@given(selections())
def test_same_input_gives_the_same_bytes(selection):
    frames, grid, config, scores = selection
    first = select_patches(frames, grid, config, scores)
    again = select_patches(frames.copy(), grid, config, scores.copy())
    assert first.tobytes() == again.tobytes()


@given(selections(policies=("coverage", "energy", "random")), st.integers(0, 10**6))
def test_budgets_are_nested(selection, seed):
    """A larger budget keeps everything that a smaller one keeps."""
    frames, grid, config, scores = selection
    least, _ = _limits(grid, config)
    units = np.random.default_rng(seed).integers(least // config.block**2, config.num_patches // config.block**2 + 1)
    smaller = SelectionConfig(**{**vars(config), "num_patches": int(units) * config.block**2})
    few, many = (select_patches(frames, grid, choice, scores).tolist() for choice in (smaller, config))
    assert set(map(tuple, few)) <= set(map(tuple, many))


@given(selections(policies=("energy",)))
def test_energy_keeps_the_highest_scores(selection):
    frames, grid, config, scores = selection
    block = config.block
    if config.padding == "zero":
        scores = np.where(grid.valid, scores, -1e-4)
    units = scores.reshape(len(scores), grid.grid_h // block, block, grid.grid_w // block, block)
    units = units.astype(np.float64).sum((2, 4))
    kept = np.zeros(grid.shape, bool)
    kept[tuple(select_patches(frames, grid, config, scores).T)] = True
    kept = kept[:, ::block, ::block]
    free = np.ones_like(kept)
    if config.padding == "exclude":
        free[:] = grid.content.reshape(units.shape[1], block, units.shape[2], block).any((1, 3))
    free[0] &= config.first_frame != "full"
    if (kept & free).any() and (~kept & free).any():
        assert units[kept & free].min() >= units[~kept & free].max() - 1e-9


def test_uniform_keeps_whole_frames_evenly(clips):
    frames = clips.pan(16, 32, 32)
    grid = make_grid(16, clip_from_frames(frames, size=32).placement, 8)
    positions = select_patches(frames, grid, SelectionConfig(patch_size=8, num_patches=4 * 16, policy="uniform"))
    assert np.bincount(positions[:, 0]).tolist() == [16, 0, 0, 0, 0, 16, 0, 0, 0, 0, 16, 0, 0, 0, 0, 16]
    positions = select_patches(frames, grid, SelectionConfig(patch_size=8, num_patches=20, policy="uniform"))
    assert np.bincount(positions[:, 0])[[0, 15]].tolist() == [16, 4]


def test_random_follows_its_seed(clips):
    frames = clips.pan(8, 32, 32)
    grid = make_grid(8, clip_from_frames(frames, size=32).placement, 8)
    kept = [
        select_patches(frames, grid, SelectionConfig(patch_size=8, num_patches=40, policy="random", seed=seed))
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[0], kept[2])


def test_still_video_keeps_fewer_with_a_least_error(clips):
    frames = np.repeat(clips.texture(32, 32)[None], 8, 0)
    frames[5, :8, :8] ^= 128
    grid = make_grid(8, clip_from_frames(frames, size=32).placement, 8)
    for policy in WEIGHING:
        config = SelectionConfig(patch_size=8, num_patches=60, policy=policy, stop_below_error=5.0)
        positions = select_patches(frames, grid, config)
        changes = [place for place in positions.tolist() if place[0]]
        expected = {
            "replenish": [[5, 0, 0], [6, 0, 0]],
            "rate_distortion": [[5, 0, 0], [6, 0, 0]],
            "coverage": [[5, 0, 0]],
        }
        assert changes == expected[policy]


def test_quality_order_on_a_moving_scene(clips):
    """Hold PSNR: random and uniform < replenish <= rate_distortion."""
    frames = clips.square(16, 96, 160)
    frames[:, 80:] = np.where(np.arange(16)[:, None, None, None] % 5 == 0, 140, frames[:, 80:])
    clip = clip_from_frames(frames, size=160)
    grid = make_grid(16, clip.placement, 16)
    first = int(grid.content.sum())
    for budget in (2 * first, 4 * first):
        psnr = {
            policy: hold_psnr(
                clip.frames,
                grid,
                select_patches(clip.frames, grid, SelectionConfig(num_patches=budget, policy=policy)),
            )
            for policy in ("random", "uniform", "replenish", "rate_distortion")
        }
        assert max(psnr["random"], psnr["uniform"]) < psnr["replenish"] <= psnr["rate_distortion"] + 1e-9


REFUSED = {
    "too many": ({"num_patches": 1000}, r"num_patches=1000 can't be met: 4 frames of 16 patches allow 16 to 64"),
    "first frame": ({"num_patches": 8}, r"num_patches=8 can't be met: .* allow 16 to 64; first_frame=\"selected\""),
    "few blocks": (
        {"num_patches": 12, "block": 2},
        "num_patches=12 can't be met: 4 frames of 16 patches allow 16 to 64",
    ),
    "no energy": ({"num_patches": 20, "policy": "energy"}, "policy 'energy' needs patch_scores"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_budgets_that_cannot_be_met_are_refused(case):
    options, message = REFUSED[case]
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    grid = make_grid(4, clip_from_frames(frames, size=32).placement, 8)
    with pytest.raises(ValueError, match=message):
        select_patches(frames, grid, SelectionConfig(**{"patch_size": 8, **options}))


def test_allow_fewer_keeps_everything():
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    grid = make_grid(4, clip_from_frames(frames, size=32).placement, 8)
    config = SelectionConfig(patch_size=8, num_patches=1000, allow_fewer=True)
    assert fit_budget(grid, config) == 64
    assert len(select_patches(frames, grid, config)) == 64


def test_scores_of_another_shape_are_refused():
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    grid = make_grid(4, clip_from_frames(frames, size=32).placement, 8)
    config = SelectionConfig(patch_size=8, num_patches=20, policy="energy")
    with pytest.raises(ValueError, match=r"patch_scores must be \(4, 4, 4\), got \(4, 4, 5\)"):
        select_patches(frames, grid, config, np.zeros((4, 4, 5), np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, "policy must be one of .*replenish.*got 'best'"),
        ({"block": 3}, r"block must be one of \(1, 2\), got 3"),
        ({"first_frame": "none"}, "first_frame must be one of .*got 'none'"),
        ({"padding": "keep"}, "padding must be one of .*got 'keep'"),
        ({"num_patches": 0}, "num_patches must be at least 1, got 0"),
        ({"num_patches": -8}, "num_patches must be at least 1, got -8"),
        ({"num_patches": 100.0}, "num_patches must be a whole number, got 100.0"),
        ({"patch_size": "16"}, "patch_size must be a whole number, got '16'"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"block": 2, "num_patches": 10}, "num_patches=10 is no multiple of 4, as block=2 needs"),
        ({"motion_weight": -1.0}, "motion_weight must be a number from 0 on, got -1.0"),
        ({"motion_weight": float("nan")}, "motion_weight must be a number from 0 on, got nan"),
        ({"stop_below_error": float("inf")}, "stop_below_error must be a number from 0 on, got inf"),
        ({"policy": "random", "stop_below_error": 3.0}, "stop_below_error=3.0 has no meaning for policy 'random'"),
        ({"policy": "energy", "motion_weight": 1.0}, "motion_weight=1.0 has no meaning for policy 'energy'"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**options)


def test_grids_that_blocks_do_not_divide_are_refused():
    frames = np.zeros((2, 24, 24, 3), np.uint8)
    grid = make_grid(2, clip_from_frames(frames, size=24).placement, 8)
    with pytest.raises(ValueError, match="a grid of 3x3 patches can't be cut into 2x2 blocks"):
        select_patches(frames, grid, SelectionConfig(patch_size=8, num_patches=12, block=2))
