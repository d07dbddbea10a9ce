# SPDX-License-Identifier: Apache-2.0
"""Pictures of a selection: colours where patches are kept, shapes for any video, files whole or not at all."""

import errno
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from codec_datasets import SelectionConfig, clip_from_frames, select_clip
from codec_datasets.show import draw_selection, draw_stages, frame_milliseconds, save_picture, short_name

ORANGE = (213, 94, 0)


def moving_square(num_frames: int, height: int, width: int) -> np.ndarray:
    """`(T, H, W, 3)`: a red square that moves over blue-green texture."""
    rng = np.random.default_rng(0)
    ground = rng.integers(60, 120, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    ground[..., 0] = 20
    frames = np.stack([ground] * num_frames)
    for t, frame in enumerate(frames):
        left = 8 * t % (width - 16)
        frame[16:32, left : left + 16] = (250, 10, 10)
    return frames


def make_clip(num_frames=16, height=64, width=128):
    clip = clip_from_frames(moving_square(num_frames, height, width), size=128)
    return replace(clip, pts_seconds=clip.pts_seconds / 8)


def select(clip, **options):
    return select_clip(clip, SelectionConfig(**{"num_patches": 60, "allow_fewer": True, **options}))


def count(picture: Image.Image, colour: tuple) -> int:
    return int((np.asarray(picture) == colour).all(-1).sum())


def test_selection_picture_is_rgb_of_fixed_width():
    picture = draw_selection(clip := make_clip(), select(clip))
    assert picture.mode == "RGB"
    assert picture.width == 1280


def test_kept_patches_are_coloured_and_dropped_ones_grey():
    clip = make_clip()
    few, all_patches = select(clip), select(clip, num_patches=10**6)
    assert len(all_patches.patches) == 16 * 32

    def saturated(selection):
        pixels = np.asarray(draw_selection(clip, selection))[104:360].astype(int)
        return int((np.ptp(pixels, axis=-1) > 60).sum())

    assert saturated(all_patches) > 3 * saturated(few) > 0


def test_a_crushing_first_frame_is_broken_and_labelled():
    clip = make_clip()
    assert count(draw_selection(clip, select(clip)), ORANGE) > 100  # 32 patches, then a few each
    assert count(draw_selection(clip, select(clip, policy="uniform", num_patches=64)), ORANGE) == 0


@pytest.mark.parametrize(("height", "width"), [(64, 128), (128, 64), (96, 96), (16, 256), (256, 16)])
def test_every_shape_can_be_drawn(height, width):
    clip = (
        make_clip(5, height, width)
        if min(height, width) > 16
        else clip_from_frames(np.full((5, height, width, 3), 90, np.uint8), size=128)
    )
    selection = select(clip, num_patches=80)
    assert draw_selection(clip, selection).width == 1280
    stages = draw_stages(clip, selection)
    assert len(stages) == 5
    assert len({stage.size for stage in stages}) == 1
    assert max(stages[0].size) <= 1000


@pytest.mark.parametrize("seconds", [(7.0,), (3.0, 3.0, 3.0), (0.0, 0.001, 900.0)])
def test_any_timestamps_can_be_drawn(seconds):
    clip = clip_from_frames(moving_square(len(seconds), 64, 64), size=64, pts_seconds=np.array(seconds))
    selection = select(clip)
    draw_selection(clip, selection)
    assert len(draw_stages(clip, selection)) == len(seconds)
    assert 60 <= frame_milliseconds(clip.pts_seconds) <= 400


@pytest.mark.parametrize(
    "options", [{"padding": "zero"}, {"first_frame": "selected"}, {"block": 2}, {"policy": "random"}]
)
def test_every_kind_of_selection_can_be_drawn(options):
    clip = make_clip()
    selection = select(clip, num_patches=100, **options)
    draw_selection(clip, selection)
    draw_stages(clip, selection)


def test_saliency_panel_is_dark_where_nothing_changes():
    frames = np.full((4, 64, 128, 3), 100, np.uint8)
    frames[2:, :32, :32] = 255
    clip = clip_from_frames(frames, size=128)
    stages = draw_stages(clip, select(clip, num_patches=32, first_frame="full"))
    panel = (slice(212, 362), slice(10, 314))  # third of four panels of 304 x 152
    still, changed = (np.asarray(stages[t])[panel].astype(int) for t in (1, 2))
    assert still.max() < 30
    assert changed[:60, :60].max() > 150
    assert changed[90:, 100:].max() < 30


def test_selection_of_other_frames_is_refused():
    clip = make_clip()
    with pytest.raises(ValueError, match="made from other frames"):
        draw_selection(make_clip(num_frames=9), select(clip))
    with pytest.raises(ValueError, match="made from other frames"):
        draw_stages(make_clip(num_frames=9), select(clip))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "A.GIF"])
def test_animations_are_saved_with_their_pace(tmp_path, name):
    clip = make_clip()
    stages = draw_stages(clip, select(clip))
    save_picture(stages, tmp_path / name, 120)
    with Image.open(tmp_path / name) as stored:
        assert stored.n_frames == len(stages)
        assert stored.size == stages[0].size
        stored.seek(1)
        stored.load()
        assert stored.info["duration"] == 120
        shown = np.asarray(stored.convert("RGB")).astype(int)
    assert np.abs(shown - np.asarray(stages[1])).mean() < 6  # 255 colours, or lossy compression
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_gif_keeps_the_paper_white(tmp_path):
    clip = make_clip()
    stages = draw_stages(clip, select(clip))
    save_picture(stages, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as stored:
        for t in (0, 7, 15):
            stored.seek(t)
            white = (np.asarray(stages[t]) == 255).all(-1)
            assert (np.asarray(stored.convert("RGB"))[white] == 255).all()


def test_still_is_saved_losslessly(tmp_path):
    clip = make_clip()
    picture = draw_selection(clip, select(clip))
    save_picture(picture, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert np.array_equal(np.asarray(stored), np.asarray(picture))


def test_suffix_must_fit_the_picture(tmp_path):
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=r"a still picture needs a name that ends in \.png"):
        save_picture(picture, tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"an animation needs a name that ends in \.gif or \.webp"):
        save_picture([picture], tmp_path / "a.png")


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    target.write_bytes(b"old")

    def fill_up(self, file, **options):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_up)
    with pytest.raises(OSError, match="No space left"):
        save_picture(Image.new("RGB", (8, 8)), target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_saving_to_a_missing_folder_raises(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "missing" / "a.png")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/videos/clip.mp4", "clip.mp4"),
        ("Éléphant.mp4", "Elephant.mp4"),
        ("日本.mp4", "??.mp4"),
        ("a" * 60 + "_end_of_name.mp4", "a" * 27 + "...nd_of_name.mp4"),
    ],
)
def test_names_fit_the_caption(name, shown):
    assert short_name(name) == shown


@pytest.mark.parametrize(
    ("seconds", "count", "milliseconds"), [(11.6, 64, 180), (3600, 64, 190), (0.5, 30, 60), (9, 4, 400)]
)
def test_animation_pace(seconds, count, milliseconds):
    assert frame_milliseconds(np.linspace(0, seconds, count)) == milliseconds
