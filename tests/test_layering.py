# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: a module imports only what stands above it, a package only what it promises."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = REPOSITORY / "packages"
CODEC_DATASETS = PACKAGES / "codec_datasets" / "src" / "codec_datasets"
READING_ORDER = [
    "errors",
    "files",
    "workers",
    "blas",
    "grid",
    "bitstream",
    "video",
    "clip",
    "signals",
    "scoring",
    "distances",
    "policies",
    "selection",
    "streaming",
    "packing",
    "measures",
    "front_end",
    "json_rows",
    "conversations",
    "assets",
    "making",
    "convert",
    "show",
    "cli",
]
PYAV_MODULES = {"bitstream", "video", "clip"}
SOURCES = sorted(
    path
    for folder in ("packages", "tests", "benchmarks", "examples")
    for path in (REPOSITORY / folder).rglob("*.py")
    if not {".venv", "build", "__pycache__"} & set(path.parts)
)


def _imports(path):
    """`(module names, True for relative imports)` anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((name, node.level > 0) for name in names)


def _modules():
    return sorted(path for path in CODEC_DATASETS.glob("*.py") if path.stem != "__init__")


def test_reading_order_names_every_module():
    assert sorted(READING_ORDER) == [path.stem for path in _modules()]


@pytest.mark.parametrize("path", _modules(), ids=lambda path: path.stem)
def test_imports_point_upstream(path):
    above = set(READING_ORDER[: READING_ORDER.index(path.stem)])
    imported = {name.split(".")[0] for name, is_relative in _imports(path) if is_relative}
    assert imported <= above, f"{path.stem} imports {sorted(imported - above)}, which stand below it"
    absolute = {name.split(".")[0] for name, is_relative in _imports(path) if not is_relative}
    assert not absolute & {"codec_datasets", "onevision_encoder", "llava_codec", "torch"}


@pytest.mark.parametrize("path", _modules(), ids=lambda path: path.stem)
def test_pyav_has_three_homes(path):
    imports_av = any(name.split(".")[0] == "av" for name, is_relative in _imports(path) if not is_relative)
    assert imports_av == (path.stem in PYAV_MODULES)


def test_exports_follow_the_reading_order():
    tree = ast.parse((CODEC_DATASETS / "__init__.py").read_text(encoding="utf-8"))
    modules = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    assert modules == sorted(modules, key=READING_ORDER.index)


@pytest.mark.parametrize(
    ("package", "unwanted"),
    [
        ("codec_datasets", "torch datasets transformers PIL typer rich"),
        ("onevision_encoder", "av codec_datasets datasets"),
    ],
)
def test_packages_import_no_more_than_they_need(package, unwanted):
    program = f"import sys, {package}; print([name for name in {unwanted.split()!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_state_their_licence(path):
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    assert first == "# SPDX-License-Identifier: Apache-2.0"
