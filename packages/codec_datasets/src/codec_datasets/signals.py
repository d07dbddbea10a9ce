# SPDX-License-Identifier: Apache-2.0
"""`Clip -> Signals`: motion and residual of each sampled frame, from the bitstream where it tells, else estimated.

H.264 and the MPEG-4 family export exact motion vectors. The residual of H.264 comes from decoding each packet alone;
where the decoder does not allow that, from the difference to the motion-compensated reference. For all other codecs
(HEVC, VP8, VP9, AV1, ...) x264 encodes each frame from the one before it and both signals are taken from the result.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .bitstream import (
    IsolatedDecoder,
    encode_pair,
    has_codec,
    isolated_packets_work,
    reduced_size,
    shrink_for_pair,
)
from .clip import Clip, CodedFrame
from .errors import VideoError

CELL = 4
"""Side in pixels of the cells that motion vectors are given on."""

_TEXTURE_SHARE = 0.25  # least residual of a predicted block, as a share of its texture
_FREQUENT = 0.05  # share of the flat blocks that makes a grey level a background of an isolated picture
_BACKGROUND_RANGE = 40  # weighted prediction moves mid-grey by less than this

MotionSource = Literal["bitstream", "estimated", "none"]
ResidualSource = Literal["isolated", "compensated", "estimated", "texture"]


@dataclass(frozen=True)
class Signals:
    """What changed in each sampled frame, in decoding orientation.

    Attributes:
        motion_vectors: `(T, H // 4, W // 4, 4)` int16: L0 x, y, L1 x, y in whole pixels, source minus destination;
            0 where there is none. H, W are the source's, or those of the reduced picture where motion is estimated.
        residual: `(T, h, w)` float32 grey levels, every `stride`-th pixel of the same picture.
        picture_size: H, W.
        rotation: degrees by which pictures are turned counter-clockwise for display.
        stride: pixels between residual samples.
        motion_source: `bitstream`, `estimated` (two-picture encoding) or `none` (no frame has a predecessor).
        residual_source: for each frame `isolated`, `compensated`, `estimated` or `texture` (key frames).
    """

    motion_vectors: np.ndarray
    residual: np.ndarray
    picture_size: tuple[int, int]
    rotation: int
    stride: int
    motion_source: MotionSource
    residual_source: tuple[ResidualSource, ...]

    def __post_init__(self) -> None:
        if not len(self.motion_vectors) == len(self.residual) == len(self.residual_source):
            raise ValueError(
                f"motion_vectors {self.motion_vectors.shape}, residual {self.residual.shape} and "
                f"{len(self.residual_source)} sources must cover the same frames"
            )

    def __repr__(self) -> str:
        return f"Signals(motion_vectors={self.motion_vectors.shape}, residual={self.residual.shape}, {self.sources})"

    @property
    def sources(self) -> dict[str, dict[str, int]]:
        """Where the signals come from: for `motion` and `residual` the number of frames per source."""
        residual = {source: self.residual_source.count(source) for source in sorted(set(self.residual_source))}
        return {"motion": {self.motion_source: len(self.motion_vectors)}, "residual": residual}


def compute_signals(clip: Clip) -> Signals:
    """Motion vectors and residual of every frame of a clip.

    Args:
        clip: read with `coded=True`.

    Raises:
        ValueError: if the clip was read without its bitstream records.
        VideoError: if its frames differ in size.
    """
    if len(clip.coded) != len(clip.frames):
        raise ValueError(
            "the clip holds no bitstream records, which only its file has: read it with read_clip(..., coded=True), "
            "or pass the path to select_video"
        )
    if len({frame.luma.shape for frame in clip.coded}) > 1:
        reason = "the picture size changes within the video, so that its signals can't be compared"
        raise VideoError(clip.video.path, "select", reason, 'Use another policy than "energy"')
    exported = any(frame.motion_vectors is not None for frame in clip.coded)
    has_reference = any(frame.reference is not None for frame in clip.coded)
    if not exported and has_reference and not has_codec("libx264", "w"):
        reason = f"its codec {clip.video.codec} tells no motion, and estimating it needs the encoder libx264"
        raise VideoError(clip.video.path, "select", reason, 'Use the PyAV wheel, or another policy than "energy"')
    read_frame = _BitstreamReader(clip) if exported else _estimate_frame
    planes = [read_frame(frame) for frame in clip.coded]
    size = clip.coded[0].luma.shape if exported else reduced_size(*clip.coded[0].luma.shape)
    return Signals(
        np.stack([vectors for vectors, _, _ in planes]),
        np.stack([residual for _, residual, _ in planes]),
        size,
        clip.video.rotation,
        residual_stride(max(size)),
        "bitstream" if exported else "estimated" if has_reference else "none",
        tuple(source for _, _, source in planes),
    )


def residual_stride(longest_side: int) -> int:
    """Every how many pixels the residual is sampled; finer sampling changes selections by about 1 %."""
    return 4 if longest_side >= 480 else 2 if longest_side >= 240 else 1


def motion_vector_grid(records: np.ndarray | None, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Paint decoder records on the 4 x 4 pixel cells they cover.

    Args:
        records: FFmpeg's motion vectors, `dst` being block centres; None for an intra picture.
        height, width: of the picture.

    Returns:
        `(height // 4, width // 4, 4)` int16 vectors as in `Signals`, and the same grid as bool: covered by a vector.
    """
    rows, columns = max(height // CELL, 1), max(width // CELL, 1)
    vectors, covered = np.zeros((rows, columns, 4), np.int16), np.zeros((rows, columns), bool)
    if records is None or not len(records):
        return vectors, covered
    shapes = records["w"].astype(np.int32) << 16 | records["h"]
    for shape in np.unique(shapes):
        block, block_w, block_h = records[shapes == shape], int(shape) >> 16, int(shape) & 0xFFFF
        x = (block["dst_x"].astype(np.int32) - block_w // 2) // CELL
        y = (block["dst_y"].astype(np.int32) - block_h // 2) // CELL
        channel = np.where(block["source"] <= 0, 0, 2)
        dx, dy = block["src_x"] - block["dst_x"], block["src_y"] - block["dst_y"]
        for row in range(max(block_h // CELL, 1)):
            for column in range(max(block_w // CELL, 1)):
                inside = (y + row >= 0) & (y + row < rows) & (x + column >= 0) & (x + column < columns)
                at = (y + row)[inside], (x + column)[inside]
                vectors[(*at, channel[inside])] = dx[inside]
                vectors[(*at, channel[inside] + 1)] = dy[inside]
                covered[at] = True
    return vectors, covered


class _BitstreamReader:
    """Signals of frames whose decoder exports motion vectors."""

    def __init__(self, clip: Clip) -> None:
        isolates = clip.video.codec == "h264" and isolated_packets_work()
        self._isolated = IsolatedDecoder("h264", clip.coded[0].extradata) if isolates else None

    def __call__(self, frame: CodedFrame) -> tuple[np.ndarray, np.ndarray, ResidualSource]:
        vectors, covered = motion_vector_grid(frame.motion_vectors, *frame.luma.shape)
        picture = self._isolated.decode_luma(frame.packet) if self._isolated and frame.packet else None
        if picture is not None and picture.shape != frame.luma.shape:
            picture = None
        return _residual_of(frame, vectors, covered, picture)


def _estimate_frame(frame: CodedFrame) -> tuple[np.ndarray, np.ndarray, ResidualSource]:
    """Signals of a frame from a two-picture encoding of the frame before it and itself."""
    luma = shrink_for_pair(frame.luma)
    if frame.reference is None:
        vectors, _ = motion_vector_grid(None, *luma.shape)
        return vectors, _sample(_texture(luma), residual_stride(max(luma.shape))), "texture"
    records, packet, extradata = encode_pair(shrink_for_pair(frame.reference), luma)
    vectors, covered = motion_vector_grid(records, *luma.shape)
    picture = IsolatedDecoder("h264", extradata).decode_luma(packet) if isolated_packets_work() else None
    reduced = CodedFrame(frame.picture_type, records, packet, extradata, luma, shrink_for_pair(frame.reference))
    _, residual, source = _residual_of(reduced, vectors, covered, picture)
    return vectors, residual, "estimated" if source == "isolated" else source


def _residual_of(
    frame: CodedFrame, vectors: np.ndarray, covered: np.ndarray, picture: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, ResidualSource]:
    """Residual where vectors cover the frame, texture (what intra prediction would leave) elsewhere."""
    stride = residual_stride(max(frame.luma.shape))
    texture = _sample(_texture(frame.luma), stride)
    if not covered.any():
        return vectors, texture, "texture"
    if picture is not None:
        coded, source = _distance_to_background(picture, stride), "isolated"
    elif frame.reference is not None:
        coded, source = _compensated_difference(frame.luma, frame.reference, vectors, stride), "compensated"
    else:
        return vectors, texture, "texture"
    rows = np.minimum(np.arange(texture.shape[0]) * stride // CELL, covered.shape[0] - 1)
    columns = np.minimum(np.arange(texture.shape[1]) * stride // CELL, covered.shape[1] - 1)
    is_inter = covered[rows[:, None], columns]
    return vectors, np.where(is_inter, np.maximum(coded, texture * _TEXTURE_SHARE), texture), source


def _sample(plane: np.ndarray, stride: int) -> np.ndarray:
    return plane[::stride, ::stride].astype(np.float32)


def _texture(luma: np.ndarray) -> np.ndarray:
    """`(H, W)` uint8: the smaller of the differences to the left and to the upper neighbour."""
    left, above = np.empty_like(luma), np.empty_like(luma)
    left[:, 1:], above[1:] = _absolute_difference(luma[:, 1:], luma[:, :-1]), _absolute_difference(luma[1:], luma[:-1])
    left[:, :1], above[:1] = left[:, 1:2] if luma.shape[1] > 1 else 0, above[1:2] if luma.shape[0] > 1 else 0
    return np.minimum(left, above)


def _absolute_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum(a, b) - np.minimum(a, b)


def _distance_to_background(picture: np.ndarray, stride: int) -> np.ndarray:
    """Residual of an isolated picture: distance to the nearest level that uncoded blocks come out as.

    Mid-grey, unless weighted prediction has scaled it: the frequent levels of flat 4 x 4 blocks tell.
    """
    height, width = (side // CELL * CELL for side in picture.shape)
    quads = np.ascontiguousarray(picture[:height, :width]).view(np.uint32)  # (H, W / 4): four pixels at a time
    is_flat = quads[::CELL] % 0x01010101 == 0
    for row in range(1, CELL):
        is_flat &= quads[::CELL] == quads[row::CELL]
    counts = np.bincount(quads[::CELL][is_flat] & 0xFF, minlength=256)
    near = np.arange(128 - _BACKGROUND_RANGE, 128 + _BACKGROUND_RANGE + 1)
    total = counts[near].sum()
    levels = near[counts[near] >= max(_FREQUENT * total, 1)].tolist() or [128]
    sampled = _sample(picture, stride)
    return np.min([np.abs(sampled - level) for level in levels], axis=0)


def _compensated_difference(luma: np.ndarray, reference: np.ndarray, vectors: np.ndarray, stride: int) -> np.ndarray:
    """|frame - reference moved by the L0 vectors| at the sampled pixels, whole-pixel precision."""
    height, width = luma.shape
    y, x = np.arange(0, height, stride)[:, None], np.arange(0, width, stride)[None]
    cell = np.minimum(y // CELL, vectors.shape[0] - 1), np.minimum(x // CELL, vectors.shape[1] - 1)
    source_y = np.clip(y + vectors[(*cell, 1)], 0, height - 1)
    source_x = np.clip(x + vectors[(*cell, 0)], 0, width - 1)
    return np.abs(luma[y, x].astype(np.float32) - reference[source_y, source_x])
