# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of the large encoder on a CUDA device, per attention implementation, forward and training step.

    python benchmarks/encoder_gpu.py --output encoder_gpu.json

"of matmul" is the rate of the encoder's arithmetic, counted as 2 per multiply-add of its linear layers and attention,
three times that for a training step, over the bfloat16 rate measured on one large matrix product in the same run.
"""

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from facts import print_header, print_table

from onevision_encoder import OneVisionEncoderConfig, OneVisionEncoderModel
from onevision_encoder.conversion import PRESETS

IMPLEMENTATIONS = ("eager", "sdpa", "torch_varlen", "flex_attention", "flash_attention_2", "flash_attention_3")
NEEDED_MODULES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def measure(run: Callable[[], object], repeats: int) -> float:
    """Time a function on the device: median seconds of `repeats` runs after three that do not count."""
    for _ in range(3):
        run()
    seconds = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(stop) / 1000)
    return median(seconds)


def matmul_rate(repeats: int) -> float:
    """Measure the bfloat16 rate of one 8192 x 8192 x 8192 product, operations per second."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / measure(lambda: a @ b, repeats)


def count_operations(config: OneVisionEncoderConfig, lengths: list[int]) -> float:
    """Count the operations of one forward pass over items of the given lengths, blocks only."""
    width, tokens = config.hidden_size, sum(lengths)
    linear = 2 * tokens * (4 * width**2 + 2 * width * config.intermediate_size)
    attention = sum(4 * length**2 * width for length in lengths)
    return config.num_hidden_layers * (linear + attention)


def patch_sequence(lengths: list[int], patch_dim: int) -> dict[str, torch.Tensor]:
    """Random items of the given lengths, in patches, on the device."""
    size = max(lengths)
    pixel_values = torch.randn(len(lengths), size, patch_dim, device="cuda", dtype=torch.bfloat16)
    position_ids = torch.randint(0, 36, (len(lengths), size, 3), device="cuda")
    for row, length in enumerate(lengths):
        position_ids[row, length:] = -1
    return {"pixel_values": pixel_values, "image_position_ids": position_ids}


def training_step(model: OneVisionEncoderModel, inputs: dict[str, torch.Tensor]) -> None:
    """Run forward and backward once."""
    model.zero_grad(set_to_none=True)
    model(**inputs).pooler_output.float().square().sum().backward()


def run_case(implementation: str, lengths: list[int], arguments: argparse.Namespace, rate: float) -> list[dict]:
    """Measure forward and training step of one implementation on one batch."""
    config = OneVisionEncoderConfig(**PRESETS[arguments.preset])
    model = OneVisionEncoderModel._from_config(config, attn_implementation=implementation, dtype=torch.bfloat16).cuda()
    inputs = patch_sequence(lengths, 3 * config.patch_size**2)
    operations, rows = count_operations(config, lengths), []

    def forward() -> None:
        with torch.no_grad():
            model(**inputs)

    for what, run, factor in (("forward", forward, 1), ("training step", lambda: training_step(model, inputs), 3)):
        row = {"attention": implementation, "lengths": lengths, "what": what}
        try:
            seconds = measure(run, arguments.repeats)
        except torch.OutOfMemoryError:
            rows.append(row | {"error": "out of memory"})
            continue
        share = factor * operations / seconds / rate
        rows.append(row | {"seconds": seconds, "tokens_per_second": sum(lengths) / seconds, "of_matmul": share})
    return rows


def is_available(implementation: str) -> bool:
    """Say whether the package of an implementation is installed."""
    return implementation not in NEEDED_MODULES or find_spec(NEEDED_MODULES[implementation]) is not None


def as_cells(row: dict) -> list[str]:
    """Format one row of the table."""
    head = [row["attention"], "+".join(map(str, row["lengths"])), row["what"]]
    if "error" in row:
        return [*head, row["error"], ""]
    return [*head, f"{row['tokens_per_second']:,.0f}", f"{row['of_matmul']:.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="large")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 10368], help="patches of one item")
    parser.add_argument("--attention", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("No CUDA device found: this benchmark measures one. benchmarks/encoder_cpu.py runs without.")
    rate, rows = matmul_rate(arguments.repeats), []
    batches = [[tokens] for tokens in arguments.tokens] + [[tokens, tokens // 2] for tokens in arguments.tokens]
    for implementation in filter(is_available, arguments.attention):
        for lengths in batches:
            rows += run_case(implementation, lengths, arguments, rate)
            torch.cuda.empty_cache()
    device, matmul = torch.cuda.get_device_name(), f"{rate / 1e12:.0f} TFLOP/s"
    print_header(f"Encoder {arguments.preset} on {device}, bfloat16 matmul {matmul}")
    print_table(["attention", "patches", "", "tokens/s", "of matmul"], [as_cells(row) for row in rows])
    if arguments.output is not None:
        facts = {"date": f"{date.today()}", "machine": device, "matmul_bf16": matmul, "torch": torch.__version__}
        facts |= {"transformers": version("transformers"), "preset": arguments.preset}
        arguments.output.write_text(json.dumps({**facts, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
