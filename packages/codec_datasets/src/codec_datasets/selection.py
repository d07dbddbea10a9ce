# SPDX-License-Identifier: Apache-2.0
"""`frames -> patch_positions`: which patches to keep under an exact budget.

`SelectionConfig` says how, a policy from `policies.py` does it. `replenish` bounds the error of what is held and is
the default: it did best in a first study of accuracy at equal budgets.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from .distances import LARGEST_UNIT
from .grid import PatchGrid, content_blocks, frame_size, make_grid, place_picture
from .policies import POLICIES, Candidates

Policy = Literal["replenish", "rate_distortion", "coverage", "energy", "uniform", "random"]
FirstFrame = Literal["full", "selected"]
Padding = Literal["exclude", "zero"]

_PADDING_SCORE = -1e-4  # published: padding ranks below every patch with content


@dataclass(frozen=True)
class SelectionConfig:
    """How patches are chosen.

    Attributes:
        patch_size: P, pixels; divides the frame size.
        num_patches: exact budget for the clip, first frame included.
        policy: name in `POLICIES`.
        block: 2 keeps whole 2 x 2 blocks, for models that merge them.
        first_frame: `full` keeps all of slot 0 (its padding too with `padding="zero"`); `uniform` goes without.
        padding: `exclude` never keeps a patch that shows only letterbox; `zero` treats letterbox as black picture (the
            published layout).
        motion_weight: error counts up to `1 + motion_weight` times where things move.
        stop_below_error: root mean square error of a patch in grey levels; patches that would mend less are not kept,
            so that fewer than the budget may come back. This and
            `motion_weight` belong to replenish, rate_distortion and coverage.
        seed: of `random`.
        allow_fewer: a clip with fewer patches than the budget keeps all of them instead of being refused.

    Raises:
        ValueError: if a value is not possible, or not together with another.
    """

    patch_size: int = 16
    num_patches: int = 10368
    policy: Policy = "replenish"
    block: int = 1
    first_frame: FirstFrame = "full"
    padding: Padding = "exclude"
    motion_weight: float = 0.0
    stop_below_error: float = 0.0
    seed: int = 0
    allow_fewer: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("policy", tuple(POLICIES)),
            ("block", (1, 2)),
            ("first_frame", get_args(FirstFrame)),
            ("padding", get_args(Padding)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("patch_size", "num_patches", "block", "seed"):
            if not isinstance(getattr(self, name), int | np.integer):
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}")
            object.__setattr__(self, name, int(getattr(self, name)))  # NumPy's integers can't be stored as JSON
        for name in ("patch_size", "num_patches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed can't be negative, got {self.seed}")
        if self.num_patches % self.block**2:
            raise ValueError(f"num_patches={self.num_patches} is no multiple of 4, as block=2 needs")
        weighs_error = self.policy in ("replenish", "rate_distortion", "coverage")
        if weighs_error and self.unit > LARGEST_UNIT:
            raise ValueError(f"patch_size * block can be {LARGEST_UNIT} at most for {self.policy}, got {self.unit}")
        for name in ("motion_weight", "stop_below_error"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number from 0 on, got {value}")
            if value and not weighs_error:
                raise ValueError(f"{name}={value} has no meaning for policy {self.policy!r}, which weighs no errors")

    @property
    def keeps_first(self) -> bool:
        """All of slot 0 is kept."""
        return self.first_frame == "full" and self.policy != "uniform"

    @property
    def unit(self) -> int:
        """Side in pixels of what is kept or dropped as a whole."""
        return self.patch_size * self.block


def select_patches(
    frames: np.ndarray, grid: PatchGrid, config: SelectionConfig, patch_scores: np.ndarray | None = None
) -> np.ndarray:
    """Choose the patches of a clip to keep.

    Args:
        frames: `(T, H, W, 3)` uint8 RGB.
        grid: patch lattice of the frames.
        config: policy, budget and the other choices.
        patch_scores: `(T, grid_h, grid_w)` from `score_patches`, required by `energy`.

    Returns:
        `(num_patches, 3)` int32 positions, columns `(t, h, w)`, sorted; fewer only with `stop_below_error` or
        `allow_fewer`.

    Raises:
        ValueError: if the budget can't be met, or frames, scores and config do not fit the grid.
    """
    grid.check_frames(frames)
    if config.patch_size != grid.patch_size:
        raise ValueError(f"the grid has patches of {grid.patch_size} px, the config of {config.patch_size}")
    budget = fit_budget(grid, config)
    if config.policy == "energy" and patch_scores is None:
        raise ValueError("policy 'energy' needs patch_scores; compute them with score_patches")
    if patch_scores is not None and patch_scores.shape != grid.shape:
        raise ValueError(f"patch_scores must be {grid.shape}, got {patch_scores.shape}")
    block, is_selectable = config.block, _selectable_units(grid, config)
    rows, columns = (_extent(is_selectable.any(axis)) for axis in (1, 0))
    scores = None
    if patch_scores is not None:
        scores = _unit_scores(patch_scores, grid, config)[:, rows, columns].reshape(len(frames), -1)
    knobs = config.motion_weight, config.stop_below_error, config.seed
    candidates = Candidates(frames, rows, columns, config.unit, config.keeps_first, *knobs, scores)
    kept = POLICIES[config.policy](candidates, budget // block**2)
    lattice = np.zeros((len(frames), *is_selectable.shape), bool)
    lattice[:, rows, columns] = kept.reshape(len(frames), rows.stop - rows.start, -1)
    return np.argwhere(lattice.repeat(block, 1).repeat(block, 2)).astype(np.int32)


def refuse_impossible(num_frames: int, size: int | tuple[int, int], config: SelectionConfig) -> None:
    """Refuse what no video can satisfy, before one is opened.

    Raises:
        ValueError: if patches or blocks don't divide the frames, or even whole square frames hold fewer patches.
    """
    grid = make_grid(num_frames, place_picture(*frame_size(size), size, "resize"), config.patch_size)
    most = num_frames * content_blocks(grid, config.block).size * config.block**2
    if config.num_patches > most and not config.allow_fewer:
        raise ValueError(
            f"num_patches={config.num_patches} can't be met: {num_frames} frames of {grid.grid_h}x{grid.grid_w} "
            f"patches hold {most}; use allow_fewer=True to keep all of them"
        )


def fit_budget(grid: PatchGrid, config: SelectionConfig) -> int:
    """The number of patches to keep; needs the lattice only, no pixels.

    Raises:
        ValueError: if the clip can't give exactly `num_patches` (or, with `allow_fewer`, not even its first frame).
    """
    per_frame = int(_selectable_units(grid, config).sum()) * config.block**2
    if not per_frame:
        raise ValueError(f"no whole patch of {grid.patch_size * config.block} px lies inside the picture")
    capacity = per_frame * grid.num_frames
    budget = min(config.num_patches, capacity) if config.allow_fewer else config.num_patches
    least = per_frame if config.keeps_first else config.block**2
    if least <= budget <= capacity:
        return budget
    cure = "use allow_fewer=True to keep all of it" if budget > capacity else 'first_frame="selected" allows fewer'
    raise ValueError(
        f"num_patches={budget} can't be met: {grid.num_frames} frames of {per_frame} patches allow {least} to "
        f"{capacity}; {cure}"
    )


def _selectable_units(grid: PatchGrid, config: SelectionConfig) -> np.ndarray:
    """`(grid_h // block, grid_w // block)` bool: always a rectangle."""
    shows_picture = content_blocks(grid, config.block)
    return shows_picture if config.padding == "exclude" else np.ones_like(shows_picture)


def _extent(used: np.ndarray) -> slice:
    """The range of rows or columns in use; the picture is always a rectangle."""
    at = np.flatnonzero(used)
    return slice(int(at[0]), int(at[-1]) + 1)


def _unit_scores(patch_scores: np.ndarray, grid: PatchGrid, config: SelectionConfig) -> np.ndarray:
    """`(T, grid_h // block, grid_w // block)` float64: summed over each block; as published, a patch that is not fully
    inside the picture ranks last where padding counts as picture."""
    scores, block = patch_scores.astype(np.float64), config.block
    if config.padding == "zero":
        scores = np.where(grid.valid, scores, _PADDING_SCORE)
    return scores.reshape(len(scores), grid.grid_h // block, block, grid.grid_w // block, block).sum((2, 4))
