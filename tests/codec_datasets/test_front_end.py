# SPDX-License-Identifier: Apache-2.0
"""The whole path: exact budgets on files, refusals before anything is decoded, storage."""

import numpy as np
import pytest

from codec_datasets import (
    POLICIES,
    Selection,
    SelectionConfig,
    VideoError,
    compute_signals,
    front_end,
    gather_patches,
    load_npz,
    make_grid,
    read_clip,
    score_patches,
    select_clip,
    select_patches,
    select_video,
    video,
)

EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES)


@EVERY_POLICY
@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("padding", ["exclude", "zero"])
def test_every_policy_gives_the_exact_budget(moving_clip, policy, block, padding):
    selection = select_video(
        moving_clip,
        num_frames=10,
        size=128,
        patch_size=8,
        num_patches=600,
        policy=policy,
        block=block,
        padding=padding,
    )
    assert selection.patches.shape == (600, 8, 8, 3)
    assert selection.patch_positions.shape == (600, 3)
    assert selection.patches_per_frame.sum() == 600
    assert len(selection.patches_per_frame) == 10
    frames = read_clip(moving_clip, 10, 128).frames
    assert np.array_equal(selection.patches, gather_patches(frames, selection.patch_positions, 8))


def test_one_call_is_the_stages_in_a_row(moving_clip):
    options = {"patch_size": 8, "num_patches": 500, "policy": "energy"}
    selection = select_video(moving_clip, num_frames=10, size=128, **options)
    clip = read_clip(moving_clip, 10, 128, coded=True)
    scores = score_patches(compute_signals(clip), selection.grid, clip.placement)
    positions = select_patches(clip.frames, selection.grid, SelectionConfig(**options), scores)
    assert np.array_equal(selection.patch_positions, positions)
    from_clip = select_clip(clip, SelectionConfig(**options))
    assert np.array_equal(from_clip.patch_positions, positions)
    assert np.array_equal(from_clip.patches, selection.patches)


@pytest.mark.parametrize("clockwise", [90, 180, 270])
@pytest.mark.parametrize("policy", ["energy", "replenish"])
def test_selection_turns_with_the_picture(clips, square_clip, clockwise, policy):
    path = clips.turned(f"chosen{clockwise}.mp4", square_clip, clockwise)
    masks = []
    for name in (square_clip, path):
        selection = select_video(name, num_frames=12, size=160, num_patches=160, policy=policy)
        mask = np.zeros(selection.grid.shape, bool)
        mask[tuple(selection.patch_positions.T)] = True
        masks.append(mask)
    turned = np.rot90(masks[0], -clockwise // 90, axes=(1, 2))
    # ties at the cut fall elsewhere after turning
    assert (turned & masks[1]).sum() >= 0.95 * masks[0].sum()


@pytest.fixture
def nothing_is_decoded(monkeypatch):
    """Fails the test if frames of the clip are decoded."""
    monkeypatch.setattr(front_end, "decode_clip", lambda *args, **options: pytest.fail("frames were decoded"))


@pytest.fixture
def nothing_is_opened(monkeypatch, nothing_is_decoded):
    monkeypatch.setattr(video.av, "open", lambda *args, **options: pytest.fail("the file was opened"))


BEFORE_OPENING = {
    "too many": ({"num_patches": 289}, "num_patches=289 can't be met: .* hold 288"),
    "too many blocks": (
        {"num_patches": 400, "block": 2},
        "num_patches=400 can't be met",
    ),
    "one frame": (
        {"num_frames": 1, "num_patches": 37},
        "num_patches=37 can't be met: 1 frames .* hold 36",
    ),
    "odd blocks": ({"size": 80, "block": 2}, "a grid of 5x5 patches can't be cut into 2x2 blocks"),
    "threads": ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
    "seed": ({"seed": -1}, "seed can't be negative"),
    "size text": ({"size": "96"}, "size must be a positive number of pixels or a pair"),
    "frames fraction": ({"num_frames": 8.0}, "num_frames must be at least 1, got 8.0"),
    "frames 0": ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
    "frames negative": ({"num_frames": -3}, "num_frames must be at least 1, got -3"),
    "patches 0": ({"num_patches": 0}, "num_patches must be at least 1, got 0"),
    "patches negative": ({"num_patches": -4}, "num_patches must be at least 1, got -4"),
    "patch size 0": ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
    "size": ({"size": 100}, "size 100x100 is not divisible by patch_size 16; .*96x96"),
    "one side": ({"size": (96, 100)}, "size 96x100 is not divisible"),
    "size 0": ({"size": 0}, "size must be a positive number of pixels or a pair \(height, width\), got 0"),
    "blocks": ({"num_patches": 50, "block": 2}, "num_patches=50 is no multiple of 4, as block=2 needs"),
    "block": ({"block": 4}, r"block must be one of \(1, 2\), got 4"),
    "policy": ({"policy": "saliency"}, "policy must be one of .*got 'saliency'"),
    "fit": ({"fit": "stretch"}, "fit must be one of .*got 'stretch'"),
    "padding": ({"padding": "black"}, "padding must be one of .*got 'black'"),
    "first frame": ({"first_frame": "none"}, "first_frame must be one of .*got 'none'"),
    "error": ({"policy": "uniform", "stop_below_error": 2.0}, "stop_below_error=2.0 has no meaning"),
    "weight": ({"motion_weight": -2.0}, "motion_weight must be a number from 0 on, got -2.0"),
}


@pytest.mark.parametrize("case", BEFORE_OPENING)
def test_arguments_are_checked_before_the_file_is_opened(moving_clip, nothing_is_opened, case):
    options, message = BEFORE_OPENING[case]
    with pytest.raises(ValueError, match=message):
        select_video(moving_clip, **{"num_frames": 8, "size": 96, "num_patches": 100, **options})


BEFORE_DECODING = {
    "first frame": ({"num_patches": 29}, 'num_patches=29 can\'t be met: .*first_frame="selected" allows fewer'),
    "padding": ({"num_patches": 35, "padding": "zero"}, "num_patches=35 .* 8 frames of 36 patches allow 36 to 288"),
    "letterbox": (
        {"size": (96, 192), "num_patches": 570},
        "num_patches=570 .* 48 patches allow 48 to 384",
    ),
}


@pytest.mark.parametrize("case", BEFORE_DECODING)
def test_budgets_are_checked_before_frames_are_decoded(moving_clip, nothing_is_decoded, case):
    options, message = BEFORE_DECODING[case]
    with pytest.raises(VideoError, match=f"moving.mp4: select: {message}"):
        select_video(moving_clip, **{"num_frames": 8, "size": 96, **options})


def test_short_videos_allow_fewer(clips):
    path = clips.write("short.mp4", clips.pan(3))
    with pytest.raises(VideoError, match="3 frames of 36 patches allow 36 to 108; use allow_fewer=True"):
        select_video(path, size=96, fit="resize", num_patches=200)
    selection = select_video(path, size=96, fit="resize", num_patches=200, allow_fewer=True)
    assert selection.patches_per_frame.tolist() == [36, 36, 36]


def test_energy_repeats_short_videos_as_published(clips):
    path = clips.write("short.mp4", clips.pan(3))
    selection = select_video(path, num_frames=8, size=96, fit="resize", num_patches=200, policy="energy")
    assert selection.frame_indices.tolist() == [0, 0, 0, 0, 1, 1, 1, 2]


def test_still_video_keeps_fewer_with_a_least_error(clips):
    still = clips.write("still.mp4", clips.texture(96, 96)[None].repeat(20, 0))
    selection = select_video(still, num_frames=8, size=96, num_patches=200, stop_below_error=8.0)
    assert selection.patches_per_frame.tolist() == [36, 0, 0, 0, 0, 0, 0, 0]


def test_black_video_may_keep_nothing(clips):
    black = clips.write("black.mp4", np.zeros((8, 96, 96, 3), np.uint8))
    selection = select_video(
        black, num_frames=8, size=96, num_patches=200, stop_below_error=8.0, first_frame="selected"
    )
    assert selection.patches.shape == (0, 16, 16, 3)
    assert selection.patches_per_frame.tolist() == [0] * 8


def test_storage_gives_the_selection_back(moving_clip, tmp_path):
    selection = select_video(moving_clip, num_frames=8, size=np.int64(96), num_patches=np.int64(100), block=2)
    selection.save_npz(tmp_path / "selection.npz")
    stored = load_npz(tmp_path / "selection.npz")
    for name in ("patches", "patch_positions", "frame_indices", "pts_seconds"):
        assert np.array_equal(getattr(stored, name), getattr(selection, name))
        assert getattr(stored, name).dtype == getattr(selection, name).dtype
    for name in ("placement", "video", "config"):
        assert getattr(stored, name) == getattr(selection, name)
    assert np.array_equal(stored.grid.content, selection.grid.content)
    assert np.array_equal(stored.grid.valid, selection.grid.valid)
    assert stored.grid.shape == selection.grid.shape
    assert [path.name for path in tmp_path.iterdir()] == ["selection.npz"]


def test_other_files_are_no_selection(tmp_path):
    np.savez(tmp_path / "other.npz", patches=np.zeros(3))
    with pytest.raises(ValueError, match=r"other.npz: not a stored selection, config, content, .* missing"):
        load_npz(tmp_path / "other.npz")


def test_parts_must_fit_together(moving_clip):
    selection = select_video(moving_clip, num_frames=8, size=96, num_patches=100)
    parts = {**vars(selection)}
    with pytest.raises(ValueError, match="99 patches, but 100 positions"):
        Selection(**{**parts, "patches": selection.patches[:99]})
    with pytest.raises(ValueError, match="7 frame indices, but a grid of 8 frames"):
        Selection(**{**parts, "frame_indices": selection.frame_indices[:7]})
    assert repr(selection).startswith("Selection(patches=(100, 16, 16, 3), grid=(8, 6, 6), policy='replenish', pts_")


def test_energy_says_where_its_signals_come_from(moving_clip, tmp_path):
    options = {"num_frames": 10, "size": 96, "num_patches": 100}
    selection = select_video(moving_clip, policy="energy", **options)
    assert selection.signal_sources["motion"] == {"bitstream": 10}
    assert sum(selection.signal_sources["residual"].values()) == 10
    selection.save_npz(tmp_path / "a.npz")
    assert load_npz(tmp_path / "a.npz").signal_sources == selection.signal_sources
    assert select_video(moving_clip, **options).signal_sources is None


def test_frames_that_do_not_belong_to_the_grid_are_refused(moving_clip):
    clip = read_clip(moving_clip, 6, 96)
    grid = make_grid(6, clip.placement, 16)
    config = SelectionConfig(num_patches=100)
    for frames in (clip.frames / np.float32(255), clip.frames[:, :48], clip.frames[:5]):
        with pytest.raises(ValueError, match=r"frames must be \(6, 96, 96, 3\) uint8 for this grid"):
            select_patches(frames, grid, config)
    with pytest.raises(ValueError, match="the grid has patches of 16 px, the config of 8"):
        select_patches(clip.frames, grid, SelectionConfig(num_patches=100, patch_size=8))


def test_a_link_as_target_stays_a_link(moving_clip, tmp_path):
    (tmp_path / "link.npz").symlink_to(tmp_path / "target.npz")
    select_video(moving_clip, num_frames=4, size=96, num_patches=50).save_npz(tmp_path / "link.npz")
    assert (tmp_path / "link.npz").is_symlink()
    assert len(load_npz(tmp_path / "target.npz").patches) == 50
