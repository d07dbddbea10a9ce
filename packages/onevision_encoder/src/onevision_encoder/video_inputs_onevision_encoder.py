# SPDX-License-Identifier: Apache-2.0
"""Videos as callers pass them: paths, decoded frames in their many forms, and what is known about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np
from PIL import Image
from transformers.video_utils import VideoMetadata


@dataclass
class ClipMetadata(VideoMetadata):
    """What became of one video; `frames_indices` and `pts_seconds` belong to the sampled frames, in order.

    Attributes:
        pts_seconds: presentation times of the sampled frames in seconds, None if unknown.
        sampling: `"uniform"` or `"codec"`.
        num_patches: patches in the clip's row.
    """

    pts_seconds: list[float] | None = None
    sampling: str = "uniform"
    num_patches: int = 0

    @property
    def frame_indices(self) -> list[int] | None:
        """`frames_indices` under the name the rest of this project uses."""
        return self.frames_indices

    @property
    def timestamps(self) -> list[float]:
        """Presentation times of the sampled frames in seconds; real ones where known."""
        return self.pts_seconds if self.pts_seconds is not None else super().timestamps

    def time_frames(self, fps: float | None) -> None:
        """Set the times of decoded frames from their number; without a frame rate they are unknown."""
        self.fps = fps
        self.pts_seconds = [index / fps for index in self.frames_indices] if fps else None


def known_fps(video_metadata: Any, number: int) -> float | None:
    """Take the frame rate of one video from what the caller passed along: one mapping for all, a list, or nothing."""
    entry = video_metadata[number] if isinstance(video_metadata, Sequence) else video_metadata
    return entry["fps"] if entry is not None and "fps" in entry else None


def split_videos(videos: Any) -> list[str | np.ndarray]:
    """Sort out what the caller passed: one video or several.

    Args:
        videos: a path or URL; `(T, H, W, 3)` frames as array, tensor or list of images; or a list of these.

    Returns:
        Per video its path or its frames `(T, H, W, 3)` uint8.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(videos, str | PathLike):
        return [fspath(videos)]
    if isinstance(videos, Sequence) and len(videos) == 0:
        raise ValueError("Expected at least one video, got an empty list.")
    if isinstance(videos, Sequence) and not _is_frame(videos[0]):
        return [clip for video in videos for clip in split_videos(video)]
    if not isinstance(videos, Sequence) and getattr(videos, "ndim", 0) == 5:
        return [to_frames(video) for video in videos]
    return [to_frames(videos)]


def _is_frame(item: Any) -> bool:
    """Say whether an element of a list is a single frame."""
    return isinstance(item, Image.Image) or getattr(item, "ndim", 0) == 3


def to_frames(frames: Any) -> np.ndarray:
    """Bring one decoded video to `(T, H, W, 3)` uint8; `(T, 3, H, W)` is accepted as well.

    Raises:
        ValueError: for another shape or dtype.
    """
    if isinstance(frames, Sequence):
        frames = np.stack([np.asarray(x.convert("RGB") if isinstance(x, Image.Image) else x) for x in frames])
    if hasattr(frames, "detach"):
        frames = frames.detach().cpu()
    array = np.asarray(frames)
    if array.ndim == 4 and array.shape[-1] != 3 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape or array.dtype != np.uint8:
        raise ValueError(
            f"Expected a path, or decoded RGB frames (T, H, W, 3) uint8, got {array.dtype} of shape {array.shape}."
        )
    return array


def fit_frames(frames: np.ndarray, size: int, fit: str) -> np.ndarray:
    """Bring frames to a square by Pillow, bicubic.

    Args:
        frames: `(T, H, W, 3)` uint8.
        size: side in pixels.
        fit: `"resize"` stretches, `"crop"` keeps the centre.

    Returns:
        `(T, size, size, 3)` uint8.
    """
    height, width = frames.shape[1:3]
    if (height, width) == (size, size):
        return frames
    box = (0, 0, width, height)
    if fit == "crop":
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    images = (Image.fromarray(frame) for frame in frames)
    return np.stack([np.asarray(x.resize((size, size), Image.Resampling.BICUBIC, box=box)) for x in images])


__all__ = ["ClipMetadata", "fit_frames", "known_fps", "split_videos", "to_frames"]
