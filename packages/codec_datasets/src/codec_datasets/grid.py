# SPDX-License-Identifier: Apache-2.0
"""Geometry: source picture -> fixed frame -> patch grid. Plain arithmetic, no pixels."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

Fit = Literal["letterbox", "resize", "crop"]


@dataclass(frozen=True)
class Placement:
    """Where a source picture lands in a frame of fixed size. All values in pixels, display orientation.

    Attributes:
        height, width: the frame.
        resized_height, resized_width: the whole picture after scaling, before cropping.
        crop_top, crop_left: first row and column of the scaled picture that is kept.
        top, left, content_height, content_width: the rectangle of the frame that shows picture; the rest is black.
    """

    height: int
    width: int
    resized_height: int
    resized_width: int
    crop_top: int
    crop_left: int
    top: int
    left: int
    content_height: int
    content_width: int

    @property
    def crop(self) -> tuple[slice, slice]:
        """Rows and columns of the scaled picture that are kept."""
        return (
            slice(self.crop_top, self.crop_top + self.content_height),
            slice(self.crop_left, self.crop_left + self.content_width),
        )

    @property
    def content(self) -> tuple[slice, slice]:
        """Rows and columns of the frame that show picture."""
        return slice(self.top, self.top + self.content_height), slice(self.left, self.left + self.content_width)


def frame_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """`(height, width)` of a frame; a single number means a square."""
    sides = (size, size) if isinstance(size, int | np.integer) else size
    is_pair = isinstance(sides, tuple | list) and len(sides) == 2
    if not is_pair or not all(isinstance(side, int | np.integer) and side > 0 for side in sides):
        raise ValueError(f"size must be a positive number of pixels or a pair (height, width), got {size!r}")
    height, width = sides
    return int(height), int(width)


def place_picture(
    source_height: int, source_width: int, size: int | tuple[int, int], fit: Fit = "letterbox"
) -> Placement:
    """Fit a picture into a frame.

    `letterbox` scales by `min(height / source_height, width / source_width)`, rounds, and centres with the floor of
    half the rest (the published geometry); `resize` stretches; `crop` fills the frame and cuts the overhang centrally.

    Args:
        source_height, source_width: display orientation, after rotation.
        size: frame size, one number or `(height, width)`.

    Raises:
        ValueError: on an unknown fit or an empty size.
    """
    height, width = frame_size(size)
    if fit not in get_args(Fit):
        raise ValueError(f"fit must be one of {get_args(Fit)}, got {fit!r}")
    if fit == "resize":
        return Placement(height, width, height, width, 0, 0, 0, 0, height, width)
    ratios = (height / source_height, width / source_width)
    scale = min(ratios) if fit == "letterbox" else max(ratios)
    resized_height, resized_width = max(1, round(source_height * scale)), max(1, round(source_width * scale))
    if fit == "crop":
        resized_height, resized_width = max(resized_height, height), max(resized_width, width)
        crop_top, crop_left = (resized_height - height) // 2, (resized_width - width) // 2
        return Placement(height, width, resized_height, resized_width, crop_top, crop_left, 0, 0, height, width)
    top, left = (height - resized_height) // 2, (width - resized_width) // 2
    return Placement(height, width, resized_height, resized_width, 0, 0, top, left, resized_height, resized_width)


@dataclass(frozen=True)
class PatchGrid:
    """The patch lattice of a clip.

    Attributes:
        num_frames: T, slots of the clip.
        grid_h, grid_w: rows and columns of patches.
        patch_size: P, pixels.
        content: `(grid_h, grid_w)` bool, patches that show any of the picture; the others are padding.
        valid: `(grid_h, grid_w)` bool, patches that lie fully inside the picture, as the published rule asks.
    """

    num_frames: int
    grid_h: int
    grid_w: int
    patch_size: int
    content: np.ndarray = field(repr=False)
    valid: np.ndarray = field(repr=False)

    def __post_init__(self) -> None:
        for name, mask in (("content", self.content), ("valid", self.valid)):
            if mask.shape != (self.grid_h, self.grid_w):
                raise ValueError(f"{name} must be {(self.grid_h, self.grid_w)}, got {mask.shape}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(num_frames, grid_h, grid_w)`."""
        return self.num_frames, self.grid_h, self.grid_w

    def check_frames(self, frames: np.ndarray) -> None:
        """Refuse frames that this lattice was not made for.

        Raises:
            ValueError: if they are not `(T, H, W, 3)` uint8 of this size.
        """
        expected = (self.num_frames, self.grid_h * self.patch_size, self.grid_w * self.patch_size, 3)
        if frames.shape != expected or frames.dtype != np.uint8:
            raise ValueError(f"frames must be {expected} uint8 for this grid, got {frames.shape} {frames.dtype}")


def make_grid(num_frames: int, placement: Placement, patch_size: int) -> PatchGrid:
    """Patch lattice of frames with this placement.

    Raises:
        ValueError: if the frame is not divisible by `patch_size`.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    if placement.height % patch_size or placement.width % patch_size:
        nearest = [max(1, round(side / patch_size)) * patch_size for side in (placement.height, placement.width)]
        raise ValueError(
            f"size {placement.height}x{placement.width} is not divisible by patch_size {patch_size}; "
            f"the nearest that is: {nearest[0]}x{nearest[1]}"
        )
    rows = _inside(placement.height, patch_size, placement.top, placement.content_height)
    columns = _inside(placement.width, patch_size, placement.left, placement.content_width)
    content, valid = (row[:, None] & column[None] for row, column in zip(rows, columns))
    return PatchGrid(num_frames, *content.shape, patch_size, content, valid)


def _inside(length: int, patch_size: int, start: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis: which patches overlap the picture, and which lie fully inside it."""
    low = np.arange(0, length, patch_size)
    high = low + patch_size
    return (high > start) & (low < start + extent), (low >= start) & (high <= start + extent)


def content_blocks(grid: PatchGrid, block: int) -> np.ndarray:
    """`(grid_h // block, grid_w // block)` bool: blocks of `block` x `block` patches that show any of the picture.

    Raises:
        ValueError: if the grid is not divisible by `block`.
    """
    if grid.grid_h % block or grid.grid_w % block:
        raise ValueError(f"a grid of {grid.grid_h}x{grid.grid_w} patches can't be cut into {block}x{block} blocks")
    return grid.content.reshape(grid.grid_h // block, block, grid.grid_w // block, block).any((1, 3))
