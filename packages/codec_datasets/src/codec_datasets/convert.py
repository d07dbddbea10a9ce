# SPDX-License-Identifier: Apache-2.0
"""`Raw training data -> training set`: asset folders and the JSONL that names them, resumable at any point.

Two passes over the rows. The first makes what is missing: one folder per video, in worker processes. The second reads
from the folders what became of each video and writes all lines. Because only the folders carry results from one to the
other, the lines are in the order of the rows and the same whatever the workers did, and a run that was killed ends,
started again, like one that was not. No pass keeps rows in memory; the first keeps 64 bits of each video.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from .assets import (
    POSITIONS,
    file_sha256,
    mosaic_names,
    stored_record,
    stored_state,
    video_key,
    write_error,
)
from .conversations import BadSample, Sample, read_samples, shard_of, training_line
from .errors import VideoError
from .files import written_whole
from .making import AssetJob, AssetRecipe, error_of, find_file, make_assets
from .workers import run_isolated

OnProgress = Callable[[int, int], None]
ASSETS = "assets"
_LOOKS, _SECONDS_BETWEEN_LOOKS = 5, 0.05


@dataclass(frozen=True)
class ConvertConfig(AssetRecipe):
    """How raw data becomes a training set: an `AssetRecipe`, and

    Attributes:
        video_root: folder that the paths of videos lie below; None for the folder of the data.
        image_root: the same for images.
        absolute_paths: write absolute paths instead of paths relative to the JSONL.
        num_workers: processes; 0 works in this one, without limits and without protection from crashes.
        num_shards: parts the rows are divided into, by the published rule.
        shard_id: the part to do.
        limit: rows to read, before they are divided; None for all.
        time_limit_seconds: for one video.
        memory_limit_mb: for one worker, beyond what it needs to start.
        attempts: how often a video is tried in one run.
        retry_failed: try again what failed in an earlier run. What was not found is always looked for again.
        verify_videos: remake assets of videos whose content has changed; reads every video.

    Raises:
        ValueError: if a value is not possible, or not together with another.
    """

    video_root: str | Path | None = None
    image_root: str | Path | None = None
    absolute_paths: bool = False
    num_workers: int = 1
    num_shards: int = 1
    shard_id: int = 0
    limit: int | None = None
    time_limit_seconds: float | None = None
    memory_limit_mb: int | None = None
    attempts: int = 1
    retry_failed: bool = False
    verify_videos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.shard_id < self.num_shards:
            raise ValueError(f"shard_id must be 0 to num_shards - 1, got {self.shard_id} of {self.num_shards}")

    def file_name(self, name: str) -> str:
        """`train.jsonl`, or of one shard `train.shard00of04.jsonl` as published."""
        return f"{name}.jsonl" if self.num_shards == 1 else f"{name}.{_shard_name(self)}.jsonl"


@dataclass(frozen=True)
class ConvertReport:
    """What a run did, or in a dry run found.

    Attributes:
        train: the file of training lines.
        failed: the file of rows that are not in it.
        is_dry: nothing was written.
        rows: rows of the data, of this shard.
        states: videos by what stood in their folders before: `done`, `stale`, `failed`, `missing`.
        made: videos whose assets were made in this run.
        written: training lines by kind: `video`, `image`, `text`; in a dry run rows.
        failures: rows that are not in `train`, by stage.
        unclipped: rows with a `start` or `end`, whose whole video was used.
        seconds: how long it took.
    """

    train: Path
    failed: Path
    is_dry: bool
    rows: int
    states: dict[str, int]
    made: int
    written: dict[str, int]
    failures: dict[str, int]
    unclipped: int
    seconds: float

    @property
    def num_failed(self) -> int:
        """Rows that are not in `train`."""
        return sum(self.failures.values())

    def summary(self) -> str:
        """Some lines for a terminal of 80 columns."""
        kinds = _listed(self.written) or "none"
        lines = [f"rows      {self.rows}", f"{'found' if self.is_dry else 'written':<9} {kinds}"]
        lines.append(f"videos    {_listed(self.states) or 'none'}{'' if self.is_dry else ' before'}")
        if not self.is_dry:
            lines.append(f"          {self.made} made in {self.seconds:.1f} s, {self.states.get('done', 0)} reused")
        if self.failures:
            lines.append(f"failed    {self.num_failed} rows, by stage: {_listed(self.failures)}")
        if self.unclipped:
            lines.append(f"note      {self.unclipped} rows name a start or end; their whole video is used")
        return "\n".join(lines if self.is_dry else [*lines, f"wrote     {self.train}"])


def convert(
    source: str | Path,
    output: str | Path,
    config: ConvertConfig | None = None,
    *,
    dry_run: bool = False,
    on_progress: OnProgress | None = None,
) -> ConvertReport:
    """Make a training set of conversations about videos and images, or of a folder of videos.

    `output` gets `assets/<key>/` for each video, `train.jsonl` with a line for each row that can be used, in order,
    and `failed.jsonl` with `{row, id, video, stage, error}` for each that can't. Both take their names when they are
    whole. Run again after an interruption, it does what is missing.

    Args:
        source: whatever `read_samples` reads.
        output: folder, made if need be.
        config: the published recipe's shape by default.
        dry_run: look and count, write nothing.
        on_progress: told `(rows, failures)` now and then.

    Raises:
        ValueError: if `limit` or a number for the workers is out of range.
        OSError: if `source` can't be read or `output` can't be written; what is done so far counts in the next run.
    """
    begin = time.monotonic()
    config = config or ConvertConfig()
    read_samples(source, limit=config.limit)  # refuses what it can't read before anything is written
    run = _Run(Path(source), Path(output), config, on_progress or (lambda rows, failures: None))
    if dry_run:
        run.look()
    else:
        run.make()
        run.write()
    return ConvertReport(
        train=run.train,
        failed=run.failed,
        is_dry=dry_run,
        rows=run.rows,
        states=dict(sorted(run.states.items())),
        made=run.made,
        written=dict(sorted(run.written.items())),
        failures=dict(sorted(run.failures.items())),
        unclipped=run.unclipped,
        seconds=time.monotonic() - begin,
    )


@dataclass(frozen=True)
class _Failure:
    """A row that can't be used; fields as in `failed.jsonl`."""

    row: int
    id: str | None
    video: str | None
    stage: str
    error: str


class _Run:
    """One conversion: where things are, and its counts."""

    def __init__(self, source: Path, output: Path, config: ConvertConfig, on_progress: OnProgress) -> None:
        self._source, self._output, self._config, self._on_progress = source, output, config, on_progress
        folder = source if source.is_dir() else source.parent
        self._video_root = Path(config.video_root or folder)
        self._image_root = Path(config.image_root or folder)
        self._real_output = os.path.realpath(output)
        self._arguments = config.arguments
        self.train, self.failed = (output / config.file_name(name) for name in ("train", "failed"))
        self.rows = self.made = self.unclipped = 0
        self.states, self.written, self.failures = Counter(), Counter(), Counter()

    def look(self) -> None:
        """Count what there is, write nothing."""
        self.states = Counter(state for _, state, _ in self._videos())
        self.rows = self.unclipped = 0
        for sample in self._samples():
            failure = sample if isinstance(sample, _Failure) else self._missing_file(sample)
            self._count(failure.stage if failure else _kind(sample), is_failure=failure is not None)

    def make(self) -> None:
        """First pass: make the assets that are missing, record why some can't be."""
        config = self._config
        outcomes = run_isolated(
            partial(make_assets, recipe=config),
            self._jobs(),
            num_workers=config.num_workers,
            time_limit_seconds=config.time_limit_seconds,
            memory_limit_mb=config.memory_limit_mb,
            attempts=config.attempts,
            setup=Image.preinit,
        )
        (self._output / ASSETS).mkdir(parents=True, exist_ok=True)
        failures = 0
        with closing(outcomes):  # an error here ends the workers at once, not when Python gets round to it
            for outcome in outcomes:
                error = error_of(outcome)
                if error is None:
                    self.made += 1
                else:
                    failures += 1
                    write_error(outcome.item.folder, outcome.item.video, error, self._arguments)
                self._on_progress(self.rows, failures)

    def write(self) -> None:
        """Second pass: write all lines, from what the folders hold."""
        self.rows = self.unclipped = 0
        with written_whole(self.failed) as failed, written_whole(self.train) as train:
            for sample in self._samples():
                line = sample if isinstance(sample, _Failure) else self._line(sample)
                is_failure = isinstance(line, _Failure)
                self._count(line.stage if is_failure else _kind(sample), is_failure=is_failure)
                _write_line(failed if is_failure else train, asdict(line) if is_failure else line)

    def _count(self, name: str, *, is_failure: bool) -> None:
        (self.failures if is_failure else self.written)[name] += 1
        self._on_progress(self.rows, self.failures.total())

    def _samples(self) -> Iterator[Sample | _Failure]:
        """The rows of this shard."""
        config = self._config
        for sample in read_samples(self._source, limit=config.limit):
            is_bad = isinstance(sample, BadSample)
            shard = sample.row % config.num_shards if is_bad else shard_of(sample, config.num_shards)
            if shard != config.shard_id:
                continue
            self.rows += 1
            if is_bad:
                place = "" if sample.line is None else f"line {sample.line}: "
                yield _Failure(sample.row, None, None, "row", place + sample.reason)
            else:
                self.unclipped += sample.video is not None and bool({"start", "end"} & sample.source.keys())
                yield sample

    def _videos(self) -> Iterator[tuple[str, str, Path]]:
        """`(video as written, state, folder)` of each video, once."""
        seen: set[int] = set()
        for sample in self._samples():
            if isinstance(sample, _Failure) or sample.video is None:
                continue
            key = video_key(sample.video)
            number = int(key[-16:], 16)  # the hash in it: a fraction of the memory of names
            if number not in seen:
                seen.add(number)
                folder = self._output / ASSETS / key
                yield sample.video, self._state(sample.video, folder), folder

    def _jobs(self) -> Iterator[AssetJob]:
        for video, state, folder in self._videos():
            self.states[state] += 1
            if state == "done":
                self._on_progress(self.rows, 0)
                continue
            try:
                path = find_file(self._video_root, video, "video")
            except VideoError as error:
                write_error(folder, video, error, self._arguments)
                continue
            if state != "failed" or self._config.retry_failed or stored_record(folder).get("stage") == "find":
                yield AssetJob(video, str(path), str(folder))

    def _state(self, video: str, folder: Path) -> str:
        try:
            state, _ = stored_state(folder, self._arguments)
        except ValueError:  # damaged, by a power cut for example
            return "stale"
        return (
            "stale" if state == "done" and self._config.verify_videos and self._has_changed(video, folder) else state
        )

    def _has_changed(self, video: str, folder: Path) -> bool:
        try:
            path = find_file(self._video_root, video, "video")
            return file_sha256(path) != stored_record(folder)["video_sha256"]
        except (OSError, VideoError):  # what is gone has not changed
            return False

    def _missing_file(self, sample: Sample) -> _Failure | None:
        """For a dry run: the file of a row that is not there; assets that are done need no video."""
        if sample.video and self._state(sample.video, self._output / ASSETS / video_key(sample.video)) == "done":
            return None
        root = self._video_root if sample.video else self._image_root
        try:
            for path in (sample.video,) if sample.video else sample.images:
                find_file(root, path, "video" if sample.video else "image")
        except VideoError as error:
            return _Failure(sample.row, sample.id, sample.video, error.stage, str(error))
        return None

    def _line(self, sample: Sample) -> dict[str, Any] | _Failure:
        """The training line of a row, or why there is none."""
        if sample.video is not None:
            return self._video_line(sample)
        try:
            files = [find_file(self._image_root, path, "image") for path in sample.images]
        except VideoError as error:
            return _Failure(sample.row, sample.id, None, error.stage, str(error))
        return training_line(replace(sample, images=tuple(map(self._written_path, files))))

    def _video_line(self, sample: Sample) -> dict[str, Any] | _Failure:
        folder = self._output / ASSETS / video_key(sample.video)
        state, reason = self._settled_state(folder)
        if state == "done":
            start = f"{self._real_output}/" if self._config.absolute_paths else ""
            start += f"{ASSETS}/{folder.name}/"
            names = mosaic_names(sample.video, self._config.assets)
            return training_line(sample, [start + name for name in names], start + POSITIONS)
        if state == "failed":
            return _Failure(sample.row, sample.id, sample.video, stored_record(folder).get("stage", "run"), reason)
        error = f"{folder}: {state} after it was made; does another run write this folder? {reason}".strip()
        return _Failure(sample.row, sample.id, sample.video, "run", error)

    def _settled_state(self, folder: Path) -> tuple[str, str]:
        """What the first pass left, given time if another run is just replacing it."""
        for _ in range(_LOOKS):
            try:
                state, reason = stored_state(folder, self._arguments)
            except ValueError as error:
                state, reason = "damaged", str(error)
            if state in ("done", "failed"):
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return state, reason

    def _written_path(self, path: Path) -> str:
        """As the JSONL names a file; its own symbolic link stays, links among its folders would mislead `..`."""
        real = os.path.join(os.path.realpath(path.parent), path.name)
        return real if self._config.absolute_paths else Path(os.path.relpath(real, self._real_output)).as_posix()


def _kind(sample: Sample) -> str:
    return "video" if sample.video is not None else "image" if sample.images else "text"


def _write_line(file: BinaryIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def _shard_name(config: ConvertConfig) -> str:
    return f"shard{config.shard_id:02d}of{config.num_shards:02d}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
