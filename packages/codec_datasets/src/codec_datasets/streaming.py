# SPDX-License-Identifier: Apache-2.0
"""`replenish` for streams: frames come one at a time, kept patches leave at once, nothing else is remembered."""

import numpy as np

from .selection import FirstFrame


class ReplenishStream:
    """Conditional replenishment with a fixed threshold.

    Holds one picture, whatever the length of the stream. Fed with the frames of a clip it keeps the patches that
    `select_patches(..., policy="replenish", stop_below_error=threshold)` keeps when its budget is not the limit.

    Args:
        threshold: root mean square error in grey levels above which a patch is kept.
        patch_size: P.
        block: 2 keeps whole 2 x 2 blocks.
        valid: `(grid_h, grid_w)` bool, patches that may be kept (`grid.content`; a block counts if any of
            it may); all if not given.
        first_frame: `full` keeps every valid patch of the first frame, `selected` compares it with black.

    Example:
        >>> stream = ReplenishStream(threshold=12.0, patch_size=16)
        >>> for frame in camera:                      # (H, W, 3) uint8
        ...     positions = stream.push(frame)        # (n, 3): t, h, w
    """

    def __init__(
        self,
        threshold: float,
        patch_size: int = 16,
        *,
        block: int = 1,
        valid: np.ndarray | None = None,
        first_frame: FirstFrame = "full",
    ) -> None:
        if threshold < 0 or patch_size < 1 or block not in (1, 2):
            raise ValueError(f"threshold >= 0, patch_size >= 1, block 1 or 2; got {threshold}, {patch_size}, {block}")
        self.threshold, self.patch_size, self.block, self.first_frame = threshold, patch_size, block, first_frame
        self._valid = valid
        self._held: np.ndarray | None = None
        self.num_frames = 0

    def push(self, frame: np.ndarray) -> np.ndarray:
        """Take the next frame and return what to keep of it.

        Args:
            frame: `(H, W, 3)` uint8 RGB, the same size every time.

        Returns:
            `(n, 3)` int32 positions `(t, h, w)`, sorted; `t` counts frames from 0.

        Raises:
            ValueError: on another shape, or sizes that patches don't divide.
        """
        held = self._checked_held(frame)
        unit = self.patch_size * self.block
        error = _unit_errors(frame, held, unit)
        is_kept = error > self.threshold**2 * unit**2 * 3
        if self.num_frames == 0 and self.first_frame == "full":
            is_kept[:] = True
        is_kept &= self._valid_units(is_kept.shape)
        pixels = is_kept.repeat(unit, 0).repeat(unit, 1)
        held[pixels] = frame[pixels]
        places = np.argwhere(is_kept.repeat(self.block, 0).repeat(self.block, 1))
        positions = np.insert(places, 0, self.num_frames, axis=1).astype(np.int32)
        self._held, self.num_frames = held, self.num_frames + 1
        return positions

    def _checked_held(self, frame: np.ndarray) -> np.ndarray:
        unit = self.patch_size * self.block
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"frame must be (H, W, 3) uint8, got {frame.shape} {frame.dtype}")
        if frame.shape[0] % unit or frame.shape[1] % unit:
            raise ValueError(f"frame of {frame.shape[0]}x{frame.shape[1]} is not divisible by {unit} pixels")
        if self._held is None:
            return np.zeros_like(frame)
        if self._held.shape != frame.shape:
            raise ValueError(f"frame size changed from {self._held.shape} to {frame.shape}; start a new stream")
        return self._held

    def _valid_units(self, shape: tuple[int, int]) -> np.ndarray:
        if self._valid is None:
            return np.ones(shape, bool)
        expected = shape[0] * self.block, shape[1] * self.block
        if self._valid.shape != expected:
            raise ValueError(f"valid must be {expected} for these frames, got {self._valid.shape}")
        return self._valid.reshape(shape[0], self.block, shape[1], self.block).any((1, 3))


def _unit_errors(frame: np.ndarray, held: np.ndarray, unit: int) -> np.ndarray:
    """`(rows, columns)` int64 squared error of each unit."""
    difference = frame.astype(np.int32) - held
    rows, columns = frame.shape[0] // unit, frame.shape[1] // unit
    return (difference * difference).reshape(rows, unit, columns, unit * 3).sum((1, 3), dtype=np.int64)
