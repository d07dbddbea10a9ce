# SPDX-License-Identifier: Apache-2.0
"""Exact squared distances between the patches that one grid location shows over time.

Policies compare patches on full-resolution colour. Samples are centred to -128...127 and multiplied in slices of fewer
than 1 024 features, so that every inner product is an integer below 2^24: float32 matrix products are then exact,
whatever the BLAS, and batch and streaming selection agree to the last bit.
"""

from dataclasses import dataclass

import numpy as np

from .blas import single_threaded_blas

_CENTRE = np.uint8(128)
_MAX_FEATURES = 1023  # 1023 * 128^2 < 2^24
LARGEST_UNIT = _MAX_FEATURES // 3
"""Pixels: a unit is multiplied in slices of whole pixel rows."""

_LOCATIONS_AT_ONCE = 6  # about 1 MB of float32, stays in the second-level cache


@dataclass(frozen=True)
class PatchDistances:
    """Inner products of the patches of each location.

    Memory grows with the square of the frames: 4 L T^2 bytes, 21 MB for 64 frames of 36 x 36 patches.

    Attributes:
        gram: `(L, T, T)` float32 or int32, inner products of centred patches, exact integers.
        norms: `(L, T)` int64, squared lengths of centred patches.
        dark: `(L, T)` int64, squared distances to black; None where nobody starts from black.
        num_features: values per patch.
    """

    gram: np.ndarray
    norms: np.ndarray
    dark: np.ndarray | None
    num_features: int

    def from_slots(self, slots: np.ndarray, t: int) -> np.ndarray:
        """Squared distance of slot `t` to an earlier slot of each location.

        Args:
            slots: `(..., L)` slot per location, -1 for black.

        Returns:
            `(..., L)` int64.
        """
        location = np.arange(len(self.norms))
        product = self.gram[location, slots, t].astype(np.int64)
        error = self.norms[location, slots] + self.norms[:, t] - 2 * product
        return np.where(slots < 0, self.dark[:, t], error) if (slots < 0).any() else error

    def all_pairs(self) -> np.ndarray:
        """`(L, T, T)` float32 squared distances, rounded to 24 bits."""
        norms = self.norms.astype(np.float32)
        pairs = np.multiply(self.gram, np.float32(-2), dtype=np.float32)
        pairs += norms[:, :, None]
        pairs += norms[:, None]
        return np.maximum(pairs, 0, out=pairs)  # 24-bit rounding of large terms can leave -2

    def steps(self) -> np.ndarray:
        """`(L, T)` int64 squared distance of each slot to the one before, 0 for the first."""
        step = np.zeros_like(self.norms)
        product = np.diagonal(self.gram, 1, 1, 2).astype(np.int64)
        step[:, 1:] = self.norms[:, 1:] + self.norms[:, :-1] - 2 * product
        return step


@single_threaded_blas
def patch_distances(
    frames: np.ndarray, unit: int, rows: slice, columns: slice, with_dark: bool = True
) -> PatchDistances:
    """Compare the patches of each location of a rectangle of the patch lattice.

    Args:
        frames: `(T, H, W, 3)` uint8.
        unit: side of a patch (or of a block of patches) in pixels.
        rows, columns: the rectangle, in units.
        with_dark: also compute distances to black, at a tenth of the cost.

    Returns:
        distances of `L = num_rows * num_columns` locations in raster order.
    """
    num_frames, num_columns = len(frames), columns.stop - columns.start
    num_locations = (rows.stop - rows.start) * num_columns
    slice_rows = _rows_per_slice(unit)
    gram_type = np.float32 if slice_rows == unit else np.int32
    gram = np.zeros((num_locations, num_frames, num_frames), gram_type)
    total = np.zeros((num_locations, num_frames), np.int64) if with_dark else None
    # (T, H, W / unit): one item holds a pixel row of a patch, so that rearranging patches copies whole rows
    patch_rows = np.ascontiguousarray(frames).reshape(num_frames, frames.shape[1], -1).view(f"V{unit * 3}")
    for number, row in enumerate(range(rows.start, rows.stop)):
        here = slice(number * num_columns, (number + 1) * num_columns)
        for top in range(row * unit, (row + 1) * unit, slice_rows):
            band = patch_rows[:, top : top + slice_rows, columns].transpose(2, 0, 1)
            _add_products(band, gram[here], None if total is None else total[here])
    norms = np.einsum("ltt->lt", gram).astype(np.int64)
    num_features = unit * unit * 3
    # |x|^2 of the uncentred patch, from the centred one: sum (y + c)^2 = |y|^2 + 2 c sum(y) + n c^2
    dark = None if total is None else norms + 2 * int(_CENTRE) * total + num_features * int(_CENTRE) ** 2
    return PatchDistances(gram, norms, dark, num_features)


def _rows_per_slice(unit: int) -> int:
    """Most pixel rows of a patch, a divisor of `unit`, whose features fit one exact product."""
    fitting = [rows for rows in range(1, unit + 1) if unit % rows == 0 and rows * unit * 3 <= _MAX_FEATURES]
    if not fitting:
        raise ValueError(f"patches of {unit} px are too large; the largest side is {LARGEST_UNIT}")
    return fitting[-1]


def _add_products(band: np.ndarray, gram: np.ndarray, total: np.ndarray | None) -> None:
    """Add the inner products of `band` (locations, T, rows), whole pixel rows, to `gram`, its sums to `total`."""
    for start in range(0, len(band), _LOCATIONS_AT_ONCE):
        here = slice(start, start + _LOCATIONS_AT_ONCE)
        samples = np.ascontiguousarray(band[here]).view(np.uint8)
        # flipping the top bit of an unsigned byte and reading it as signed subtracts 128
        centred = (samples ^ _CENTRE).view(np.int8).reshape(*band[here].shape[:2], -1).astype(np.float32)
        products = gram[here] if gram.dtype == np.float32 else None
        products = np.matmul(centred, centred.transpose(0, 2, 1), out=products)
        if gram.dtype != np.float32:
            gram[here] += products.astype(np.int32)
        if total is not None:
            total[here] += centred.sum(2, dtype=np.float64).astype(np.int64)
