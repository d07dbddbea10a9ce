# SPDX-License-Identifier: Apache-2.0
"""What stock FFmpeg decoders reveal about a coded picture besides its pixels.

With `video.py` and `clip.py`, which read files, one of the three modules that touch PyAV. Everything here works on
single packets and pictures: which packets no other picture needs, the coded residual of one packet, the motion between
two pictures.
"""

import logging
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import av
import numpy as np
from av.video.frame import PictureType

logger = logging.getLogger(__name__)

MOTION_VECTOR_CODECS = frozenset(
    {"h264", "mpeg4", "mpeg1video", "mpeg2video", "h263", "h263p", "flv1", "flv", "msmpeg4v3", "msmpeg4v2", "wmv2"}
)
"""Decoders that export exact motion vectors."""

PAIR_QP = 26  # quantiser of the two-picture re-encoding: coarse enough that noise leaves no residual
_PAIR_LONGEST_SIDE = 576
_MID_GREY = 128


def has_codec(name: str, mode: str) -> bool:
    """Whether FFmpeg was built with this decoder (mode `r`) or encoder (mode `w`)."""
    try:
        av.Codec(name, mode)
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def nal_length_size(codec_name: str, extradata: bytes | None) -> int:
    """Bytes of the NAL length prefix, 0 for Annex-B start codes.

    Decided by the stream's extradata, never by a packet: a NAL of 256-511 bytes has the prefix `00 00 01 xx`, which
    looks like a start code.
    """
    if not extradata or extradata[0] != 1:
        return 0
    at = 4 if codec_name == "h264" else 21
    return (extradata[at] & 3) + 1 if len(extradata) > at else 0


def is_non_reference(codec_name: str, payload: bytes, length_size: int) -> bool:
    """True if no other picture is predicted from this one, so that it may be dropped before decoding.

    Reads `nal_ref_idc` (H.264) or the sub-layer non-reference NAL types (HEVC); False for every other codec.
    """
    if codec_name not in ("h264", "hevc"):
        return False
    at = 0 if length_size else payload.find(b"\0\0\1")
    while 0 <= at < len(payload) - max(length_size, 3):
        header = payload[at + (length_size or 3)]
        if codec_name == "h264" and header & 31 in (1, 5):
            return (header >> 5) & 3 == 0
        hevc_type = (header >> 1) & 63
        if codec_name == "hevc" and hevc_type < 32:
            return hevc_type <= 14 and hevc_type % 2 == 0
        step = length_size + int.from_bytes(payload[at : at + length_size], "big") if length_size else 0
        at = at + step if length_size else payload.find(b"\0\0\1", at + 3)
    return False


def luma_plane(frame: av.VideoFrame) -> np.ndarray:
    """`(H, W)` uint8 luma of a decoded picture, copied, deeper samples shifted down to 8 bits."""
    component = frame.format.components[0]
    is_luma_first = frame.format.name.startswith(("yuv", "gray", "nv", "p0")) and component.plane == 0
    if not is_luma_first or (not frame.format.is_planar and not frame.format.name.startswith("gray")):
        frame, component = frame.reformat(format="gray"), None
    bits = 8 if component is None else component.bits
    plane = frame.planes[0]
    if bits == 8:
        return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width].copy()
    samples = np.frombuffer(plane, np.uint16).reshape(-1, plane.line_size // 2)[: frame.height, : frame.width]
    return (samples >> (bits - 8)).astype(np.uint8)


def motion_vector_records(frame: av.VideoFrame) -> np.ndarray | None:
    """The decoder's motion vector records of one picture, copied, or None where it exported none (intra pictures)."""
    side_data = frame.side_data.get("MOTION_VECTORS")
    return None if side_data is None else side_data.to_ndarray().copy()


class IsolatedDecoder:
    """Decodes single packets without their references: luma is then `128 + coded residual` in every inter block.

    FFmpeg's H.264 decoder fills missing references with mid-grey, so sub-pixel positions, bi-prediction and several
    references drop out. This is behaviour, not a contract: `isolated_packets_work` tests it.
    """

    def __init__(self, codec_name: str, extradata: bytes | None) -> None:
        self._context = av.CodecContext.create(codec_name, "r")
        self._context.extradata, self._context.thread_count = extradata, 1
        self._context.options = {
            "flags2": "+showall",
            "flags": "+output_corrupt+low_delay",
            "skip_loop_filter": "all",
        }

    def decode_luma(self, payload: bytes) -> np.ndarray | None:
        """`(H, W)` uint8 luma of one packet decoded alone, or None if the decoder returned no picture."""
        try:
            frames = self._context.decode(av.Packet(payload)) + self._context.decode(None)
        except av.FFmpegError:
            frames = []
        self._context.flush_buffers()
        return luma_plane(frames[0]) if frames else None


@cache
def isolated_packets_work() -> bool:
    """Self-test of `IsolatedDecoder`, once per process; False is logged, as residuals are then estimated."""
    works = has_codec("libx264", "w") and _isolates_known_residual()
    if not works:
        logger.warning("this FFmpeg does not show the residual of single packets; it is estimated from the pictures")
    return works


def _isolates_known_residual() -> bool:
    """Of two pictures that differ in a brightened square, the second alone must be mid-grey with that square."""
    first = np.random.default_rng(0).integers(60, 190, (64, 64), dtype=np.uint8)
    changed = first.copy()
    changed[16:32, 16:32] = np.minimum(first[16:32, 16:32].astype(int) + 40, 255)
    packets, extradata = _encode_pair(first, changed)
    residual = IsolatedDecoder("h264", extradata).decode_luma(packets[-1])
    if len(packets) != 2 or residual is None or residual.shape != first.shape:
        return False
    difference = residual.astype(int) - _MID_GREY
    still = np.ones_like(first, bool)
    still[12:36, 12:36] = False
    return bool(np.abs(difference[still]).max() <= 2 and 30 <= difference[18:30, 18:30].mean() <= 48)


def _encode_pair(first: np.ndarray, second: np.ndarray) -> tuple[list[bytes], bytes | None]:
    """Encode two grey pictures `(H, W)`, sides multiples of 16, as I and P; returns the packets and extradata."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.height, encoder.width = first.shape
    encoder.pix_fmt, encoder.framerate, encoder.time_base = "gray", 25, Fraction(1, 25)
    encoder.thread_count = 1
    encoder.options = {
        "flags": "+global_header",  # parameter sets in the extradata, where the isolated decoder looks
        "preset": "ultrafast",
        "tune": "zerolatency",
        "qp": str(PAIR_QP),
        "x264-params": "scenecut=0:keyint=2:min-keyint=1:ref=1:bframes=0:weightp=0:threads=1",
    }
    packets = []
    for number, (picture, kind) in enumerate(((first, PictureType.I), (second, PictureType.P))):
        frame = av.VideoFrame.from_ndarray(picture, format="gray")
        frame.pts, frame.pict_type = number, kind  # without a set type x264 may choose another
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    return [bytes(packet) for packet in packets], encoder.extradata


def reduced_size(height: int, width: int) -> tuple[int, int]:
    """At most 576 px on the longest side, both sides multiples of 16: the size `encode_pair` works on."""
    scale = min(1.0, _PAIR_LONGEST_SIDE / max(height, width))
    return max(16, round(height * scale / 16) * 16), max(16, round(width * scale / 16) * 16)


def shrink_for_pair(luma: np.ndarray) -> np.ndarray:
    """Scale `(H, W)` uint8 luma to `reduced_size`."""
    height, width = reduced_size(*luma.shape)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(luma), format="gray")
    return luma_plane(frame.reformat(width=width, height=height, format="gray", interpolation="BILINEAR"))


def encode_pair(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray | None, bytes, bytes | None]:
    """Estimate motion between two pictures by letting x264 encode the second one from the first.

    Args:
        first, second: `(H, W)` uint8 luma, sides multiples of 16.

    Returns:
        motion vector records of the P picture (None if it has none), its packet, and the stream's extradata.
    """
    packets, extradata = _encode_pair(first, second)
    decoder = av.CodecContext.create("h264", "r")
    decoder.extradata, decoder.thread_count = extradata, 1
    decoder.options = {"flags2": "+export_mvs"}
    frames = [frame for payload in packets for frame in decoder.decode(av.Packet(payload))] + decoder.decode(None)
    return motion_vector_records(frames[-1]), packets[-1], extradata


@dataclass(frozen=True)
class DecoderReport:
    """What this FFmpeg can do.

    Attributes:
        libraries: library name to version.
        decoders, encoders: codec name to whether it is there.
        exports_motion_vectors: the H.264 decoder returned the known motion of a test picture.
        isolated_packets_work: result of the self-test of that name.
    """

    libraries: dict[str, tuple[int, ...]]
    decoders: dict[str, bool]
    encoders: dict[str, bool]
    exports_motion_vectors: bool
    isolated_packets_work: bool


def decoder_report() -> DecoderReport:
    """Look up the usual codecs and run the self-tests, for `codec-datasets doctor`."""
    decoders = {name: has_codec(name, "r") for name in ("h264", "hevc", "av1", "vp9", "vp8", "mpeg4", "mpeg2video")}
    encoders = {name: has_codec(name, "w") for name in ("libx264", "libx265", "libsvtav1", "libvpx-vp9", "mpeg4")}
    can_test = decoders["h264"] and encoders["libx264"]
    return DecoderReport(
        libraries=dict(av.library_versions),
        decoders=decoders,
        encoders=encoders,
        exports_motion_vectors=can_test and _finds_known_motion(),
        isolated_packets_work=can_test and isolated_packets_work(),
    )


def _finds_known_motion() -> bool:
    """A picture moved by 4 px to the right must come back with that vector nearly everywhere."""
    first = np.kron(np.random.default_rng(0).integers(40, 216, (16, 16), dtype=np.uint8), np.ones((8, 8), np.uint8))
    records, _, _ = encode_pair(first, np.roll(first, 4, axis=1))
    if records is None:
        return False
    across = records["motion_x"] / records["motion_scale"]
    moved = (across == -4) & (records["motion_y"] == 0)
    return bool(moved.mean() > 0.5)
