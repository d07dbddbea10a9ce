# SPDX-License-Identifier: Apache-2.0
"""Frames found by seeking are those of decoding in order: pixels, times, vectors, references, any thread count."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from codec_datasets import probe_video, read_clip
from codec_datasets.clip import decode_clip
from codec_datasets.video import plan_in_order

GOP = {"g": 12, "bf": 2}
OPEN_GOP = {"g": 12, "bf": 3, "x264_params": "open-gop=1:b-pyramid=2:b-adapt=0:scenecut=0:keyint=12:min-keyint=12"}
OPEN_HEVC = "open-gop=1:keyint=12:min-keyint=12:bframes=4:b-adapt=0:scenecut=0:log-level=none"
VP9 = {"codec": "libvpx-vp9", "cpu-used": 8, "deadline": "realtime", "g": 12}
TIMES = np.cumsum(np.random.default_rng(0).integers(1, 9, 40)).tolist()
LATE = {"pts": [90_000 * 36_000 + 3600 * number for number in range(40)], "time_base": Fraction(1, 90_000), **GOP}
ALT_REF = {"codec": "libvpx-vp9", "auto-alt-ref": 1, "lag-in-frames": 16, "cpu-used": 5, "deadline": "good", "g": 20}
UNEVEN = {"pts": TIMES, "time_base": Fraction(1, 90), **GOP}

CASES = {
    "gops.mp4": GOP,
    "gops.mkv": GOP,
    "gops.flv": GOP,
    "open.mp4": OPEN_GOP,
    "open.mkv": OPEN_GOP,
    "open.flv": OPEN_GOP,
    "open265.mp4": {"codec": "libx265", "x265_params": OPEN_HEVC},
    "open265.mkv": {"codec": "libx265", "x265_params": OPEN_HEVC},
    "mpeg4.mp4": {"codec": "mpeg4", **GOP},
    "mpeg2.mkv": {"codec": "mpeg2video", **GOP},
    "sorenson.flv": {"codec": "flv", "g": 12},
    "vp9.webm": VP9,
    "vp9.mp4": VP9,
    "av1.mkv": {"codec": "libsvtav1", "preset": 12, "g": 12},
    "intra.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "short_gops.mp4": {"g": 2, "bf": 3},
    "one_gop.mp4": {"g": 250, "bf": 3},
    "refresh.mp4": {"x264_params": "intra-refresh=1:keyint=12"},
    "pieces.mp4": {"mux": {"movflags": "frag_keyframe+empty_moov"}, **GOP},
    "interlaced.mp4": {"flags": "+ildct+ilme", "x264_params": "interlaced=1", **GOP},
    "uneven.mp4": UNEVEN,
    "uneven.mkv": UNEVEN,
    "late.mp4": LATE,
    "late.mkv": LATE,
    "late.flv": LATE,
    "alt_ref.webm": ALT_REF,
    "alt_ref.mp4": ALT_REF,
    "hevc.flv": {"codec": "libx265", "x265_params": "keyint=12:log-level=none"},
    "mpeg4.3gp": {"codec": "mpeg4", "g": 12},
    "in_order.asf": {"codec": "wmv2", "g": 12},
    "in_order.mxf": {"codec": "mpeg2video", "g": 12},
    "in_order.vob": {"codec": "mpeg2video", "g": 12, "bf": 2},
    "in_order.ts": GOP,
    "in_order.avi": GOP,
    "in_order.h264": OPEN_GOP,
}
IN_ORDER = {"refresh.mp4"} | {
    name for name in CASES if name.startswith("in_order")
}  # no key frames, or no usable times


def _written(clips, name):
    return clips.write(name, **CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_every_frame_is_the_one_of_plain_decoding(clips, name):
    path = _written(clips, name)
    expected, seconds = clips.decode(path)
    for num_threads in (1, 3):
        clip = read_clip(path, num_frames=100, size=(96, 128), fit="resize", num_threads=num_threads)
        assert clip.video.is_seekable == (name not in IN_ORDER)
        assert clip.frame_indices.tolist() == list(range(40))
        assert np.array_equal(clip.frames, expected)
        if None not in seconds and seconds == sorted(seconds):
            assert clip.pts_seconds.tolist() == seconds


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_frames", [1, 2, 9, 23])
def test_sampled_frames_are_the_ones_of_plain_decoding(clips, name, num_frames):
    path = _written(clips, name)
    expected, _ = clips.decode(path)
    clip = read_clip(path, num_frames=num_frames, size=(96, 128), fit="resize", num_threads=2)
    assert clip.frame_indices.tolist() == [int(value) for value in np.linspace(0, 39, num_frames)]
    assert np.array_equal(clip.frames, expected[clip.frame_indices])


@pytest.mark.parametrize("name", CASES)
def test_bitstream_records_are_the_ones_of_decoding_in_order(clips, name):
    path = _written(clips, name)
    in_order = decode_clip(plan_in_order(path, 9), 48, coded=True)
    for num_threads in (1, 3):
        _assert_same_records(read_clip(path, 9, 48, coded=True, num_threads=num_threads), in_order)


def _assert_same_records(clip, expected):
    assert np.array_equal(clip.frames, expected.frames)
    for ours, theirs in zip(clip.coded, expected.coded, strict=True):
        assert ours.picture_type == theirs.picture_type
        assert ours.packet == theirs.packet
        for name in ("motion_vectors", "luma", "reference"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None), name
            assert a is None or _equal(a, b), name


def _equal(a, b):
    """Field by field: the padding of motion vector records is not initialised."""
    return (
        all(np.array_equal(a[field], b[field]) for field in a.dtype.names) if a.dtype.names else np.array_equal(a, b)
    )


@pytest.mark.parametrize("name", ["gops.mp4", "open.mkv", "mpeg4.mp4", "in_order.ts", "interlaced.mp4"])
def test_motion_vectors_are_the_ones_of_plain_decoding(clips, name):
    path = _written(clips, name)
    expected = clips.decode_vectors(path)
    clip = read_clip(path, 20, 48, coded=True, num_threads=3)
    assert sum(frame.motion_vectors is not None for frame in clip.coded) > 10
    for index, frame in zip(clip.frame_indices, clip.coded):
        assert (frame.motion_vectors is None) == (expected[index] is None)
        assert frame.motion_vectors is None or _equal(frame.motion_vectors, expected[index])


@pytest.mark.parametrize("name", ["gops.mp4", "in_order.ts", "in_order.avi"])
def test_each_packet_belongs_to_its_picture(clips, name):
    """A packet decoded alone shows the picture of an intra frame as it is."""
    clip = read_clip(_written(clips, name), 40, 48, coded=True)
    keys = [frame for frame in clip.coded if frame.picture_type == "I"]
    assert len(keys) >= 4
    sizes = {kind: np.mean([len(f.packet) for f in clip.coded if f.picture_type == kind]) for kind in "IP"}
    assert sizes["I"] > 2 * sizes["P"]


def test_uneven_times_are_kept(clips):
    for name in ("uneven.mp4", "uneven.mkv"):
        clip = read_clip(_written(clips, name), 40, 48)
        steps = np.diff(clip.pts_seconds)
        tolerance = 1e-9 if name.endswith("mp4") else 1.1e-3  # matroska counts milliseconds
        assert np.allclose(steps, np.diff(TIMES) / 90, atol=tolerance)


@pytest.mark.parametrize("num_hidden", [3, 5, 12, 13, 20])
def test_edit_lists_hide_frames(clips, num_hidden):
    """The track of a trimmed file starts later than its media, at or between key frames."""
    content = bytearray(_written(clips, "gops.mp4").read_bytes())
    at = content.find(b"elst") + 12
    duration, start, rate = struct.unpack(">iiI", content[at : at + 12])
    edit = struct.pack(">iiI", duration - 40 * num_hidden, start + 512 * num_hidden, rate)
    path = clips.bytes(f"trimmed{num_hidden}.mp4", bytes(content[:at] + edit + content[at + 12 :]))
    expected, seconds = clips.decode(path)
    assert len(expected) == 40 - num_hidden
    for num_frames in (7, 100):
        clip = read_clip(path, num_frames, (96, 128), "resize", num_threads=2)
        assert clip.video.is_seekable
        assert clip.video.num_frames == 40 - num_hidden
        assert np.array_equal(clip.frames, expected[clip.frame_indices])
        assert clip.pts_seconds.tolist() == [seconds[index] for index in clip.frame_indices]


@pytest.mark.parametrize("ending", ["mkv", "ts", "mp4", "h264"])
def test_recording_that_starts_between_key_frames(clips, ending):
    path = clips.folder / f"tuned_in.{ending}"
    with av.open(str(_written(clips, "gops.mp4"))) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in [packet for packet in source.demux(video=0) if packet.size][5:]:
            packet.stream = stream
            target.mux(packet)
    expected, _ = clips.decode(path)
    for num_frames in (7, 100):
        clip = read_clip(path, num_frames, (96, 128), "resize", num_threads=2)
        assert clip.video.num_frames == len(expected)
        assert np.array_equal(clip.frames, expected[clip.frame_indices])


def test_shared_clips_are_found_as_in_plain_decoding(clips, shared_video):
    video = probe_video(shared_video)
    wanted = [int(value) for value in np.linspace(0, video.num_frames - 1, 12)]
    expected, seconds = clips.decode(shared_video, set(wanted))
    assert video.num_frames == len(seconds)
    for num_threads in (1, 3):
        clip = read_clip(shared_video, 12, (video.height, video.width), "resize", num_threads=num_threads)
        assert clip.frame_indices.tolist() == sorted(set(wanted))
        assert np.array_equal(clip.frames, expected)
        assert clip.pts_seconds.tolist() == [seconds[index] for index in clip.frame_indices]


def test_shared_clips_have_the_vectors_of_plain_decoding(clips, shared_video):
    expected = clips.decode_vectors(shared_video)
    for num_threads in (1, 3):
        clip = read_clip(shared_video, 24, 64, coded=True, num_threads=num_threads)
        for index, frame in zip(clip.frame_indices, clip.coded):
            assert (frame.motion_vectors is None) == (expected[index] is None)
            assert frame.motion_vectors is None or _equal(frame.motion_vectors, expected[index])


@pytest.mark.parametrize("first_pts", [-35, -5, 7])
def test_frames_before_time_zero_count(clips, first_pts):
    path = clips.write(f"from{first_pts}.mkv", pts=list(range(first_pts, first_pts + 40)), **GOP)
    expected, _ = clips.decode(path)
    clip = read_clip(path, num_frames=100, size=expected.shape[1:3], fit="resize")
    assert clip.frame_indices.tolist() == list(range(len(expected)))
    assert np.array_equal(clip.frames, expected)
