# SPDX-License-Identifier: Apache-2.0
"""All stages in one call: video file -> `Selection`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .clip import Clip, Progress, decode_clip
from .errors import VideoError
from .files import written_whole
from .grid import Fit, PatchGrid, Placement, frame_size, make_grid, place_picture
from .packing import gather_patches
from .scoring import score_patches
from .selection import FirstFrame, Padding, Policy, SelectionConfig, fit_budget, refuse_impossible, select_patches
from .signals import compute_signals
from .video import VideoInfo, check_num_frames, plan_clip

_RECORDS = {"placement": Placement, "video": VideoInfo, "config": SelectionConfig}


@dataclass(frozen=True)
class Selection:
    """The patches of a video that were kept.

    Attributes:
        patches: `(N, P, P, 3)` uint8 RGB.
        patch_positions: `(N, 3)` int32 `(t, h, w)`, sorted; `t` is the slot among the sampled frames.
        frame_indices: `(T,)` int64 source frame of each slot, presentation order.
        pts_seconds: `(T,)` float64 time of each slot.
        grid: the patch lattice.
        video: the file.
        placement: where the picture lies in the frames.
        config: how the selection was made.
        signal_sources: for `energy`, where motion and residual come from, frames per source (`Signals.sources`).
    """

    patches: np.ndarray
    patch_positions: np.ndarray
    frame_indices: np.ndarray
    pts_seconds: np.ndarray
    grid: PatchGrid
    placement: Placement
    video: VideoInfo
    config: SelectionConfig
    signal_sources: dict[str, dict[str, int]] | None = None

    def __post_init__(self) -> None:
        if len(self.patches) != len(self.patch_positions):
            raise ValueError(f"{len(self.patches)} patches, but {len(self.patch_positions)} positions")
        if len(self.frame_indices) != self.grid.num_frames:
            raise ValueError(f"{len(self.frame_indices)} frame indices, but a grid of {self.grid.num_frames} frames")

    def __repr__(self) -> str:
        return (
            f"Selection(patches={self.patches.shape}, grid={self.grid.shape}, policy={self.config.policy!r}, "
            f"pts_seconds={self.pts_seconds[0]:.2f}..{self.pts_seconds[-1]:.2f}, video={self.video.path!r})"
        )

    @property
    def patches_per_frame(self) -> np.ndarray:
        """`(T,)` int64 number of kept patches of each slot."""
        return np.bincount(self.patch_positions[:, 0], minlength=self.grid.num_frames)

    def save_npz(self, path: str | Path) -> None:
        """Write one `.npz` file, whole or not at all: `patches`, `patch_positions`, `frame_indices`, `pts_seconds`,
        `content` and `valid` `(grid_h, grid_w)`, and `placement`, `video`, `config`, `signal_sources` as JSON."""
        records = {name: json.dumps(asdict(getattr(self, name))) for name in _RECORDS}
        with written_whole(path) as file:
            np.savez(
                file,
                patches=self.patches,
                patch_positions=self.patch_positions,
                frame_indices=self.frame_indices,
                pts_seconds=self.pts_seconds,
                content=self.grid.content,
                valid=self.grid.valid,
                signal_sources=json.dumps(self.signal_sources),
                **records,
            )


def load_npz(path: str | Path) -> Selection:
    """Read what `Selection.save_npz` wrote.

    Raises:
        ValueError: if arrays are missing.
    """
    with np.load(path) as stored:
        arrays = {"patches", "patch_positions", "frame_indices", "pts_seconds", "content", "valid", "signal_sources"}
        missing = arrays.union(_RECORDS) - set(stored)
        if missing:
            raise ValueError(f"{path}: not a stored selection, {', '.join(sorted(missing))} missing")
        content, patches = stored["content"], stored["patches"]
        return Selection(
            patches,
            stored["patch_positions"],
            stored["frame_indices"],
            stored["pts_seconds"],
            PatchGrid(len(stored["frame_indices"]), *content.shape, patches.shape[1], content, stored["valid"]),
            signal_sources=json.loads(str(stored["signal_sources"])),
            **{name: record(**json.loads(str(stored[name]))) for name, record in _RECORDS.items()},
        )


def select_video(
    path: str | Path,
    *,
    num_frames: int = 64,
    size: int | tuple[int, int] = 576,
    fit: Fit = "letterbox",
    patch_size: int = 16,
    num_patches: int = 10368,
    policy: Policy = "replenish",
    block: int = 1,
    first_frame: FirstFrame = "full",
    padding: Padding = "exclude",
    motion_weight: float = 0.0,
    stop_below_error: float = 0.0,
    seed: int = 0,
    allow_fewer: bool = False,
    num_threads: int = 2,
) -> Selection:
    """Keep the patches of a video that matter, under an exact budget.

    Args:
        path: local file, `http(s)://` address, or any address fsspec can open.
        num_frames: frames to sample uniformly, first and last included; shorter videos give all of theirs (the
            `energy` policy repeats frames, as published).
        size: side of the square frame in pixels, or `(height, width)`.
        fit: `letterbox`, `resize` or `crop`.
        patch_size: P; divides `size`.
        num_patches: exact budget.
        policy, block, first_frame, padding, motion_weight, stop_below_error, seed, allow_fewer: as in
            `SelectionConfig`.
        num_threads: parts of the file decoded at the same time, as in `read_clip`.

    Raises:
        ValueError: if the arguments contradict each other, before the file is opened.
        VideoError: if the file can't be used, or holds too few patches for the budget, before its frames are decoded.
    """
    config = SelectionConfig(
        patch_size=patch_size,
        num_patches=num_patches,
        policy=policy,
        block=block,
        first_frame=first_frame,
        padding=padding,
        motion_weight=motion_weight,
        stop_below_error=stop_below_error,
        seed=seed,
        allow_fewer=allow_fewer,
    )
    return read_and_select(path, config, num_frames=num_frames, size=size, fit=fit, num_threads=num_threads)[1]


def read_and_select(
    path: str | Path,
    config: SelectionConfig,
    *,
    num_frames: int = 64,
    size: int | tuple[int, int] = 576,
    fit: Fit = "letterbox",
    num_threads: int = 2,
    on_progress: Progress | None = None,
) -> tuple[Clip, Selection]:
    """As `select_video`, for callers that also want the frames; `on_progress(done, total)` is told of each frame."""
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    check_num_frames(num_frames)
    place_picture(*frame_size(size), size, fit)
    refuse_impossible(num_frames, size, config)
    needs_bitstream = config.policy == "energy"
    plan = plan_clip(path, num_frames, repeat_short=needs_bitstream)
    placement = place_picture(plan.video.height, plan.video.width, size, fit)
    _require_budget(plan.video, make_grid(len(plan.frame_indices), placement, config.patch_size), config)
    options = {"coded": needs_bitstream, "num_threads": num_threads, "on_progress": on_progress}
    clip = decode_clip(plan, size, fit, **options)
    return clip, select_clip(clip, config)


def select_clip(clip: Clip, config: SelectionConfig) -> Selection:
    """The same for frames that are already read.

    Args:
        clip: read with `coded=True` for `energy`.
        config: policy, budget and the other choices.

    Raises:
        ValueError: if the frames are not divisible by the patch size, or `energy` lacks its bitstream records.
        VideoError: if the clip holds too few patches for the budget.
    """
    grid = make_grid(len(clip.frames), clip.placement, config.patch_size)
    _require_budget(clip.video, grid, config)
    scores, sources = None, None
    if config.policy == "energy":
        signals = compute_signals(clip)
        scores, sources = score_patches(signals, grid, clip.placement), signals.sources
    positions = select_patches(clip.frames, grid, config, scores)
    patches = gather_patches(clip.frames, positions, config.patch_size)
    return Selection(
        patches, positions, clip.frame_indices, clip.pts_seconds, grid, clip.placement, clip.video, config, sources
    )


def _require_budget(video: VideoInfo, grid: PatchGrid, config: SelectionConfig) -> None:
    try:
        fit_budget(grid, config)
    except ValueError as error:
        raise VideoError(video.path, "select", str(error), "Choose another budget for it") from error
