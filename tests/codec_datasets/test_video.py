# SPDX-License-Identifier: Apache-2.0
"""Probing files and choosing frames: facts, counts without a frame count in the file, stream choice."""

import pickle
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_datasets import VideoError, probe_video
from codec_datasets.video import plan_clip, plan_in_order, sample_indices


def test_facts_of_a_plain_file(moving_clip):
    video = probe_video(moving_clip)
    assert (video.width, video.height, video.rotation, video.num_frames) == (128, 96, 0, 40)
    assert (video.codec, video.pixel_format, video.stream_index) == ("h264", "yuv420p", 0)
    assert video.average_fps == 25
    assert video.duration_seconds == pytest.approx(1.6)
    assert video.is_seekable
    assert video.path == str(moving_clip)


def test_str_and_path_are_the_same(moving_clip):
    assert probe_video(str(moving_clip)) == probe_video(Path(moving_clip))


UNCOUNTED = {
    "raw.h264": {},
    "stream.ts": {},
    "plain.avi": {},
    "plain.nut": {},
    "plain.mpg": {"codec": "mpeg2video"},
    "raw.hevc": {"codec": "libx265", "x265_params": "log-level=none"},
    "raw.ivf": {"codec": "libvpx-vp9", "cpu_used": 8, "deadline": "realtime"},
    "hidden.webm": {"codec": "libvpx", "auto-alt-ref": 1, "lag-in-frames": 10, "cpu-used": 8, "deadline": "good"},
    "moving.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


@pytest.mark.parametrize("name", UNCOUNTED)
def test_files_without_usable_timestamps_are_counted_by_decoding(clips, name):
    options = {key.replace("cpu_used", "cpu-used"): value for key, value in UNCOUNTED[name].items()}
    video = probe_video(clips.write(name, **options))
    assert not video.is_seekable
    assert video.num_frames == 40
    assert video.duration_seconds == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("name", "mux"), [("live.mkv", {"live": "1"}), ("pieces.mp4", {"movflags": "frag_keyframe+empty_moov"})]
)
def test_streamed_containers_are_counted_by_their_packets(clips, name, mux):
    video = probe_video(clips.write(name, mux=mux, g=12, bf=2))
    assert video.is_seekable
    assert video.num_frames == 40


def test_equal_timestamps_are_not_trusted(clips):
    path = clips.write("equal.mkv", clips.pan(12), codec="mpeg4", g=4)
    with av.open(str(path)) as source, av.open(str(clips.folder / "equal2.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream, packet.pts, packet.dts = stream, 0, 0
                target.mux(packet)
    plan = plan_clip(clips.folder / "equal2.mkv", 4)
    assert not plan.video.is_seekable
    assert not plan.is_timed
    assert plan.video.num_frames == 12


def test_times_that_do_not_rise_are_not_a_duration(clips):
    """avi stores no presentation times: pictures come out with times that jump back."""
    video = probe_video(clips.write("order.avi", g=12, bf=3))
    assert video.duration_seconds == pytest.approx(1.6)


def test_best_stream_is_chosen_not_the_first(clips):
    """FFmpeg takes the stream that the file marks as default, then the one of the highest bit rate."""
    path = clips.folder / "two.mp4"
    with av.open(str(path), "w") as container:
        streams = [_add_stream(container, height, width) for height, width in ((48, 64), (96, 128))]
        streams[1].disposition = av.stream.Disposition.default.value  # PyAV 15 takes numbers only
        for number, frames in enumerate((clips.pan(10, 48, 64), clips.pan(14))):
            _encode_all(container, streams[number], frames)
    video = probe_video(path)
    assert (video.stream_index, video.width, video.num_frames) == (1, 128, 14)


def test_cover_art_is_not_the_video(clips):
    path = clips.folder / "cover.mp4"
    _write_with_cover(path, clips, with_video=True)
    video = probe_video(path)
    assert (video.codec, video.width, video.num_frames) == ("h264", 128, 10)


def test_cover_art_alone_is_refused(clips):
    path = clips.folder / "cover_only.mp4"
    _write_with_cover(path, clips, with_video=False)
    with pytest.raises(VideoError, match=r"cover_only.mp4: probe: no video stream \(found: cover art\). Pass a file"):
        probe_video(path)


def _add_stream(container, height, width, codec="libx264", pix_fmt="yuv420p"):
    stream = container.add_stream(codec, rate=25)
    stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
    return stream


def _encode_all(container, stream, frames):
    for number, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, 25)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _write_with_cover(path, clips, with_video):
    with av.open(str(path), "w") as container:
        video = _add_stream(container, 96, 128) if with_video else None
        cover = _add_stream(container, 300, 300, "mjpeg", "yuvj420p")
        cover.disposition = av.stream.Disposition.attached_pic.value
        _encode_all(container, cover, clips.texture(300, 300)[None])
        if video is not None:
            _encode_all(container, video, clips.pan(10))


@given(st.integers(1, 5000), st.integers(1, 200))
def test_indices_are_the_published_choice(num_source_frames, num_frames):
    published = [int(value) for value in np.linspace(0, num_source_frames - 1, num_frames)]
    assert sample_indices(num_source_frames, num_frames, repeat_short=True).tolist() == published
    unique = sample_indices(num_source_frames, num_frames, repeat_short=False)
    assert unique.tolist() == sorted(set(published))
    if num_frames <= num_source_frames:
        assert len(unique) == num_frames


@pytest.mark.parametrize("num_frames", [0, -1])
def test_no_frames_are_refused_before_the_file_is_opened(num_frames):
    with pytest.raises(ValueError, match=f"num_frames must be at least 1, got {num_frames}"):
        plan_clip("does/not/exist.mp4", num_frames)


@pytest.mark.parametrize("name", ["moving.mp4", "moving.mkv", "moving.flv"])
def test_listing_packets_agrees_with_decoding(clips, name):
    path = clips.write(name, g=12, bf=2)
    listed, decoded = plan_clip(path, 17), plan_in_order(path, 17)
    assert listed.pts
    assert not decoded.pts
    assert np.array_equal(listed.frame_indices, decoded.frame_indices)
    assert listed.video.num_frames == decoded.video.num_frames
    assert listed.video.duration_seconds == pytest.approx(decoded.video.duration_seconds)


def test_previous_timestamps_precede(moving_clip):
    plan = plan_clip(moving_clip, 40)
    assert plan.previous_pts == (None, *plan.pts[:-1])


def test_video_error_survives_pickling():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "open", "no such file", "Check the path")))
    assert str(error) == "a.mp4: open: no such file. Check the path"
    assert (error.path, error.stage, error.reason, error.advice) == ("a.mp4", "open", "no such file", "Check the path")
