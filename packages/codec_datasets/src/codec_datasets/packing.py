# SPDX-License-Identifier: Apache-2.0
"""`patch_positions -> patches <-> mosaics`: cut kept patches out of the frames, lay them out densely, and back."""

import numpy as np


def gather_patches(frames: np.ndarray, patch_positions: np.ndarray, patch_size: int) -> np.ndarray:
    """Pixels at the kept positions.

    Args:
        frames: `(T, H, W, 3)` uint8.
        patch_positions: `(N, 3)` rows `(t, h, w)`.
        patch_size: P.

    Returns:
        `(N, P, P, 3)` uint8, order of `patch_positions`.

    Raises:
        ValueError: if the frames are not divisible by `patch_size` or a position lies outside them.
    """
    num_frames, height, width = frames.shape[:3]
    if height % patch_size or width % patch_size:
        raise ValueError(f"frames of {height}x{width} are not divisible by patch_size {patch_size}")
    positions = _checked_positions(patch_positions, (num_frames, height // patch_size, width // patch_size))
    # (T, grid_h, P, grid_w, P, 3) -> (T, grid_h, grid_w, P, P, 3), a view
    lattice = frames.reshape(
        num_frames, height // patch_size, patch_size, width // patch_size, patch_size, 3
    ).swapaxes(2, 3)
    return lattice[tuple(positions.T)]


def pack_mosaics(patches: np.ndarray, patch_positions: np.ndarray, num_mosaics: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay patches out as square pictures: row-major cells in the order of `(t, h, w)`, the published layout.

    Row r of the positions is mosaic `r // cells`, cell `r % cells`.

    Args:
        patches: `(N, P, P, 3)` uint8.
        patch_positions: `(N, 3)` int32, any order.
        num_mosaics: M; N must be M times a square number.

    Returns:
        `(M, S, S, 3)` uint8 mosaics and the `(N, 3)` int32 positions, sorted by `(t, h, w)`.

    Raises:
        ValueError: if the patches do not fill `num_mosaics` squares exactly.
    """
    positions = _checked_positions(patch_positions)
    if len(patches) != len(positions):
        raise ValueError(f"{len(patches)} patches, but {len(positions)} positions")
    side = round((len(patches) / max(num_mosaics, 1)) ** 0.5)
    if num_mosaics < 1 or side < 1 or side**2 * num_mosaics != len(patches):
        raise ValueError(
            f"{len(patches)} patches can't fill {num_mosaics} square mosaics; use {num_mosaics} times a square number"
        )
    order = np.lexsort(positions.T[::-1])
    patch_size = patches.shape[1]
    # (M, row, column, P, P, 3) -> (M, row, P, column, P, 3)
    cells = patches[order].reshape(num_mosaics, side, side, patch_size, patch_size, 3).swapaxes(2, 3)
    return np.ascontiguousarray(cells).reshape(num_mosaics, side * patch_size, side * patch_size, 3), positions[order]


def unpack_mosaics(mosaics: np.ndarray, patch_size: int) -> np.ndarray:
    """Cut mosaics back into patches: `(M, S, S, 3)` -> `(M * (S / P)^2, P, P, 3)`, order of `pack_mosaics`.

    Raises:
        ValueError: if the mosaics are not divisible by `patch_size`.
    """
    if mosaics.ndim != 4 or mosaics.shape[3] != 3:
        raise ValueError(f"mosaics must be (M, S, S, 3), got {mosaics.shape}")
    count, height, width = mosaics.shape[:3]
    if height % patch_size or width % patch_size:
        raise ValueError(f"mosaics of {height}x{width} are not divisible by patch_size {patch_size}")
    cells = mosaics.reshape(count, height // patch_size, patch_size, width // patch_size, patch_size, 3)
    return np.ascontiguousarray(cells.swapaxes(2, 3)).reshape(-1, patch_size, patch_size, 3)


def _checked_positions(patch_positions: np.ndarray, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    positions = np.asarray(patch_positions)
    if positions.ndim != 2 or positions.shape[1] != 3 or not np.issubdtype(positions.dtype, np.integer):
        raise ValueError(f"patch_positions must be (N, 3) integers, got {positions.shape} {positions.dtype}")
    if shape is not None and len(positions) and ((positions < 0).any() or (positions >= shape).any()):
        raise ValueError(f"patch_positions must lie in {shape}, got {positions.min(0)}..{positions.max(0)}")
    return positions.astype(np.int32)
