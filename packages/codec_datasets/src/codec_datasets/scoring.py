# SPDX-License-Identifier: Apache-2.0
"""`Signals -> patch_scores`: the published energy of motion and residual, summed over patches.

Resizing, padding and summing over patches are linear and separable, so each is folded into two small matrices and a
frame costs two matrix products.
"""

import numpy as np

from .blas import single_threaded_blas
from .grid import PatchGrid, Placement
from .signals import Signals

RESIDUAL_WEIGHT = 0.5
"""Weight of the residual beside motion: best agreement with published selections on held-out clips."""

_PERCENTILE = 95
_LEAST_MOTION = 1e-6  # published floors of the per-frame divisors, pixels and grey levels
_LEAST_RESIDUAL = 1.0


@single_threaded_blas
def score_patches(signals: Signals, grid: PatchGrid, placement: Placement) -> np.ndarray:
    """Energy of each patch: OneVision-Encoder's rule with the true coded residual.

    Motion is the length of the L0 vector after subtracting the frame's median; both signals are divided by their 95th
    percentile in the frame and clipped to 1, then summed over the pixels of each patch.

    Args:
        signals: of the clip.
        grid: patch lattice of the clip.
        placement: where the picture lies in the frames.

    Returns:
        `(num_frames, grid_h, grid_w)` float32, 0 on patches that lie fully in the padding.
    """
    turns = signals.rotation // 90
    height, width = signals.picture_size[::-1] if turns % 2 else signals.picture_size
    motion = np.stack([np.rot90(_motion_energy(vectors), turns) for vectors in signals.motion_vectors])
    residual = np.stack([np.rot90(_residual_energy(frame), turns) for frame in signals.residual])
    rows, columns = _axis(grid, placement, 0), _axis(grid, placement, 1)
    of_motion = _enlarge(rows, motion.shape[1], height) @ motion @ _enlarge(columns, motion.shape[2], width).T
    of_residual = _resize(rows, residual.shape[1]) @ residual @ _resize(columns, residual.shape[2]).T
    return (of_motion + RESIDUAL_WEIGHT * of_residual).astype(np.float32)


def _motion_energy(vectors: np.ndarray) -> np.ndarray:
    """`(H/4, W/4)` float32 in 0...1: L0 motion without the camera's median motion."""
    first_list = vectors[..., :2].astype(np.float32) / 4  # the published unit; cancels against the percentile
    length = np.hypot(*np.moveaxis(first_list - np.median(first_list, axis=(0, 1)), -1, 0))
    return np.minimum(length / max(float(np.percentile(length, _PERCENTILE)), _LEAST_MOTION), 1)


def _residual_energy(residual: np.ndarray) -> np.ndarray:
    return np.minimum(residual / max(float(np.percentile(residual, _PERCENTILE)), _LEAST_RESIDUAL), 1)


def _axis(grid: PatchGrid, placement: Placement, axis: int) -> tuple[np.ndarray, int]:
    """Along one axis: the patch of each pixel of the scaled picture (-1 if cut off), and the number of patches."""
    resized, crop, content, offset, patches = (
        (placement.resized_height, placement.crop_top, placement.content_height, placement.top, grid.grid_h)
        if axis == 0
        else (placement.resized_width, placement.crop_left, placement.content_width, placement.left, grid.grid_w)
    )
    patch_of_pixel = np.full(resized, -1)
    patch_of_pixel[crop : crop + content] = (offset + np.arange(content)) // grid.patch_size
    return patch_of_pixel, patches


def _resize(axis: tuple[np.ndarray, int], length: int) -> np.ndarray:
    """`(patches, length)`: bilinear resize of `length` samples to the scaled picture, then sum over patches."""
    patch_of_pixel, patches = axis
    resized = len(patch_of_pixel)
    position = np.clip((np.arange(resized) + 0.5) * length / resized - 0.5, 0, length - 1)
    low = np.floor(position).astype(int)
    high, weight = np.minimum(low + 1, length - 1), position - low
    operator = np.zeros((patches, length), np.float32)
    kept = patch_of_pixel >= 0
    np.add.at(operator, (patch_of_pixel[kept], low[kept]), 1 - weight[kept])
    np.add.at(operator, (patch_of_pixel[kept], high[kept]), weight[kept])
    return operator


def _enlarge(axis: tuple[np.ndarray, int], cells: int, pixels: int) -> np.ndarray:
    """The same for motion cells: they are first repeated over `pixels` by nearest neighbour, as published."""
    cell_of_pixel = np.minimum(np.arange(pixels) * cells // pixels, cells - 1)
    operator = np.zeros((axis[1], cells), np.float32)
    np.add.at(operator.T, cell_of_pixel, _resize(axis, pixels).T)
    return operator
