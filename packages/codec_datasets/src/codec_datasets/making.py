# SPDX-License-Identifier: Apache-2.0
"""`Path in the data -> video file -> asset folder`: the work on one video, as worker processes do it."""

import errno
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .assets import AssetConfig, file_sha256, write_assets
from .conversations import safe_join
from .errors import VideoError
from .front_end import read_and_select
from .grid import Fit, frame_size, place_picture
from .selection import SelectionConfig, refuse_impossible
from .video import check_num_frames
from .workers import Outcome


@dataclass(frozen=True)
class AssetRecipe:
    """All that an asset folder depends on, besides its video.

    Attributes:
        selection: which patches to keep; exactly as many as the mosaics hold.
        num_frames: frames to sample from each video.
        size: side of the square frame in pixels, or `(height, width)`.
        fit: `letterbox`, `resize` or `crop`.
        assets: how they are stored.

    Raises:
        ValueError: if a value is not possible, or not together with another.
    """

    selection: SelectionConfig = field(default_factory=SelectionConfig)
    num_frames: int = 64
    size: int | tuple[int, int] = 576
    fit: Fit = "letterbox"
    assets: AssetConfig = field(default_factory=AssetConfig)

    def __post_init__(self) -> None:
        check_num_frames(self.num_frames)
        place_picture(*frame_size(self.size), self.size, self.fit)
        refuse_impossible(self.num_frames, self.size, self.selection)
        self.assets.check_budget(self.selection.num_patches)
        if self.selection.allow_fewer or self.selection.stop_below_error:
            raise ValueError("mosaics are always full: allow_fewer and stop_below_error are not possible here")

    @property
    def arguments(self) -> dict[str, Any]:
        """The recipe as `meta.json` holds it."""
        return {
            "selection": asdict(self.selection),
            "num_frames": self.num_frames,
            "size": self.size if isinstance(self.size, int) else list(self.size),
            "fit": self.fit,
            "assets": asdict(self.assets),
        }


@dataclass(frozen=True)
class AssetJob:
    """A video whose assets are to be made.

    Attributes:
        video: path as written in the data.
        path: the file.
        folder: where its assets go.
    """

    video: str
    path: str
    folder: str


def make_assets(job: AssetJob, recipe: AssetRecipe) -> VideoError | OSError | None:
    """In a worker: make one folder. An error of the video or of the output is returned, so that they stay apart."""
    try:
        digest = file_sha256(job.path)
        options = {"num_frames": recipe.num_frames, "size": recipe.size, "fit": recipe.fit}
        options["num_threads"] = 1  # the cores belong to the other workers
        _, selection = read_and_select(job.path, recipe.selection, **options)
    except VideoError as error:
        if isinstance(error.__cause__, MemoryError):
            raise
        return error
    except OSError as error:
        return VideoError(job.video, "open", error.strerror or str(error), "Check the file and its permissions")
    try:
        write_assets(job.folder, selection, recipe.assets, recipe.arguments, digest)
    except OSError as error:  # numpy's say neither number nor file
        return OSError(error.errno or errno.EIO, error.strerror or str(error), job.folder)
    return None


def error_of(outcome: Outcome) -> VideoError | str | None:
    """Why a video can't be used; an output that can't be written ends the run instead."""
    if outcome.error is not None:
        return f"{outcome.item.video}: {outcome.error_kind}: {outcome.error}"
    if isinstance(outcome.value, OSError):
        raise outcome.value
    return outcome.value


def find_file(root: Path, written: str, kind: str) -> Path:
    """The file that a path in the data names, which must lie below the root.

    Raises:
        VideoError: of stage `find`.
    """
    advice = f"Check the data and --{kind}-root"
    try:
        below = os.path.relpath(written, root.absolute()) if os.path.isabs(written) else written
        path = safe_join(root, below)
    except (ValueError, OSError) as error:
        raise VideoError(written, "find", str(error), advice) from error
    if not os.path.isfile(path):
        raise VideoError(written, "find", f"no such file below {root}", advice)
    return path
