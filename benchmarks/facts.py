# SPDX-License-Identifier: Apache-2.0
"""What every benchmark prints beside its numbers, and where it finds clips."""

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
VIDEOS = Path(os.environ.get("CODEC_VIDEOS", REPOSITORY.parent / "shared" / "videos"))
PACKAGES = ("numpy", "av", "pillow", "torch", "transformers")


def single_thread() -> None:
    """One BLAS thread, so that CPU time is time on one core. Call before numpy is imported."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def processor() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )


def print_header(title: str) -> None:
    """Title, command, machine, versions and date as Markdown."""
    command = "python " + " ".join([str(Path(sys.argv[0]).resolve().relative_to(REPOSITORY)), *sys.argv[1:]])
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    print(f"## {title}\n")
    print(
        f"`{command}` · {datetime.date.today()} · {processor()}, {os.cpu_count()} cores · "
        f"Python {platform.python_version()}, {', '.join(versions)}\n"
    )


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """A Markdown table followed by an empty line."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def find_clips() -> list[Path]:
    """Video files of the clip folder, or exit with what to set."""
    clips = sorted(path for path in VIDEOS.glob("*") if path.suffix in (".mp4", ".mkv", ".webm", ".mov"))
    if not clips:
        sys.exit(f"no clips in {VIDEOS}; set CODEC_VIDEOS to a folder of videos")
    return clips
