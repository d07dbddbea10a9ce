# SPDX-License-Identifier: Apache-2.0
"""Damaged and unusual files end in the right frames or in one `VideoError` that names file, stage and cure."""

import re

import numpy as np
import pytest
from PIL import Image

from codec_datasets import VideoError, read_clip, select_video

POLICY = pytest.mark.parametrize("policy", ["replenish", "energy"])
SMALL = {"num_frames": 8, "size": 96, "num_patches": 100}


def _refused(path, stage, reason, policy="replenish"):
    """The message holds path, stage, reason and an advice; nothing but VideoError comes out."""
    with pytest.raises(VideoError) as caught:
        select_video(path, policy=policy, **SMALL)
    error = caught.value
    assert (error.path, error.stage) == (str(path), stage)
    assert re.search(reason, error.reason), error.reason
    assert len(error.advice) > 10
    assert str(error) == f"{error.path}: {error.stage}: {error.reason}. {error.advice}"


def _accepted(path, policy, num_frames=None):
    selection = select_video(path, policy=policy, **SMALL)
    assert len(selection.patches) == SMALL["num_patches"]
    assert (np.diff(selection.pts_seconds) >= 0).all()
    if num_frames is not None:
        assert selection.video.num_frames == num_frames
    return selection


def _overwritten(clips, name, source, seed=0):
    """A copy with a sixth of its bytes, in the middle, replaced by noise."""
    content = bytearray(source.read_bytes())
    start, length = len(content) // 2, len(content) // 6
    content[start : start + length] = np.random.default_rng(seed).bytes(length)
    return clips.bytes(name, bytes(content))


def _flipped(clips, name, source, seed=0):
    """A copy with one byte in 200 of its last three quarters inverted."""
    content = bytearray(source.read_bytes())
    for at in np.random.default_rng(seed).integers(len(content) // 4, len(content) - 100, len(content) // 200):
        content[at] ^= 0xFF
    return clips.bytes(name, bytes(content))


@POLICY
def test_truncated_with_the_index_at_the_end(clips, moving_clip, policy):
    content = moving_clip.read_bytes()
    path = clips.bytes("cut.mp4", content[: len(content) * 2 // 3])
    _refused(path, "open", "not readable as video .*Invalid data", policy)


def test_no_index_at_all(clips, moving_clip):
    content = moving_clip.read_bytes()
    path = clips.bytes("no_moov.mp4", content[: content.find(b"moov") - 4])
    _refused(path, "open", "Invalid data")


@POLICY
def test_truncated_with_the_index_at_the_start_gives_what_is_there(clips, policy):
    whole = clips.write("fast.mp4", g=12, bf=2, mux={"movflags": "faststart"})
    path = clips.bytes("fast_cut.mp4", whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    clip = read_clip(path, 100, (96, 128), "resize")
    num_frames = clip.video.num_frames
    assert 10 < num_frames < 40
    whole_frames, _ = clips.decode(whole)
    shown = np.round(clip.pts_seconds * 25).astype(int)[:-3]  # the cut may damage the last pictures
    assert np.array_equal(clip.frames[:-3], whole_frames[shown])
    _accepted(path, policy, num_frames)


@pytest.mark.parametrize(
    ("name", "content"), [("empty.mp4", b""), ("text.mp4", b"hello\n" * 100), ("zeros.mkv", bytes(5000))]
)
def test_files_that_are_no_video(clips, name, content):
    _refused(clips.bytes(name, content), "open", "not readable as video")


def test_header_without_a_frame(clips):
    content = clips.write("header.mp4", g=12, mux={"movflags": "frag_keyframe+empty_moov"}).read_bytes()
    path = clips.bytes("header_only.mp4", content[: content.find(b"moof") - 4])
    _refused(path, "decode", "no picture could be decoded")


def test_audio_alone(clips):
    path = clips.folder / "audio.m4a"
    _write_audio(path)
    _refused(path, "probe", r"no video stream \(found: audio\)")


def _write_audio(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_animated_webp_is_unsupported(clips):
    images = [Image.fromarray(frame) for frame in clips.pan(4)]
    path = clips.folder / "animated.webp"
    images[0].save(path, save_all=True, append_images=images[1:])
    _refused(path, "decode", "no picture could be decoded")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp"])
def test_still_picture_is_a_clip_of_one_frame(clips, ending):
    path = clips.folder / f"still001.{ending}"
    Image.fromarray(clips.texture(96, 96)).save(path)
    selection = select_video(path, num_frames=8, size=96, num_patches=36)
    assert selection.frame_indices.tolist() == [0]
    assert selection.pts_seconds.tolist() == [0.0]
    assert selection.video.num_frames == 1


DAMAGED = {
    "damaged.mp4": {"mux": {"movflags": "faststart"}},
    "damaged.mkv": {},
    "damaged.flv": {},
    "damaged.ts": {},
    "damaged.avi": {},
    "damaged.h264": {},
    "damaged4.mp4": {"codec": "mpeg4", "mux": {"movflags": "faststart"}},
    "damaged2.mpg": {"codec": "mpeg2video"},
}


def _shortened(clips, name, source, seed=0):
    """A copy without a random tenth, or cut at a random place."""
    content, rng = source.read_bytes(), np.random.default_rng(seed)
    start = int(rng.integers(1, len(content)))
    end = start + len(content) // 10 if rng.integers(2) else len(content)
    return clips.bytes(name, content[:start] + content[end:])


@POLICY
@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", [_overwritten, _flipped, _shortened])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_damage_in_the_middle(clips, name, damage, policy, seed):
    path = damage(clips, f"{damage.__name__}{seed}_{name}", clips.write(name, g=12, bf=2, **DAMAGED[name]), seed)
    try:
        selection = select_video(path, policy=policy, **SMALL)
    except VideoError as caught:
        selection, error = None, caught
    if selection is None:
        assert (error.path, error.stage in ("open", "probe", "decode", "select")) == (str(path), True)
    else:
        assert len(selection.patches) == SMALL["num_patches"]
        assert (np.diff(selection.pts_seconds) >= 0).all()


@POLICY
def test_stream_that_appears_in_the_middle(clips, policy):
    silent = clips.write("silent.ts", g=12)
    other = clips.write("other.ts", clips.pan(20), codec="mpeg2video", g=12)
    joined = clips.bytes("joined.ts", silent.read_bytes() + silent.read_bytes() + other.read_bytes())
    selection = _accepted(joined, policy)
    assert selection.video.num_frames >= 80
    assert selection.pts_seconds[-1] > 3  # times start again in the file, not in the clip


@pytest.mark.parametrize("ending", ["ts", "h264"])
def test_size_change_in_the_middle(clips, ending):
    large = clips.write(f"large.{ending}", g=12)
    small = clips.write(f"small.{ending}", clips.pan(20, 64, 64), g=12)
    path = clips.bytes(f"change.{ending}", large.read_bytes() + small.read_bytes())
    _accepted(path, "replenish", 60)
    _refused(path, "select", "the picture size changes within the video", "energy")


@POLICY
@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 200), (200, 4), (18, 34)])
def test_tiny_and_narrow_pictures(clips, policy, height, width):
    path = clips.write(f"tiny{height}x{width}.mp4", clips.pan(12, height, width))
    selection = select_video(path, num_frames=8, size=96, num_patches=10**6, policy=policy, allow_fewer=True)
    assert len(selection.patches) == 8 * int(selection.grid.content.sum())


@POLICY
def test_one_pixel(clips, policy):
    path = clips.write("pixel.mkv", clips.pan(8, 1, 1), codec="ffv1", pix_fmt="gray")
    _accepted(path, policy, 8)
