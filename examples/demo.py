# SPDX-License-Identifier: Apache-2.0
"""See the whole visual path on one clip: video -> selected patches -> encoder.

Run it as `python examples/demo.py [--video FILE] [--model HUB_ID_OR_FOLDER] [--output FOLDER]`, or `make demo`.
"""

import argparse
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from codec_datasets import (
    POLICIES,
    Clip,
    Selection,
    SelectionConfig,
    coverage_psnr,
    hold_psnr,
    read_clip,
    select_clip,
)
from codec_datasets.show import draw_selection, draw_stages, frame_milliseconds, save_picture
from onevision_encoder import (
    OneVisionEncoderConfig,
    OneVisionEncoderModel,
    OneVisionEncoderVideoProcessor,
)

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = "lmms-lab-encoder/onevision-encoder-large"
DEFAULT_POLICY = "replenish"
NUM_FRAMES, GRID_SIDE = 64, 36
BUDGET = 8 * GRID_SIDE**2  # as many patches as eight whole square frames


@dataclass(frozen=True)
class PolicyResult:
    """One policy at the common budget.

    Attributes:
        selection: what it kept.
        hold, coverage: PSNR in dB.
        seconds: of the selection alone.
    """

    selection: Selection
    hold: float
    coverage: float
    seconds: float


def load_encoder(name: str | None) -> tuple[torch.nn.Module, OneVisionEncoderVideoProcessor, str]:
    """The encoder, its video processor and a line that says which one it is.

    Args:
        name: hub id or folder; None builds a small one with random weights, always the same.

    Raises:
        OSError: if it can't be found.
        ValueError: if it is another kind of model.
    """
    if name is None:
        torch.manual_seed(0)
        config = OneVisionEncoderConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, patch_size=16
        )
        return OneVisionEncoderModel(config).eval(), OneVisionEncoderVideoProcessor(), "small, random weights"
    try:
        model = AutoModel.from_pretrained(name, trust_remote_code=False)
        processor = OneVisionEncoderVideoProcessor.from_pretrained(name)
    except OSError as error:
        raise OSError(f"model {name}: {_first_line(error)}") from error
    if model.config.model_type != OneVisionEncoderConfig.model_type:
        raise ValueError(f"{name} is a {model.config.model_type} model, expected a OneVision encoder")
    return model.eval(), processor, name


def compare_policies(clip: Clip, patch_size: int, budget: int = BUDGET) -> dict[str, PolicyResult]:
    """Select by every policy at the same budget; a clip with fewer patches gives all it has."""
    results = {}
    for policy in POLICIES:
        config = SelectionConfig(patch_size=patch_size, num_patches=budget, policy=policy, allow_fewer=True)
        started = time.perf_counter()
        selection = select_clip(clip, config)
        seconds = time.perf_counter() - started
        measured = (clip.frames, selection.grid, selection.patch_positions)
        results[policy] = PolicyResult(selection, hold_psnr(*measured), coverage_psnr(*measured), seconds)
    return results


def encode(
    path: str, model: torch.nn.Module, processor: OneVisionEncoderVideoProcessor, num_patches: int
) -> tuple[torch.Tensor, float]:
    """`(num_patches, hidden_size)` features of the kept patches, and the seconds of the encoder alone."""
    inputs = processor(
        path,
        sampling="codec",
        num_frames=NUM_FRAMES,
        patch_size=model.config.patch_size,
        num_patches=num_patches,
        return_tensors="pt",
    ).to(model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        features = model(**inputs).last_hidden_state[0].cpu()
    return features, time.perf_counter() - started


def write_results(clip: Clip, selection: Selection, folder: Path) -> list[Path]:
    """Write the picture, the animation and the selection itself; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("selection.png", "stages.gif", "selection.npz")]
    save_picture(draw_selection(clip, selection), paths[0])
    save_picture(draw_stages(clip, selection), paths[1], frame_milliseconds(clip.pts_seconds))
    selection.save_npz(paths[2])
    return paths


def policy_table(results: dict[str, PolicyResult]) -> Table:
    """Policies side by side, the default one marked."""
    table = Table(title="The same budget, spent by each policy", title_justify="left", title_style="bold")
    table.add_column("policy")
    for heading in ("patches", "frames used", "hold dB", "coverage dB", "seconds"):
        table.add_column(heading, justify="right")
    for policy, result in results.items():
        touched = int((result.selection.patches_per_frame > 0).sum())
        table.add_row(
            policy + (" *" if policy == DEFAULT_POLICY else ""),
            f"{len(result.selection.patches):,}",
            str(touched),
            f"{result.hold:.1f}",
            f"{result.coverage:.1f}",
            f"{result.seconds:.2f}",
        )
    table.caption, table.caption_justify = "* default; more dB is better; uniform is what most models do", "left"
    return table


def stage_table(stages: dict[str, tuple[str, float]]) -> Table:
    """What came out of each stage, and its seconds."""
    table = Table(title="Stage by stage", title_justify="left", title_style="bold")
    table.add_column("stage")
    table.add_column("result")
    table.add_column("seconds", justify="right")
    for stage, (result, seconds) in stages.items():
        table.add_row(stage, result, f"{seconds:.2f}")
    return table


def run(video: str, model_name: str | None, folder: Path, console: Console) -> None:
    """The demo.

    Raises:
        ValueError, OSError: with one readable message, for videos and models that can't be used.
    """
    with console.status("loading the encoder"):
        model, processor, encoder_name = load_encoder(model_name)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    patch_size = model.config.patch_size
    with console.status("reading the video"):
        started = time.perf_counter()
        clip = read_clip(video, NUM_FRAMES, GRID_SIDE * patch_size, coded=True)
        read_seconds = time.perf_counter() - started
    with console.status("selecting by every policy"):
        results = compare_policies(clip, patch_size)
    chosen = results[DEFAULT_POLICY]
    num_patches = len(chosen.selection.patches)
    with console.status("encoding"):
        features, encode_seconds = encode(video, model, processor, num_patches)
    with console.status("drawing"):
        paths = write_results(clip, chosen.selection, folder)
    facts = clip.video
    total = len(clip.frames) * int(chosen.selection.grid.content.sum())
    console.print(f"video    {Path(video).name}", highlight=False, markup=False, overflow="ellipsis", no_wrap=True)
    console.print(
        f"encoder  {encoder_name}, on {model.device.type}",
        highlight=False,
        markup=False,
        overflow="ellipsis",
        no_wrap=True,
    )
    if model_name is None:
        console.print(f"weights  make demo MODEL={PUBLISHED}", highlight=False, soft_wrap=True)
    if num_patches < BUDGET:
        console.print(f"note     the clip holds only {num_patches:,} patches, fewer than {BUDGET:,}: all are kept")
    console.print()
    console.print(policy_table(results))
    console.print()
    seconds = f"{facts.duration_seconds:.1f} s of {facts.codec} {facts.width}x{facts.height}"
    stages = {
        "probe, decode": (f"{seconds} -> {len(clip.frames)} frames", read_seconds),
        "select": (f"{num_patches:,} of {total:,} patches ({num_patches / total:.0%})", chosen.seconds),
        "encode": (f"features {' x '.join(f'{side:,}' for side in features.shape)}", encode_seconds),
    }
    console.print(stage_table(stages))
    console.print()
    for path in paths:
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        console.print(f"wrote    {shown}", highlight=False, markup=False, soft_wrap=True)


def _first_line(error: Exception) -> str:
    """What a person needs of an error; transformers adds paragraphs."""
    if isinstance(error, OSError) and error.strerror:
        place = Path(error.filename or "")
        place = place.parent if place.suffix == ".tmp" else place  # written under a temporary name
        return f"{place}: {error.strerror}" if error.filename else error.strerror
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--video", default=str(ROOT / "examples" / "demo_clip.mp4"), help="default: the demo clip")
    parser.add_argument("--model", help=f"hub id or folder, e.g. {PUBLISHED}; default: a small random encoder")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "demo", help="default: outputs/demo")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a hub out of reach is reported once, at the end
    try:
        run(options.video, options.model, options.output, Console())
    except (ValueError, OSError) as error:
        print(f"error: {_first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
