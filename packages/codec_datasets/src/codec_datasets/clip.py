# SPDX-License-Identifier: Apache-2.0
"""`ClipPlan -> Clip`: decode the chosen frames and little else.

Frames of a seekable file are grouped by the key frame before them; each group is decoded after a seek, without
pictures that nothing refers to. If a frame does not arrive (open GOPs, recovery points, damage), and in all other
containers, the file is decoded in order. Memory holds the sampled frames and what the decoder keeps, whatever the
length.
"""

import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from .bitstream import (
    MOTION_VECTOR_CODECS,
    is_non_reference,
    isolated_packets_work,
    luma_plane,
    motion_vector_records,
    nal_length_size,
)
from .errors import VideoError
from .grid import Fit, Placement, place_picture
from .video import (
    RE_ENCODE,
    ClipPlan,
    VideoInfo,
    decode_packet,
    open_video,
    packets,
    plan_clip,
    plan_in_order,
    seek,
)

logger = logging.getLogger(__name__)

_PICTURE_TYPES = {int(PictureType.I): "I", int(PictureType.P): "P", int(PictureType.B): "B"}
_YUV_FORMATS = {"yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p"}
_ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}  # older scalers have one anyway
Progress = Callable[[int, int], None]
_KEPT_PACKETS = 64  # longest wait between a packet and its picture when decoding in order


@dataclass(frozen=True)
class CodedFrame:
    """What the bitstream says about one sampled frame, source resolution, before rotation.

    Attributes:
        picture_type: `I`, `P`, `B` or `?`.
        motion_vectors: the decoder's records, None where it exports none.
        packet: the coded picture, empty where it is not needed.
        extradata: codec set-up that the packet needs.
        luma: `(H, W)` uint8.
        reference: `(H, W)` uint8 luma the frame is predicted from: the last reference picture shown before it for
            codecs that export vectors, the frame before it for others; None on key frames.
    """

    picture_type: str
    motion_vectors: np.ndarray | None
    packet: bytes
    extradata: bytes | None
    luma: np.ndarray
    reference: np.ndarray | None


@dataclass(frozen=True)
class Clip:
    """Sampled frames of one video, fitted to a fixed size.

    Attributes:
        frames: `(T, H, W, 3)` uint8 RGB, display order and orientation.
        frame_indices: `(T,)` int64 source frame numbers in presentation order.
        pts_seconds: `(T,)` float64 presentation times.
        placement: where the picture lies in the frame.
        video: the file.
        coded: T records of the bitstream if asked for, else empty.
    """

    frames: np.ndarray
    frame_indices: np.ndarray
    pts_seconds: np.ndarray
    placement: Placement
    video: VideoInfo
    coded: tuple[CodedFrame, ...] = ()

    def __post_init__(self) -> None:
        if self.frames.ndim != 4 or self.frames.shape[3] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(f"frames must be (T, H, W, 3) uint8, got {self.frames.shape} {self.frames.dtype}")
        if not len(self.frames) == len(self.frame_indices) == len(self.pts_seconds):
            raise ValueError(
                f"frames, frame_indices and pts_seconds must have one length, got "
                f"{len(self.frames)}, {len(self.frame_indices)}, {len(self.pts_seconds)}"
            )

    def __repr__(self) -> str:
        return (
            f"Clip(frames={self.frames.shape}, pts_seconds={self.pts_seconds[0]:.2f}..{self.pts_seconds[-1]:.2f}, "
            f"video={self.video.path!r})"
        )


def read_clip(
    path: str | Path,
    num_frames: int = 64,
    size: int | tuple[int, int] = 576,
    fit: Fit = "letterbox",
    *,
    coded: bool = False,
    repeat_short: bool = False,
    num_threads: int = 2,
) -> Clip:
    """Read uniformly sampled frames of a video, fitted to one size.

    Args:
        path: local file, `http(s)://` address, or any address fsspec can open.
        num_frames: frames to sample, first and last included; a shorter video gives all of its frames.
        size: side of the square frame in pixels, or `(height, width)`.
        fit: `letterbox` (black borders), `resize` (stretch) or `crop` (fill and cut).
        coded: keep what the bitstream says about each frame, for `compute_signals`.
        repeat_short: repeat frames of shorter videos up to `num_frames`.
        num_threads: parts of the file decoded at the same time; the result is the same for any number. Take 1 where
            several processes share the cores.

    Raises:
        ValueError: on arguments that no video can satisfy.
        VideoError: if the file can't be opened or decoded.
    """
    return decode_clip(plan_clip(path, num_frames, repeat_short), size, fit, coded=coded, num_threads=num_threads)


def decode_clip(
    plan: ClipPlan,
    size: int | tuple[int, int] = 576,
    fit: Fit = "letterbox",
    *,
    coded: bool = False,
    num_threads: int = 2,
    on_progress: Progress | None = None,
) -> Clip:
    """Decode the frames of a plan. Arguments as in `read_clip`; `on_progress(done, total)` is told of each frame."""
    video = plan.video
    sheet = _Sheet(plan, place_picture(video.height, video.width, size, fit), coded, on_progress)
    if plan.pts:
        try:
            _decode_by_seeking(plan, sheet, num_threads)
        except VideoError as error:  # such as a server that sends files only from the beginning
            logger.info("%s", error)
        if sheet.missing:
            logger.info("%s: %d frames did not arrive after seeking, decoding in order", video.path, sheet.missing)
            repeat_short = len(plan.frame_indices) > video.num_frames
            in_order = plan_in_order(video.path, len(plan.frame_indices), repeat_short)
            return decode_clip(in_order, size, fit, coded=coded, on_progress=on_progress)
    else:
        _decode_in_order(plan, sheet)
        if sheet.missing:
            raise VideoError(video.path, "decode", f"{sheet.missing} of {len(sheet)} frames were lost", RE_ENCODE)
    return sheet.clip()


def clip_from_frames(
    frames: np.ndarray,
    *,
    size: int | tuple[int, int] = 576,
    fit: Fit = "letterbox",
    frame_indices: np.ndarray | None = None,
    pts_seconds: np.ndarray | None = None,
) -> Clip:
    """A clip of frames that are already decoded.

    Args:
        frames: `(T, H, W, 3)` uint8 RGB.
        size, fit: as in `decode_clip`.
        frame_indices: `(T,)` source frame numbers, 0…T−1 if not given.
        pts_seconds: `(T,)` presentation times, equal to `frame_indices` if not given.

    Raises:
        ValueError: if shapes or lengths don't match.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames must be (T, H, W, 3) uint8 and not empty, got {frames.shape} {frames.dtype}")
    count, height, width = frames.shape[:3]
    placement = place_picture(height, width, size, fit)
    indices = np.arange(count) if frame_indices is None else np.asarray(frame_indices)
    seconds = indices if pts_seconds is None else np.asarray(pts_seconds)
    if not len(indices) == len(seconds) == count:
        raise ValueError(f"{count} frames, but {len(indices)} frame_indices and {len(seconds)} pts_seconds")
    video = VideoInfo("<frames>", "memory", "rawvideo", "rgb24", width, height, 0, count, 0.0, 0.0, 0, True)
    painter = _Painter(placement, 0)
    fitted = np.zeros((count, placement.height, placement.width, 3), np.uint8)
    for source, out in zip(frames, fitted):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(source), format="rgb24")
        painter.paint(frame, out)
    return Clip(fitted, indices.astype(np.int64), seconds.astype(np.float64), placement, video)


class _Painter:
    """Fits decoded pictures into frames; keeps the scaler's tables from one picture to the next."""

    def __init__(self, placement: Placement, rotation: int) -> None:
        self._placement, self._rotation = placement, rotation
        self._scaler, self._converter = VideoReformatter(), VideoReformatter()

    def paint(self, frame: av.VideoFrame, out: np.ndarray) -> None:
        """Scale a picture once, turn it, and write it into `out` `(H, W, 3)`.

        8-bit YUV is scaled as YUV and converted afterwards, which is quicker, and what comes out is nearest to
        published mosaics; all other formats go to RGB in one step.
        """
        height, width = self._placement.resized_height, self._placement.resized_width
        if self._rotation in (90, 270):
            height, width = width, height
        size = {"width": width, "height": height, "interpolation": "AREA", **_ONE_THREAD}
        to_rgb = {"format": "rgb24", "src_color_range": frame.color_range}  # PyAV 15 and 16 don't look at the frame's
        if frame.format.name in _YUV_FORMATS:
            rgb = self._converter.reformat(self._scaler.reformat(frame, **size), **to_rgb, **_ONE_THREAD)
        else:
            rgb = self._scaler.reformat(frame, **size, **to_rgb)
        out[self._placement.content] = np.rot90(rgb.to_ndarray(), self._rotation // 90)[self._placement.crop]


class _Sheet:
    """The frames of a clip while they arrive. Slots are disjoint between threads, so no lock is needed."""

    def __init__(self, plan: ClipPlan, placement: Placement, coded: bool, on_progress: Progress | None) -> None:
        self.plan, self.placement, self.coded, self._on_progress = plan, placement, coded, on_progress
        count = len(plan.frame_indices)
        self._frames = np.zeros((count, placement.height, placement.width, 3), np.uint8)
        self._seconds = np.full(count, np.nan)
        self._coded: list[CodedFrame | None] = [None] * count

    def __len__(self) -> int:
        return len(self._seconds)

    @property
    def missing(self) -> int:
        return int(np.isnan(self._seconds).sum())

    def put(self, slots: list[int], frame, coded: CodedFrame | None, time_base, painter: _Painter) -> None:
        first = slots[0]
        painter.paint(frame, self._frames[first])
        video = self.plan.video
        by_number = self.plan.frame_indices[first] / video.average_fps if video.average_fps else 0.0
        seconds = float(frame.pts * time_base) if self.plan.is_timed else by_number
        for slot in slots:
            self._frames[slot] = self._frames[first]
            self._coded[slot], self._seconds[slot] = coded, seconds
        if self._on_progress:
            self._on_progress(len(self) - self.missing, len(self))

    def clip(self) -> Clip:
        coded = tuple(frame for frame in self._coded if frame is not None)
        return Clip(self._frames, self.plan.frame_indices, self._seconds, self.placement, self.plan.video, coded)


class _CodedReader:
    """Collects what `CodedFrame` needs while pictures come out of the decoder."""

    def __init__(self, codec, wanted: bool) -> None:
        self.wanted, self._extradata = wanted, codec.extradata
        self._exports_vectors = codec.name in MOTION_VECTOR_CODECS
        self.needs_packet = wanted and codec.name == "h264" and isolated_packets_work()
        self.needs_previous = wanted and not self._exports_vectors
        # the MPEG-4 family attaches vectors when the packet after a picture is decoded, not when it is drained
        self.needs_next_packet = wanted and self._exports_vectors and codec.name != "h264"
        self._reference: av.VideoFrame | None = None
        if wanted and self._exports_vectors:
            codec.options = {"flags2": "+export_mvs"}  # must be set before the first decode

    def read(self, frame: av.VideoFrame, packet: bytes | None) -> CodedFrame | None:
        """Describe a sampled picture."""
        if not self.wanted:
            return None
        reference = None
        if not frame.key_frame and self._reference is not None and _same_size(self._reference, frame):
            reference = luma_plane(self._reference)
        return CodedFrame(
            _PICTURE_TYPES.get(int(frame.pict_type), "?"),
            motion_vector_records(frame) if self._exports_vectors else None,
            packet or b"",
            self._extradata,
            luma_plane(frame),
            reference,
        )

    def advance(self, frame: av.VideoFrame) -> None:
        """Note a picture that later ones may refer to."""
        if self.wanted and (self.needs_previous or frame.pict_type != PictureType.B):
            self._reference = frame


def _same_size(a: av.VideoFrame, b: av.VideoFrame) -> bool:
    return (a.width, a.height) == (b.width, b.height)


def _decode_by_seeking(plan: ClipPlan, sheet: _Sheet, num_threads: int) -> None:
    groups = _group_by_key_frame(plan)
    if num_threads <= 1 or len(groups) == 1:
        return _decode_groups(plan, groups, sheet)
    cuts = np.linspace(0, len(groups), min(num_threads, len(groups)) + 1).astype(int)
    parts = [groups[start:stop] for start, stop in pairwise(cuts)]
    with ThreadPoolExecutor(len(parts)) as pool:
        for done in [pool.submit(_decode_groups, plan, part, sheet) for part in parts]:
            done.result()


def _group_by_key_frame(plan: ClipPlan) -> list[tuple[int, list[int]]]:
    """`(key frame pts, pts wanted after it)` in file order."""
    groups: OrderedDict[int, list[int]] = OrderedDict()
    for pts in sorted(set(plan.pts)):
        at = max(bisect_right(plan.key_pts, pts) - 1, 0)
        groups.setdefault(plan.key_pts[at], []).append(pts)
    return list(groups.items())


def _decode_groups(plan: ClipPlan, groups: list[tuple[int, list[int]]], sheet: _Sheet) -> None:
    """Decode groups with a container of their own."""
    slots: dict[int, list[int]] = {}
    for slot, pts in enumerate(plan.pts):
        slots.setdefault(pts, []).append(slot)
    previous = dict(zip(plan.pts, plan.previous_pts))
    with open_video(plan.video.path) as (container, stream):
        reader = _CodedReader(stream.codec_context, sheet.coded)
        painter = _Painter(sheet.placement, plan.video.rotation)
        for key_pts, wanted in groups:
            targets = set(wanted)
            helpers = {previous[pts] for pts in wanted if pts > key_pts} if reader.needs_previous else set()
            for frame, packet in _decode_group(container, stream, key_pts, targets, helpers, reader):
                if frame.pts in targets:  # pictures of another group may come along, not always whole
                    sheet.put(slots[frame.pts], frame, reader.read(frame, packet), stream.time_base, painter)
                reader.advance(frame)


def _decode_group(
    container, stream, key_pts: int, wanted: set[int], helpers: set[int], reader: _CodedReader
) -> Iterator[tuple[av.VideoFrame, bytes | None]]:
    """Pictures from one key frame on until every wanted one is out, and `helpers`, the pictures shown before them."""
    codec = stream.codec_context
    length_size = nal_length_size(codec.name, codec.extradata)
    seek(container, stream, key_pts)
    needed = wanted | helpers
    unsent, unseen, payloads = set(needed), set(needed), {}
    for packet in packets(container, stream):
        if packet.pts in needed:
            unsent.discard(packet.pts)
            if reader.needs_packet:
                payloads[packet.pts] = bytes(packet)
        elif is_non_reference(codec.name, bytes(packet), length_size):
            continue
        for frame in decode_packet(codec, packet):
            unseen.discard(frame.pts)
            yield frame, payloads.pop(frame.pts, None)
        if not (unseen if reader.needs_next_packet else unsent):
            break
    for frame in decode_packet(codec, None):
        yield frame, payloads.pop(frame.pts, None)


def _decode_in_order(plan: ClipPlan, sheet: _Sheet) -> None:
    slots: dict[int, list[int]] = {}
    for slot, index in enumerate(plan.frame_indices):
        slots.setdefault(int(index), []).append(slot)
    with open_video(plan.video.path) as (container, stream):
        reader = _CodedReader(stream.codec_context, sheet.coded)
        painter = _Painter(sheet.placement, plan.video.rotation)
        for number, (frame, packet) in enumerate(_pictures_with_packets(container, stream, reader)):
            if number in slots:
                sheet.put(slots[number], frame, reader.read(frame, packet), stream.time_base, painter)
            reader.advance(frame)


def _pictures_with_packets(container, stream, reader: _CodedReader) -> Iterator[tuple[av.VideoFrame, bytes | None]]:
    """Every picture with the packet it came from; the two are matched by `opaque`, not by timestamp."""
    codec = stream.codec_context
    recent: OrderedDict[int, bytes] = OrderedDict()
    if reader.needs_packet:
        codec.flags |= av.codec.context.Flags.copy_opaque
    for number, packet in enumerate(packets(container, stream)):
        if reader.needs_packet:
            packet.opaque = (number,)  # an object of its own: PyAV keys opaque values by identity
            recent[number] = bytes(packet)
            if len(recent) > _KEPT_PACKETS:
                recent.popitem(last=False)
        for frame in decode_packet(codec, packet):
            yield frame, recent.get(frame.opaque[0]) if reader.needs_packet and frame.opaque else None
    for frame in decode_packet(codec, None):
        yield frame, recent.get(frame.opaque[0]) if reader.needs_packet and frame.opaque else None
