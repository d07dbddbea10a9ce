# SPDX-License-Identifier: Apache-2.0
"""How much of a clip its kept patches still show: hold and coverage.

Both are proxies (accuracy at equal tokens decides), and both count all T frames and all locations of the square. Hold
asks whether the timeline can be read back from the patches, coverage whether everything was seen.
"""

import numpy as np

from .distances import PatchDistances, patch_distances
from .grid import PatchGrid


def hold_psnr(frames: np.ndarray, grid: PatchGrid, patch_positions: np.ndarray) -> float:
    """PSNR in dB of the frames rebuilt from the last patch kept at each location, black before the first.

    Args:
        frames: `(T, H, W, 3)` uint8.
        grid: patch lattice of the frames.
        patch_positions: `(N, 3)` kept `(t, h, w)`, any order.

    Raises:
        ValueError: if shapes don't match or positions lie outside the grid.
    """
    kept, distances = _kept_units(frames, grid, patch_positions)
    held, total = np.full(kept.shape[1], -1), 0
    for t, here in enumerate(kept):
        held[here] = t
        total += int(distances.from_slots(held, t).sum())
    return _psnr(total, frames)


def coverage_psnr(frames: np.ndarray, grid: PatchGrid, patch_positions: np.ndarray) -> float:
    """PSNR in dB when every patch is replaced by the nearest kept patch of its location, whatever its time.

    Locations where nothing is kept are black. Arguments and errors as in `hold_psnr`.
    """
    kept, distances = _kept_units(frames, grid, patch_positions)
    total = 0
    for location, slots in enumerate(kept.T):
        if not slots.any():
            total += int(distances.dark[location].sum())
            continue
        norms, gram = distances.norms[location], distances.gram[location, slots].astype(np.int64)
        total += int((norms[slots, None] + norms - 2 * gram).min(0).sum())
    return _psnr(total, frames)


def _kept_units(frames: np.ndarray, grid: PatchGrid, patch_positions: np.ndarray) -> tuple[np.ndarray, PatchDistances]:
    """`(T, L)` bool over all locations, and the distances between their patches."""
    positions = np.asarray(patch_positions)
    grid.check_frames(frames)
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise ValueError(f"patch_positions must be (N, 3), got {positions.shape}")
    if len(positions) and ((positions < 0).any() or (positions >= grid.shape).any()):
        raise ValueError(f"patch_positions must lie in {grid.shape}, got {positions.min(0)}..{positions.max(0)}")
    lattice = np.zeros(grid.shape, bool)
    lattice[tuple(positions.T)] = True
    everywhere = slice(0, grid.grid_h), slice(0, grid.grid_w)
    return lattice.reshape(grid.num_frames, -1), patch_distances(frames, grid.patch_size, *everywhere)


def _psnr(total_squared_error: int, frames: np.ndarray) -> float:
    """Over all samples of the square; infinite for a perfect rebuild."""
    mean = total_squared_error / frames.size
    return float(10 * np.log10(255**2 / mean)) if mean else float("inf")
