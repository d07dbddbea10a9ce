# SPDX-License-Identifier: Apache-2.0
"""Speed of the encoder on a CPU: sdpa against eager attention, and a packed ragged batch against a padded one.

    python benchmarks/encoder_cpu.py --output encoder_cpu.json

Both sides of a ratio run in turns within one process, so that a slow moment of the machine meets both.
"""

import argparse
import json
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from facts import print_header, print_table, processor

from onevision_encoder import OneVisionEncoderConfig, OneVisionEncoderModel

PATCH_SIZE = 14
PATCH_DIM = 3 * PATCH_SIZE**2


def measure_in_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time functions in turns.

    Args:
        runs: name -> function; each runs once before the clock starts.
        repeats: timed runs of each.

    Returns:
        Name -> median seconds.
    """
    for run in runs.values():
        run()
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = perf_counter()
            run()
            seconds[name].append(perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def build_model(arguments: argparse.Namespace, attn_implementation: str) -> OneVisionEncoderModel:
    """Build a random encoder of the size asked for; the same weights for every attention implementation."""
    torch.manual_seed(0)
    config = OneVisionEncoderConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden_size // 64,
    )
    return OneVisionEncoderModel._from_config(config, attn_implementation=attn_implementation).eval()


def patch_sequence(lengths: list[int], size: int) -> dict[str, torch.Tensor]:
    """Random items of the given lengths, in patches, in rows of `size`."""
    pixel_values = torch.randn(len(lengths), size, PATCH_DIM)
    position_ids = torch.randint(0, 36, (len(lengths), size, 3))
    for row, length in enumerate(lengths):
        position_ids[row, length:] = -1
        pixel_values[row, length:] = 0
    return {"pixel_values": pixel_values, "image_position_ids": position_ids}


def compare_attention(arguments: argparse.Namespace) -> dict[str, float]:
    """Time one item of `--tokens` patches with eager attention and with sdpa."""
    inputs = patch_sequence([arguments.tokens], arguments.tokens)
    models = {name: build_model(arguments, name) for name in ("eager", "sdpa")}
    return measure_in_turns({name: lambda m=model: m(**inputs) for name, model in models.items()}, arguments.repeats)


def compare_packing(arguments: argparse.Namespace) -> dict[str, float]:
    """Time a batch that is half padding, packed as the model does it, and with every padded row as a token."""
    size = arguments.tokens // 4
    lengths = [size, size // 4, size // 2, size // 4]  # half of 4 * size
    ragged = patch_sequence(lengths, size)
    padded = {**ragged, "image_position_ids": ragged["image_position_ids"].clamp(min=0)}
    model = build_model(arguments, "sdpa")
    return measure_in_turns({"padded": lambda: model(**padded), "packed": lambda: model(**ragged)}, arguments.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="patches of the attention comparison")
    parser.add_argument("--hidden-size", type=int, default=1024, help="width; heads are 64 wide")
    parser.add_argument("--layers", type=int, default=2, help="blocks; the ratios hardly depend on it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        attention, packing = compare_attention(arguments), compare_packing(arguments)
    rows = [
        {
            "what": f"eager against sdpa, {arguments.tokens} tokens",
            "goal": 1.3,
            **as_ratio(attention, "eager", "sdpa"),
        },
        {"what": "padded against packed, 50 % padding", "goal": 1.5, **as_ratio(packing, "padded", "packed")},
    ]
    print_header(f"Encoder on {torch.get_num_threads()} CPU threads")
    cells = [
        [x["what"], f"{x['slow_seconds']:.3f} s", f"{x['fast_seconds']:.3f} s", f"{x['ratio']:.2f}", f"{x['goal']}"]
        for x in rows
    ]
    print_table(["", "first", "second", "ratio", "goal"], cells)
    if arguments.output is not None:
        facts = {"date": f"{date.today()}", "machine": processor(), "threads": torch.get_num_threads()}
        facts |= {"torch": torch.__version__, "transformers": version("transformers")}
        settings = {name: getattr(arguments, name) for name in ("tokens", "hidden_size", "layers", "repeats")}
        arguments.output.write_text(json.dumps({**facts, "settings": settings, "results": rows}, indent=2) + "\n")


def as_ratio(seconds: dict[str, float], slow: str, fast: str) -> dict[str, float]:
    """Turn two times into one row of results."""
    return {"slow_seconds": seconds[slow], "fast_seconds": seconds[fast], "ratio": seconds[slow] / seconds[fast]}


if __name__ == "__main__":
    main()
