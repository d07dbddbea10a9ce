# SPDX-License-Identifier: Apache-2.0
"""Tiny encoders and inputs with known layouts, shared by the encoder tests."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from onevision_encoder import OneVisionEncoderConfig, OneVisionEncoderModel

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = Path(os.environ.get("CODEC_FIXTURES") or REPOSITORY.parent / "shared" / "fixtures") / "onevision_encoder"
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}


def pytest_generate_tests(metafunc):
    """Parametrise `case_folder` over the fixture folders found."""
    if "case_folder" not in metafunc.fixturenames:
        return
    folders = sorted(path for path in FIXTURES.glob("*") if path.is_dir())
    if not folders and "CODEC_FIXTURES" in os.environ:
        raise FileNotFoundError(f"CODEC_FIXTURES is set, but {FIXTURES} holds no case")
    absent = [pytest.param(None, marks=pytest.mark.skip(reason=f"no fixtures at {FIXTURES}"))]
    metafunc.parametrize("case_folder", folders or absent, ids=lambda path: path.name if path else "absent")


@pytest.fixture
def config():
    return OneVisionEncoderConfig(**TINY)


@pytest.fixture
def build_model():
    """A function that builds the tiny model with fixed weights, on any attention implementation."""

    def build(attn_implementation="sdpa", **fields):
        torch.manual_seed(0)
        config = OneVisionEncoderConfig(**{**TINY, **fields})
        return OneVisionEncoderModel._from_config(config, attn_implementation=attn_implementation).eval()

    return build


@pytest.fixture
def ragged():
    """Four items of 20, 5, 20 and 1 patches; padding in front, behind and in between; NaN pixels on padding."""
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(4, 20, 48, generator=generator)
    position_ids = torch.randint(0, 64, (4, 20, 3), generator=generator)
    is_padding = torch.zeros(4, 20, dtype=torch.bool)
    is_padding[1, [0, 1, 2, 3, 5, 6, 8, 9, 10, 11, 12, 13, 16, 18, 19]] = True
    is_padding[3, 1:] = True
    position_ids[is_padding] = -1
    pixel_values[is_padding] = float("nan")
    return {"pixel_values": pixel_values, "image_position_ids": position_ids}


@pytest.fixture
def frames():
    """`(12, 40, 60, 3)` uint8 frames."""
    return np.random.default_rng(0).integers(0, 256, (12, 40, 60, 3), dtype=np.uint8)


@pytest.fixture
def run_without():
    """A function that runs code in a new process where importing the given modules fails as if not installed."""

    def run(modules, code, cwd=None):
        header = (
            "import sys\n"
            "class Block:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.split('.')[0] in {set(modules)!r}:\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
            "sys.meta_path.insert(0, Block())\n"
            "import importlib.metadata as metadata, importlib.util as util\n"
            "find_spec = util.find_spec\n"
            f"blocked = {set(modules)!r}\n"
            "util.find_spec = lambda name, *a: None if name.split('.')[0] in blocked else find_spec(name, *a)\n"
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        if cwd is not None:
            environment["HF_MODULES_CACHE"] = str(Path(cwd) / "modules")
        done = subprocess.run(
            [sys.executable, "-c", header + code],
            capture_output=True,
            text=True,
            env=environment,
            cwd=cwd,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
