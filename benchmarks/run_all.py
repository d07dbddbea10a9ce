# SPDX-License-Identifier: Apache-2.0
"""Run every benchmark and write what they print to RESULTS.md, below its hand-written part.

    python benchmarks/run_all.py [NAME ...]

A benchmark that fails or does not fit the machine leaves its last lines in the file instead of numbers.
"""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
MARK = "<!-- measured: everything below is written by run_all.py -->\n"
NAMES = ("front_end", "long_files", "quality", "encoder_cpu", "encoder_gpu")


def run(name: str) -> str:
    """What one benchmark printed, as Markdown."""
    print(f"==> {name}", flush=True)
    done = subprocess.run([sys.executable, FOLDER / f"{name}.py"], capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout
    last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-3:])
    return f"## {name}: not measured\n\n`python benchmarks/{name}.py` ended with:\n\n```\n{last}\n```\n"


def main() -> None:
    names = sys.argv[1:] or NAMES
    unknown = set(names) - set(NAMES)
    if unknown:
        sys.exit(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    head = RESULTS.read_text().split(MARK)[0] if RESULTS.exists() else "# Results\n\n"
    RESULTS.write_text(head + MARK + "\n" + "\n".join(run(name) for name in names))
    print(f"==> wrote {RESULTS}")


if __name__ == "__main__":
    main()
