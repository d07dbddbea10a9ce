# SPDX-License-Identifier: Apache-2.0
"""`Video file -> ClipPlan`: probe a file and decide which of its frames a clip takes.

A frame's index counts presentation order. Where timestamps can be trusted (mp4/mov, matroska/webm, flv with unique
pts) the packets are listed without decoding; everywhere else the pictures are counted by decoding them once.
"""

import logging
import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import av
import numpy as np

from .errors import VideoError

logger = logging.getLogger(__name__)

_TRUSTED_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv"}
_HIDDEN_PICTURE_CODECS = {"vp8"}  # packets that show nothing have timestamps of their own
RECOVERABLE = (av.FFmpegError, IndexError)  # demuxing raises IndexError when a stream appears in mid-file
_UNREADABLE = (OSError, av.error.ExitError)  # the disk or the connection fails, or is silent for too long
_MAX_BROKEN_PACKETS = 10_000  # an endless packet loop ends here
_TIMEOUT_SECONDS = 30
RE_ENCODE = "Check that the file plays; re-encoding it (ffmpeg -i IN -c:v libx264 OUT.mp4) usually helps"


class ReadError(Exception):
    """The disk or the connection failed, which is no fault of the video; `open_video` turns it into `VideoError`."""


@dataclass(frozen=True)
class VideoInfo:
    """Facts about the chosen video stream of a file.

    Attributes:
        path: as given.
        container: FFmpeg's format name.
        codec: FFmpeg's name of the format, such as `h264` or `av1`.
        pixel_format: of the decoded pictures.
        width, height: pixels, display orientation.
        rotation: degrees by which decoded pictures are turned counter-clockwise for display: 0, 90, 180 or 270.
        num_frames: pictures in presentation order.
        average_fps: frames per second, 0.0 where the file does not say.
        duration_seconds: last minus first timestamp plus one frame, 0.0 for a single untimed picture.
        stream_index: of the video stream in the container.
        is_seekable: frames are found by timestamp; otherwise the file is decoded in order.
    """

    path: str
    container: str
    codec: str
    pixel_format: str
    width: int
    height: int
    rotation: int
    num_frames: int
    average_fps: float
    duration_seconds: float
    stream_index: int
    is_seekable: bool


@dataclass(frozen=True)
class ClipPlan:
    """Which frames of a video a clip takes, known before any of them is decoded.

    Attributes:
        video: the file.
        frame_indices: `(T,)` int64, presentation order.
        pts: T timestamps in stream units, empty where the file is decoded in order.
        key_pts: sorted timestamps of all key frames.
        previous_pts: for each slot the timestamp of the frame just before, None for the first frame.
        is_timed: timestamps rise from picture to picture; where not, seconds are frame number over frame rate.
    """

    video: VideoInfo
    frame_indices: np.ndarray
    pts: tuple[int, ...] = ()
    key_pts: tuple[int, ...] = field(default=(), repr=False)
    previous_pts: tuple[int | None, ...] = field(default=(), repr=False)
    is_timed: bool = True


def probe_video(path: str | Path) -> VideoInfo:
    """Facts about a video, frame count included.

    Reads the whole packet list of seekable containers (about 4 µs per packet) or decodes the file once in others.

    Args:
        path: local file, `http(s)://` address, or any address fsspec can open.

    Raises:
        VideoError: if the file can't be opened or holds no decodable video.
    """
    return plan_clip(path, num_frames=1).video


def plan_clip(path: str | Path, num_frames: int = 64, repeat_short: bool = False) -> ClipPlan:
    """Choose `num_frames` uniformly spaced frames, first and last included: `int(linspace(0, N - 1, num_frames))`.

    Args:
        path: as in `probe_video`.
        num_frames: slots of the clip; a shorter video gives each of its frames once.
        repeat_short: give a shorter video `num_frames` slots by repeating frames (the published convention).

    Raises:
        ValueError: if `num_frames` is less than 1.
        VideoError: as in `probe_video`.
    """
    check_num_frames(num_frames)
    with open_video(path) as (container, stream):  # from the beginning: a seek would skip what starts before time 0
        index = _list_packets(container, stream)
    if index is None:
        return plan_in_order(path, num_frames, repeat_short)
    pts, key_pts = index
    with open_video(path) as (container, stream):
        first = _first_picture(path, container, stream)
        video = _describe(path, container, stream, first, len(pts), True, pts[-1] - pts[0])
    indices = sample_indices(len(pts), num_frames, repeat_short)
    return ClipPlan(
        video,
        indices,
        tuple(pts[i] for i in indices),
        tuple(key_pts),
        tuple(pts[i - 1] if i else None for i in indices),
    )


def check_num_frames(num_frames: int) -> None:
    """Refuse anything but a positive whole number."""
    if not isinstance(num_frames, int | np.integer) or num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames!r}")


def plan_in_order(path: str | Path, num_frames: int, repeat_short: bool = False) -> ClipPlan:
    """The same choice for a file without usable timestamps: its pictures are counted by decoding all of them."""
    with open_video(path) as (container, stream):
        first, pts = None, []
        for frame in decode_in_order(container, stream):
            first = first or frame
            pts.append(frame.pts)
        if first is None:
            raise VideoError(str(path), "decode", "no picture could be decoded", RE_ENCODE)
        is_timed = None not in pts and all(a < b for a, b in pairwise(pts))
        video = _describe(path, container, stream, first, len(pts), False, pts[-1] - pts[0] if is_timed else None)
    return ClipPlan(video, sample_indices(len(pts), num_frames, repeat_short), is_timed=is_timed)


def sample_indices(num_source_frames: int, num_frames: int, repeat_short: bool) -> np.ndarray:
    """`(T,)` int64 frame numbers, `T = num_frames` or fewer for short videos without repetition."""
    indices = np.linspace(0, num_source_frames - 1, num_frames).astype(np.int64)
    return indices if repeat_short else np.unique(indices)


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple]:
    """Yield `(container, stream)` of the best video stream, one decoding thread, PyAV errors translated."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a video is named by a str or Path, got {type(path).__name__}")
    name = str(path)
    with _open_container(name) as container:
        stream = _best_stream(container)
        if stream is None:
            kinds = ", ".join(sorted({_kind(stream) for stream in container.streams})) or "no streams"
            raise VideoError(name, "probe", f"no video stream (found: {kinds})", "Pass a file that holds video")
        if stream.codec_context is None:
            raise VideoError(name, "probe", "no decoder for its video stream", RE_ENCODE)
        codec = stream.codec_context
        codec.thread_type, codec.thread_count = "SLICE", 1  # frame threads corrupt exported motion vectors
        try:
            yield container, stream
        except ReadError as error:
            raise VideoError(
                name, "decode", f"reading failed ({error})", "Check the disk or the connection"
            ) from error


@contextmanager
def _open_container(name: str) -> Iterator:
    is_local = "://" not in name
    if is_local:
        _check_local_file(name)
    with ExitStack() as stack:
        try:
            if is_local:  # without `file:` FFmpeg takes what stands before a colon in a file name for a protocol
                source = av.open(f"file:{name}", timeout=_TIMEOUT_SECONDS)
            elif name.startswith(("http://", "https://")):
                source = av.open(name, timeout=_TIMEOUT_SECONDS)
            else:
                source = av.open(stack.enter_context(_RemoteFile(name)))
        except (av.FFmpegError, OSError, ValueError) as error:
            advice = RE_ENCODE if is_local else "Check the address, and that the file plays"
            raise VideoError(name, "open", f"not readable as video ({_reason(error)})", advice) from error
        with source:
            yield source


class _RemoteFile:
    """A file of an fsspec backend. Backends raise what their client libraries raise; here all of it is `OSError`."""

    def __init__(self, address: str) -> None:
        import fsspec

        self._file = self._guarded(lambda: fsspec.open(address, "rb").open())

    def __enter__(self) -> "_RemoteFile":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        return self._guarded(self._file.read, size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._guarded(self._file.seek, offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    @staticmethod
    def _guarded(function, *arguments):
        try:
            return function(*arguments)
        except OSError:
            raise
        except Exception as error:  # any client library's own type
            raise OSError(f"{type(error).__name__}: {error}") from error


def _check_local_file(name: str) -> None:
    if os.path.isdir(name):
        raise VideoError(name, "open", "is a directory", "Pass one video file")
    if not os.path.exists(name):
        raise VideoError(name, "open", "no such file", "Check the path")
    if not os.path.isfile(name):
        raise VideoError(name, "open", "is a pipe or a device", "Save it as a file first")
    if not os.access(name, os.R_OK):
        raise VideoError(name, "open", "no permission to read it", "Check its permissions")


def _reason(error: Exception) -> str:
    if isinstance(error, av.error.ExitError):
        return f"no data for {_TIMEOUT_SECONDS} seconds"
    return getattr(error, "strerror", None) or str(error)  # `strerror` goes without the path


def _kind(stream) -> str:
    return "cover art" if _is_attached_picture(stream) else stream.type


def _best_stream(container):
    """FFmpeg's best video stream; cover art only counts where nothing else is there to find."""
    best = container.streams.best("video")
    if best is None or not _is_attached_picture(best):
        return best
    others = [stream for stream in container.streams.video if not _is_attached_picture(stream)]
    return max(others, key=lambda stream: stream.width * stream.height, default=None)


def _is_attached_picture(stream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def packets(container, stream) -> Iterator[av.Packet]:
    """The stream's packets with data, reading on past broken ones.

    Raises:
        ReadError: if the disk or the connection fails.
    """
    broken = 0
    while broken < _MAX_BROKEN_PACKETS:
        try:
            for packet in container.demux(stream):
                if packet.size:
                    yield packet
            return
        except av.EOFError:
            return
        except _UNREADABLE as error:
            raise ReadError(_reason(error)) from error
        except RECOVERABLE as error:
            broken += 1
            logger.info("%s: skipped a broken packet: %s", container.name, error)


def seek(container, stream, pts: int) -> None:
    """Go to the key frame at `pts`.

    Raises:
        ReadError: where that is not possible, such as on a server that sends files only from the beginning.
    """
    try:
        container.seek(pts, stream=stream, backward=True)
    except (OSError, av.FFmpegError) as error:
        raise ReadError(_reason(error)) from error
    stream.codec_context.flush_buffers()


def decode_packet(codec, packet: av.Packet | None) -> list[av.VideoFrame]:
    """Decode one packet (None drains the decoder); a damaged one gives no picture."""
    try:
        return codec.decode(packet)
    except RECOVERABLE as error:
        logger.info("skipped an undecodable packet: %s", error)
        return []


def decode_in_order(container, stream) -> Iterator[av.VideoFrame]:
    """Every picture of the stream in presentation order."""
    for packet in packets(container, stream):
        yield from decode_packet(stream.codec_context, packet)
    yield from decode_packet(stream.codec_context, None)


def _first_picture(path: str | Path, container, stream) -> av.VideoFrame:
    """Decode the first picture: its size, format and rotation are what the decoder really gives."""
    for frame in decode_in_order(container, stream):
        return frame
    raise VideoError(str(path), "decode", "no picture could be decoded", RE_ENCODE)


def _list_packets(container, stream) -> tuple[array, list[int]] | None:
    """Sorted timestamps of all pictures and of the key frames, or None where timestamps can't be trusted."""
    if container.format.name not in _TRUSTED_CONTAINERS or stream.codec_context.name in _HIDDEN_PICTURE_CODECS:
        return None
    pts, key_pts = array("q"), []
    for packet in packets(container, stream):
        if packet.pts is None:
            return None
        if packet.is_keyframe:  # even one that an edit list hides: what follows is decoded from it
            key_pts.append(packet.pts)
        if not packet.is_discard:
            pts.append(packet.pts)
    ordered = array("q", sorted(pts))
    if not key_pts or not ordered or any(a == b for a, b in pairwise(ordered)):
        return None
    return ordered, sorted(key_pts)


def _rotation(frame: av.VideoFrame) -> int:
    """Quarter turns to the display orientation, in degrees counter-clockwise.

    FFmpeg reads the angle off the first row of the display matrix; a mirrored picture (front cameras) would end upside
    down. Where the matrix mirrors, its second column gives the turn that leaves the picture upright, though mirrored.
    """
    degrees = frame.rotation
    if "DISPLAYMATRIX" in frame.side_data:
        (a, b), (c, d) = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32).reshape(3, 3)[:2, :2].tolist()
        if a * d < b * c:
            degrees = -np.degrees(np.arctan2(b, d))
    return round(degrees / 90) * 90 % 360


def _describe(path, container, stream, first, num_frames: int, is_seekable: bool, ticks: int | None) -> VideoInfo:
    """`ticks`: last minus first timestamp, None where timestamps don't rise."""
    rotation = _rotation(first)
    height, width = (first.width, first.height) if rotation in (90, 270) else (first.height, first.width)
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    span = float(ticks * stream.time_base) if ticks is not None else (num_frames - 1) / fps if fps else 0.0
    return VideoInfo(
        path=str(path),
        container=container.format.name,
        codec=stream.codec_context.codec.canonical_name,
        pixel_format=first.format.name,
        width=width,
        height=height,
        rotation=rotation,
        num_frames=num_frames,
        average_fps=fps,
        duration_seconds=span + (1 / fps if fps and num_frames > 1 else 0.0),
        stream_index=stream.index,
        is_seekable=is_seekable,
    )
