# SPDX-License-Identifier: Apache-2.0
"""Fitted frames: letterbox, crop, rotation, odd sizes, depths and alpha; short videos; clips of given frames."""

import numpy as np
import pytest

from codec_datasets import Clip, VideoError, clip_from_frames, place_picture, read_clip
from codec_datasets import clip as clip_module

RED = np.array([250, 10, 10])


@pytest.fixture(scope="module")
def marked_clip(clips):
    """96 x 128, the upper left quarter red, the rest dark."""
    frames = np.full((10, 96, 128, 3), 20, np.uint8)
    frames[:, :48, :64] = RED
    return clips.write("marked.mp4", frames, crf=8)


def _is_red(region):
    return np.abs(region.astype(int).mean((0, 1)) - RED).max() < 25


def test_letterbox_is_black_around_the_picture(moving_clip):
    clip = read_clip(moving_clip, 4, 128)
    placement = place_picture(96, 128, 128)
    assert clip.placement == placement
    assert clip.frames.shape == (4, 128, 128, 3)
    outside = np.ones((128, 128), bool)
    outside[placement.content] = False
    assert (clip.frames[:, outside] == 0).all()
    assert (clip.frames[:, placement.top] > 0).all((1, 2)).all()


def test_fits_show_the_same_picture(clips, moving_clip):
    expected, _ = clips.decode(moving_clip)
    letterbox = read_clip(moving_clip, 3, (128, 128), "letterbox")
    crop = read_clip(moving_clip, 3, (96, 96), "crop")
    picture = expected[[0, 19, 39]]
    assert np.array_equal(letterbox.frames[(slice(None), *letterbox.placement.content)], picture)
    assert np.array_equal(crop.frames, picture[:, :, 16:112])


@pytest.mark.parametrize(
    ("matrix", "rotation"),
    [
        (((-1, 0), (0, 1)), 0),  # left and right exchanged
        (((1, 0), (0, -1)), 180),  # top and bottom exchanged
        (((0, 1), (1, 0)), 270),  # exchanged along the diagonal: the left column becomes the top row
    ],
)
def test_mirrored_pictures_stay_upright(clips, marked_clip, matrix, rotation):
    """The mirroring itself is not undone; what is shown on top is on top."""
    path = clips.transformed(f"mirrored{rotation}.mp4", marked_clip, matrix)
    clip = read_clip(path, 3, (128, 128), "resize")
    assert clip.video.rotation == rotation
    (_, b), (_, d) = matrix  # whether x and y point down (1) or up (-1)
    top, bottom = clip.frames[0, :64].mean(), clip.frames[0, 64:].mean()
    assert (top > bottom) == (b >= 0 and d >= 0)  # the marked quarter lies at the origin of x and y


@pytest.mark.parametrize(("clockwise", "corner"), [(90, "top right"), (180, "bottom right"), (270, "bottom left")])
def test_rotation_turns_the_picture(clips, marked_clip, clockwise, corner):
    path = clips.turned(f"turned{clockwise}.mp4", marked_clip, clockwise)
    clip = read_clip(path, 3, (128, 128), "resize")
    assert clip.video.rotation == 360 - clockwise
    assert (clip.video.height, clip.video.width) == ((96, 128) if clockwise == 180 else (128, 96))
    quarters = {
        f"{row} {column}": clip.frames[0, top : top + 48, left : left + 48]
        for row, top in (("top", 8), ("bottom", 72))
        for column, left in (("left", 8), ("right", 72))
    }
    assert [name for name, region in quarters.items() if _is_red(region)] == [corner]


@pytest.mark.parametrize("clockwise", [90, 180, 270])
def test_rotation_is_that_of_the_upright_frames(clips, moving_clip, clockwise):
    path = clips.turned(f"moving{clockwise}.mp4", moving_clip, clockwise)
    upright, turned = (read_clip(name, 5, 128) for name in (moving_clip, path))
    assert np.array_equal(turned.frames, np.rot90(upright.frames, -clockwise // 90, axes=(1, 2)))


FORMATS = {
    "odd444.mp4": {"pix_fmt": "yuv444p", "size": (201, 361)},
    "odd420.mkv": {"codec": "ffv1", "size": (201, 361)},
    "wide.mkv": {"codec": "ffv1", "size": (2, 2000)},
    "one_pixel.mkv": {"codec": "ffv1", "pix_fmt": "gray", "size": (1, 1)},
    "ten_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "ten_bit265.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "x265_params": "log-level=none"},
    "gray16.mkv": {"codec": "ffv1", "pix_fmt": "gray16le"},
    "rgb.mkv": {"codec": "libx264rgb", "pix_fmt": "rgb24"},
    "bgr.avi": {"codec": "rawvideo", "pix_fmt": "bgr24"},
    "full_range.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "moving.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "alpha.apng": {"codec": "apng", "pix_fmt": "rgba", "alpha": True},
    "alpha.mov": {"codec": "png", "pix_fmt": "rgba", "alpha": True},
    "alpha.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuva420p", "alpha": True, "deadline": "realtime"},
    "prores4444.mov": {"codec": "prores_ks", "pix_fmt": "yuva444p10le", "alpha": True},
    "interlaced.mp4": {"flags": "+ildct+ilme", "x264_params": "interlaced=1"},
}


def write_format(clips, name):
    options = dict(FORMATS[name])
    frames = clips.pan(12, *options.pop("size", (96, 128)))
    if options.pop("alpha", False):
        frames = np.concatenate([frames, np.full((*frames.shape[:3], 1), 120, np.uint8)], -1)
    return clips.write(f"format_{name}", frames, **options), frames


@pytest.mark.parametrize("name", FORMATS)
def test_formats_decode_to_their_picture(clips, name):
    path, frames = write_format(clips, name)
    clip = read_clip(path, 12, frames.shape[1:3], "resize", coded=True)
    expected, _ = clips.decode(path)
    assert clip.video.num_frames == 12
    assert (clip.video.height, clip.video.width) == frames.shape[1:3]
    assert np.array_equal(clip.frames, expected)
    assert {frame.luma.shape for frame in clip.coded} == {frames.shape[1:3]}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 63])
def test_short_videos_give_each_frame_once_or_repeat(clips, count):
    path = clips.write(f"short{count}.mp4", clips.pan(count, 48, 64), g=12, bf=2)
    once, repeated = read_clip(path, 64, 48), read_clip(path, 64, 48, repeat_short=True)
    assert once.frame_indices.tolist() == list(range(count))
    assert repeated.frame_indices.tolist() == [int(value) for value in np.linspace(0, count - 1, 64)]
    assert np.array_equal(repeated.frames, once.frames[repeated.frame_indices])
    assert np.array_equal(repeated.pts_seconds, once.pts_seconds[repeated.frame_indices])


def test_lost_frames_are_looked_for_in_order(moving_clip, monkeypatch):
    expected = read_clip(moving_clip, 9, 48)
    monkeypatch.setattr(clip_module, "_decode_by_seeking", lambda plan, sheet, num_threads: None)
    clip = read_clip(moving_clip, 9, 48)
    assert np.array_equal(clip.frames, expected.frames)
    assert not clip.video.is_seekable


def test_frames_lost_for_good_are_an_error(clips, monkeypatch):
    path = clips.write("lost.ts", clips.pan(12), g=12)
    monkeypatch.setattr(clip_module, "_decode_in_order", lambda plan, sheet: None)
    with pytest.raises(VideoError, match=r"lost.ts: decode: 9 of 9 frames were lost. Check that the file plays"):
        read_clip(path, 9, 48)


def test_given_frames_are_fitted_like_a_video(clips):
    frames = clips.pan(3, 48, 96)
    clip = clip_from_frames(frames, size=96)
    assert np.array_equal(clip.frames[:, 24:72], frames)
    assert (clip.frames[:, :24] == 0).all()
    assert clip.frame_indices.tolist() == [0, 1, 2]
    assert clip.pts_seconds.tolist() == [0.0, 1.0, 2.0]
    timed = clip_from_frames(frames, size=96, frame_indices=np.array([4, 8, 9]), pts_seconds=np.array([0.5, 1, 1.2]))
    assert timed.frame_indices.tolist() == [4, 8, 9]
    assert timed.pts_seconds.tolist() == [0.5, 1.0, 1.2]


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32), np.zeros((0, 8, 8, 3), np.uint8)],
    ids=["no colour", "float", "empty"],
)
def test_other_arrays_are_refused(frames):
    with pytest.raises(ValueError, match=r"frames must be \(T, H, W, 3\) uint8 and not empty"):
        clip_from_frames(frames, size=16)


def test_lengths_must_agree(clips):
    with pytest.raises(ValueError, match="3 frames, but 2 frame_indices and 2 pts_seconds"):
        clip_from_frames(clips.pan(3, 16, 16), size=16, frame_indices=np.arange(2))
    clip = clip_from_frames(clips.pan(3, 16, 16), size=16)
    with pytest.raises(ValueError, match="must have one length, got 3, 3, 1"):
        Clip(clip.frames, clip.frame_indices, np.zeros(1), clip.placement, clip.video)
    with pytest.raises(ValueError, match=r"frames must be \(T, H, W, 3\) uint8, got .* float64"):
        Clip(clip.frames / 2, clip.frame_indices, clip.pts_seconds, clip.placement, clip.video)


def test_repr_shows_shapes_and_times(moving_clip):
    assert repr(read_clip(moving_clip, 3, 48)).startswith("Clip(frames=(3, 48, 48, 3), pts_seconds=0.00..1.56, video=")
