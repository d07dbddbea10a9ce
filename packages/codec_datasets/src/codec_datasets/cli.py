# SPDX-License-Identifier: Apache-2.0
"""Command line: `codec-datasets select | show | convert | doctor`."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from .assets import AssetConfig, Layout, Storage
from .grid import Fit
from .selection import FirstFrame, Padding, Policy, SelectionConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Video = Annotated[str, typer.Argument(metavar="VIDEO", help="File, http(s):// or any fsspec address.")]
NumFrames = Annotated[int, typer.Option(min=1, help="Frames to sample, first and last included.")]
Size = Annotated[str, typer.Option(help="Side of the square frame in pixels, or HEIGHTxWIDTH.")]
FitOption = Annotated[Fit, typer.Option(help="How the picture meets the frame.")]
PatchSize = Annotated[int, typer.Option(help="Side of a patch in pixels; divides the size.")]
NumPatches = Annotated[int, typer.Option(help="Exact number of patches to keep.")]
PolicyOption = Annotated[Policy, typer.Option(help="Which patches to keep.")]
Block = Annotated[int, typer.Option(help="2 keeps whole 2x2 blocks.")]
FirstFrameOption = Annotated[FirstFrame, typer.Option(help="Keep all of the first frame, or let it compete.")]
PaddingOption = Annotated[Padding, typer.Option(help="Never keep letterbox patches, or treat them as black picture.")]
MotionWeight = Annotated[float, typer.Option(help="How much more an error counts where things move.")]
StopBelowError = Annotated[float, typer.Option(help="Keep fewer once all that is missing errs less (grey levels).")]
Seed = Annotated[int, typer.Option(help="Of the random policy.")]
AllowFewer = Annotated[bool, typer.Option("--allow-fewer", help="Keep all of a clip smaller than the budget.")]
VideoRoot = Annotated[Path | None, typer.Option(help="Paths of videos lie below it; default: folder of SOURCE.")]
ImageRoot = Annotated[Path | None, typer.Option(help="Paths of images lie below it; default: folder of SOURCE.")]
Threads = Annotated[int, typer.Option(min=1, help="Parts of the file decoded at the same time.")]

_AS_OPTIONS = {"allow_fewer=True": "--allow-fewer", 'first_frame="selected"': "--first-frame selected"}
_REDRAWN_AFTER_SECONDS = 0.1
_DEFAULT = {field.name: field.default for field in fields(SelectionConfig)}


@dataclass(frozen=True)
class _Request:
    """What `select` and `show` have in common; fields as the options."""

    video: str
    num_frames: int
    size: int | tuple[int, int]
    fit: Fit
    threads: int
    config: SelectionConfig


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Any video file -> the patches that matter, under an exact budget."""
    if show_version:
        typer.echo(f"codec-datasets {version('codec-datasets')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def select(
    context: typer.Context,
    video: Video,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.npz", help="File to write.")],
    measure: Annotated[bool, typer.Option("--measure", help="Also print hold and coverage.")] = False,
    num_frames: NumFrames = 64,
    size: Size = "576",
    fit: FitOption = "letterbox",
    patch_size: PatchSize = _DEFAULT["patch_size"],
    num_patches: NumPatches = _DEFAULT["num_patches"],
    policy: PolicyOption = _DEFAULT["policy"],
    block: Block = _DEFAULT["block"],
    first_frame: FirstFrameOption = _DEFAULT["first_frame"],
    padding: PaddingOption = _DEFAULT["padding"],
    motion_weight: MotionWeight = _DEFAULT["motion_weight"],
    stop_below_error: StopBelowError = _DEFAULT["stop_below_error"],
    seed: Seed = _DEFAULT["seed"],
    allow_fewer: AllowFewer = False,
    threads: Threads = 2,
) -> None:
    """Write the patches that matter to an .npz file."""
    with _clean_errors(output):
        _require_target(output, (".npz",))
        config = _selection_config(context)
        request = _Request(video, num_frames, _parse_size(size), fit, threads, config)
        started = time.perf_counter()
        clip, selection = _read_and_select(request)
        seconds = time.perf_counter() - started
        selection.save_npz(output)
    _print_summary(clip, selection, seconds, measure)
    typer.echo(f"wrote     {output} ({output.stat().st_size / 1e6:.1f} MB)")


@app.command()
def show(
    context: typer.Context,
    video: Video,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help=".png: one picture; .gif, .webp: animated stages.")
    ],
    num_frames: NumFrames = 64,
    size: Size = "576",
    fit: FitOption = "letterbox",
    patch_size: PatchSize = _DEFAULT["patch_size"],
    num_patches: NumPatches = _DEFAULT["num_patches"],
    policy: PolicyOption = _DEFAULT["policy"],
    block: Block = _DEFAULT["block"],
    first_frame: FirstFrameOption = _DEFAULT["first_frame"],
    padding: PaddingOption = _DEFAULT["padding"],
    motion_weight: MotionWeight = _DEFAULT["motion_weight"],
    stop_below_error: StopBelowError = _DEFAULT["stop_below_error"],
    seed: Seed = _DEFAULT["seed"],
    allow_fewer: AllowFewer = False,
    threads: Threads = 2,
) -> None:
    """Draw what is kept: a picture or an animation."""
    with _clean_errors(output):
        _require_target(output, (".png", ".gif", ".webp"))
        config = _selection_config(context)
        request = _Request(video, num_frames, _parse_size(size), fit, threads, config)
        started = time.perf_counter()
        clip, selection = _read_and_select(request)
        seconds = time.perf_counter() - started
        with _status("drawing"):
            _draw(clip, selection, output)
    _print_summary(clip, selection, seconds, measure=False)
    typer.echo(f"wrote     {output} ({output.stat().st_size / 1e6:.1f} MB)")


@app.command()
def convert(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="JSON array, JSON lines, or folder of videos.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    video_root: VideoRoot = None,
    image_root: ImageRoot = None,
    num_frames: NumFrames = 64,
    size: Size = "576",
    fit: FitOption = "letterbox",
    patch_size: PatchSize = _DEFAULT["patch_size"],
    num_patches: NumPatches = _DEFAULT["num_patches"],
    policy: PolicyOption = _DEFAULT["policy"],
    block: Block = _DEFAULT["block"],
    first_frame: FirstFrameOption = _DEFAULT["first_frame"],
    padding: PaddingOption = _DEFAULT["padding"],
    motion_weight: MotionWeight = _DEFAULT["motion_weight"],
    seed: Seed = _DEFAULT["seed"],
    num_mosaics: Annotated[int, typer.Option(min=1, help="Pictures per video; the budget fills them.")] = 8,
    layout: Annotated[Layout, typer.Option(help="File names: of training or of evaluation assets.")] = "training",
    storage: Annotated[Storage, typer.Option(help="As published, or lossless.")] = "jpeg",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG.")] = 95,
    absolute_paths: Annotated[
        bool, typer.Option("--absolute-paths", help="Instead of paths relative to the JSONL.")
    ] = False,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes; 0: in this one, without protection.")] = 1,
    num_shards: Annotated[int, typer.Option(min=1, help="Parts to divide the rows into.")] = 1,
    shard_id: Annotated[int, typer.Option(min=0, help="Part to do.")] = 0,
    limit: Annotated[int | None, typer.Option(min=0, help="Rows to read.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds for one video.")] = None,
    memory_limit: Annotated[int | None, typer.Option(help="MB for one worker.")] = None,
    attempts: Annotated[int, typer.Option(min=1, help="Tries per video and run.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
    verify_videos: Annotated[
        bool, typer.Option("--verify-videos", help="Remake videos whose content has changed; reads all.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look and count, write nothing.")] = False,
) -> None:
    """Make a training set: asset folders and train.jsonl."""
    from .convert import ConvertConfig
    from .convert import convert as convert_data

    with _clean_errors(output):
        config = ConvertConfig(
            selection=_selection_config(context),
            num_frames=num_frames,
            size=_parse_size(size),
            fit=fit,
            assets=AssetConfig(layout, num_mosaics, storage, quality),
            video_root=video_root,
            image_root=image_root,
            absolute_paths=absolute_paths,
            num_workers=num_workers,
            num_shards=num_shards,
            shard_id=shard_id,
            limit=limit,
            time_limit_seconds=time_limit,
            memory_limit_mb=memory_limit,
            attempts=attempts,
            retry_failed=retry_failed,
            verify_videos=verify_videos,
        )
        with _row_counter() as on_progress:
            report = convert_data(source, output, config, dry_run=dry_run, on_progress=on_progress)
        typer.echo(report.summary())
        where = "" if dry_run else f"; see {report.failed}"
        if report.num_failed:
            raise ValueError(f"{report.num_failed} of {report.rows} rows can't be used{where}")


@app.command()
def doctor() -> None:
    """Check what this machine can read and select."""
    from .bitstream import decoder_report

    with _status("testing"):
        report = decoder_report()
    typer.echo(f"python           {sys.version.split()[0]}")
    for package in ("codec-datasets", "numpy", "av", "pillow"):
        typer.echo(f"{package:<16} {version(package)}")
    libraries = " ".join(
        f"{name} {'.'.join(map(str, report.libraries[name]))}" for name in ("libavcodec", "libavformat", "libswscale")
    )
    typer.echo(f"FFmpeg           {libraries}")
    typer.echo(f"decoders         {_present(report.decoders)}")
    typer.echo(f"encoders         {_present(report.encoders)}")
    problems = []
    for name, passed, need in (
        ("H.264 decoder", report.decoders.get("h264", False), "most videos can't be read; reinstall the PyAV wheel"),
        ("motion vectors", report.exports_motion_vectors, "policy energy will not work; reinstall the PyAV wheel"),
        ("coded residual", report.isolated_packets_work, "policy energy uses estimates instead of coded residuals"),
    ):
        typer.echo(f"{name:<16} {'ok' if passed else 'FAILED: ' + need}")
        problems += [] if passed else [name]
    typer.echo(f"CPU cores        {os.cpu_count()}")
    typer.echo("matrix threads   1 while selecting; set OMP_NUM_THREADS=1 for many processes")
    if {"H.264 decoder", "motion vectors"} & set(problems):
        raise typer.Exit(1)


def _present(found: dict[str, bool]) -> str:
    missing = [name for name, is_there in found.items() if not is_there]
    there = " ".join(name for name, is_there in found.items() if is_there)
    return there + (f"  (missing: {' '.join(missing)})" if missing else "")


def _selection_config(context: typer.Context) -> SelectionConfig:
    """The selection options of a command; each is named as its field."""
    names = [field.name for field in fields(SelectionConfig) if field.name in context.params]
    return SelectionConfig(**{name: context.params[name] for name in names})


def _read_and_select(request: _Request) -> tuple:
    """`(Clip, Selection)` of a request."""
    from .front_end import read_and_select

    with _progress(f"reading {_fitting(Path(request.video).name, 40)}") as on_progress:
        return read_and_select(
            request.video,
            request.config,
            num_frames=request.num_frames,
            size=request.size,
            fit=request.fit,
            num_threads=request.threads,
            on_progress=on_progress,
        )


def _draw(clip, selection, output: Path) -> None:
    from .show import draw_selection, draw_stages, frame_milliseconds, save_picture

    if output.suffix.lower() == ".png":
        save_picture(draw_selection(clip, selection), output)
    else:
        save_picture(draw_stages(clip, selection), output, frame_milliseconds(clip.pts_seconds))


def _print_summary(clip, selection, seconds: float, measure: bool) -> None:
    video, grid = clip.video, selection.grid
    per_frame = grid.content.size if selection.config.padding == "zero" else int(grid.content.sum())
    total = grid.num_frames * per_frame
    kept = len(selection.patches)
    typer.echo(f"video     {_fitting(Path(video.path).name)}")
    typer.echo(
        f"          {video.codec}, {video.width}x{video.height}, {video.duration_seconds:.1f} s, "
        f"{video.num_frames} frames, {grid.num_frames} sampled"
    )
    typer.echo(f"kept      {kept} of {total} patches ({kept / total:.0%}), policy {selection.config.policy}")
    for signal, counts in (selection.signal_sources or {}).items():
        typer.echo(f"{signal:<9} " + ", ".join(f"{source} in {count} frames" for source, count in counts.items()))
    if kept < selection.config.num_patches:
        typer.echo(f"          fewer than the budget of {selection.config.num_patches}")
    if measure:
        from .measures import coverage_psnr, hold_psnr

        with _status("measuring"):
            hold = hold_psnr(clip.frames, grid, selection.patch_positions)
            coverage = coverage_psnr(clip.frames, grid, selection.patch_positions)
        typer.echo(f"hold      {hold:.1f} dB\ncoverage  {coverage:.1f} dB")  # inf dB: nothing is lost
    typer.echo(f"took      {seconds:.1f} s")


def _fitting(name: str, width: int = 68) -> str:
    return name if len(name) <= width else f"{name[: width - 23]}...{name[-20:]}"


def _parse_size(text: str) -> int | tuple[int, int]:
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--size must be a positive number of pixels or HEIGHTxWIDTH, got {text!r}")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _require_target(output: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a target that can't be written before any work is done."""
    if output.suffix.lower() not in suffixes:
        raise ValueError(f"{output}: the name must end in {' or '.join(suffixes)}")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output}: the folder {output.parent} does not exist")
    if output.is_dir():
        raise ValueError(f"{output}: is a folder; name a file")


@contextmanager
def _clean_errors(output: Path) -> Iterator[None]:
    """One line on stderr and exit code 1 instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            place = str(error.filename or output)
            message = f"{output if place.endswith('.tmp') else place}: {error.strerror}"
        for python, option in _AS_OPTIONS.items():
            message = message.replace(python, option)
        typer.echo("error: " + " ".join(message.split()), err=True)
        raise typer.Exit(1) from error


@contextmanager
def _progress(message: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr that fills with `(done, total)` and vanishes; None unless stderr is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(message, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _row_counter() -> Iterator[Callable[[int, int], None] | None]:
    """A line on stderr with `(rows, failures)` that vanishes; None unless stderr is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    shown_at = 0.0
    with _status("converting") as status:

        def show(rows: int, failures: int) -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at > _REDRAWN_AFTER_SECONDS:
                shown_at = time.monotonic()
                status.update(f"converting: {rows} rows, {failures} failed")

        yield show


def _status(message: str):
    """A spinner on stderr while something takes long; nothing unless stderr is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(message)


if __name__ == "__main__":
    app()
