# SPDX-License-Identifier: Apache-2.0
"""Command line: what it writes, what it prints, one line per error."""

import errno
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from codec_datasets import Selection, SelectionConfig, bitstream, cli, load_npz, select_video
from codec_datasets import convert as convert_module
from codec_datasets.assets import AssetConfig
from codec_datasets.convert import ConvertConfig

SMALL = ["--size", "128", "--num-patches", "200"]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """24 frames of a square that moves over texture, 128 x 96, H.264."""
    path = tmp_path_factory.mktemp("cli") / "moving square.mp4"
    ground = np.random.default_rng(0).integers(40, 200, (12, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for t in range(24):
            frame = ground.copy()
            frame[32:64, 4 * t : 4 * t + 32] = (230, 30, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


def test_help_and_version():
    assert run("--version").stdout.startswith("codec-datasets 0.")
    for command in ((), ("select",), ("show",), ("convert",), ("doctor",)):
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert max(map(len, result.stdout.splitlines())) <= 80


def test_defaults_are_those_of_the_library():
    command = next(command for command in cli.app.registered_commands if command.name in (None, "select"))
    defaults = dict(zip(command.callback.__code__.co_varnames[: command.callback.__code__.co_argcount], [None] * 99))
    values = command.callback.__defaults__
    defaults.update(zip(list(defaults)[-len(values) :], values))
    for field in fields(SelectionConfig):
        assert defaults[field.name] == field.default
    library = select_video.__kwdefaults__
    assert (defaults["num_frames"], int(defaults["size"]), defaults["fit"], defaults["threads"]) == (
        library["num_frames"],
        library["size"],
        library["fit"],
        library["num_threads"],
    )


def test_defaults_of_convert_are_those_of_the_library():
    parameters = inspect.signature(cli.convert).parameters
    library = ConvertConfig()
    owners = [(library.selection, SelectionConfig), (library.assets, AssetConfig), (library, ConvertConfig)]
    for owner, kind in owners:
        for name in {field.name for field in fields(kind)} & parameters.keys() - {"size"}:
            assert parameters[name].default == getattr(owner, name), name
    assert int(parameters["size"].default) == library.size
    absent = {"allow_fewer", "stop_below_error", "selection", "assets", "time_limit_seconds", "memory_limit_mb"}
    assert {field.name for _, kind in owners for field in fields(kind)} - parameters.keys() == absent


def test_select_writes_what_the_library_selects(video, tmp_path):
    result = run("select", video, "-o", tmp_path / "out.npz", *SMALL, "--num-frames", 12, "--measure")
    assert result.exit_code == 0, result.output
    stored = load_npz(tmp_path / "out.npz")
    expected = select_video(video, num_frames=12, size=128, num_patches=200)
    assert np.array_equal(stored.patch_positions, expected.patch_positions)
    assert np.array_equal(stored.patches, expected.patches)
    assert "h264, 128x96, 2.0 s, 24 frames, 12 sampled" in result.stdout
    assert "kept      200 of 576 patches (35%), policy replenish" in result.stdout
    assert re.search(r"^hold +(\d+\.\d|inf) dB$", result.stdout, re.MULTILINE)
    assert re.search(r"^coverage +(\d+\.\d|inf) dB$", result.stdout, re.MULTILINE)
    assert "\x1b" not in result.stdout


def test_every_option_reaches_the_selection(video, tmp_path):
    options = {
        "patch_size": 8,
        "num_patches": 400,
        "policy": "coverage",
        "block": 2,
        "first_frame": "selected",
        "padding": "zero",
        "motion_weight": 1.5,
        "stop_below_error": 2.0,
        "seed": 7,
    }
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    result = run(
        "select", video, "-o", tmp_path / "a.npz", *flags, "--allow-fewer", "--size", "64x128", "--fit", "crop",
        "--threads", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    stored = load_npz(tmp_path / "a.npz")
    assert stored.config == SelectionConfig(**options, allow_fewer=True)
    assert stored.grid.shape == (24, 8, 16)


def test_energy_repeats_frames_of_short_videos(video, tmp_path):
    result = run("select", video, "-o", tmp_path / "a.npz", *SMALL, "--policy", "energy")
    assert result.exit_code == 0, result.output
    expected = select_video(video, size=128, num_patches=200, policy="energy")
    assert np.array_equal(load_npz(tmp_path / "a.npz").patch_positions, expected.patch_positions)


def test_fewer_than_the_budget_is_said(video, tmp_path):
    arguments = ("select", video, "-o", tmp_path / "a.npz", "--size", 128, "--num-patches", 5000)
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert "num_patches=5000 can't be met" in refused.stderr
    assert "use --allow-fewer" in refused.stderr
    assert not list(tmp_path.iterdir())
    result = run(*arguments, "--allow-fewer")
    assert result.exit_code == 0
    assert "fewer than the budget of 5000" in result.stdout


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp"])
def test_show_writes_pictures(video, tmp_path, suffix):
    target = tmp_path / f"a{suffix}"
    result = run("show", video, "-o", target, *SMALL, "--num-frames", 6)
    assert result.exit_code == 0, result.output
    with Image.open(target) as picture:
        assert getattr(picture, "n_frames", 1) == (1 if suffix == ".png" else 6)
    assert f"wrote     {target}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("select", "missing.mp4", "-o", "a.npz"), "missing.mp4: open: no such file"),
        (("select", "VIDEO", "-o", "a.txt"), "a.txt: the name must end in .npz"),
        (("show", "VIDEO", "-o", "a.jpg"), "a.jpg: the name must end in .png or .gif or .webp"),
        (("select", "VIDEO", "-o", "no/a.npz"), "the folder no does not exist"),
        (("select", "VIDEO", "-o", "a.npz", "--size", "130"), "not divisible by patch_size 16"),
        (("select", "VIDEO", "-o", "a.npz", "--size", "1x2x3"), "--size must be"),
        (("select", "VIDEO", "-o", "a.npz", "--size", "big"), "--size must be"),
        (("select", "VIDEO", "-o", "a.npz", "--block", "3"), "block must be one of"),
        (
            ("select", "VIDEO", "-o", "a.npz", "--policy", "energy", "--motion-weight", "1"),
            "motion_weight=1.0 has no meaning",
        ),
        (("convert", "no.json", "out"), "no.json: no such file or folder"),
        (("convert", "VIDEO", "VIDEO"), "assets: Not a directory"),
        (("convert", "VIDEO", "out", "--num-patches", "1000"), "1000 patches don't fill 8 square mosaics; use 968 or"),
        (("convert", "VIDEO", "out", "--shard-id", "2"), "shard_id must be 0 to num_shards - 1, got 2 of 1"),
    ],
)
def test_errors_are_one_line(video, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(*(str(video) if argument == "VIDEO" else argument for argument in arguments))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_convert_makes_a_training_set(video, tmp_path):
    result = run("convert", video.parent, tmp_path / "out", "--size", 128, "--num-patches", 128, "--num-workers", 0)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[:3] == ["rows      1", "written   1 video", "videos    1 missing before"]
    assert f"wrote     {tmp_path / 'out' / 'train.jsonl'}" in result.stdout
    [line] = map(json.loads, (tmp_path / "out" / "train.jsonl").read_text().splitlines())
    assert (line["id"], len(line["image"])) == ("moving square.mp4", 8)


def test_every_option_reaches_the_conversion(video, tmp_path, monkeypatch):
    caught = []
    report = SimpleNamespace(num_failed=0, summary=lambda: "")
    monkeypatch.setattr(convert_module, "convert", lambda *given, **more: caught.append((given, more)) or report)
    selection = {"patch_size": 8, "num_patches": 256, "policy": "coverage", "block": 2, "first_frame": "selected",
                 "padding": "zero", "motion_weight": 1.5, "seed": 7}  # fmt: skip
    assets = {"num_mosaics": 4, "layout": "evaluation", "storage": "webp", "quality": 90}
    others = {"num_frames": 12, "fit": "crop", "num_workers": 3, "num_shards": 4, "shard_id": 2, "limit": 5,
              "attempts": 2, "video_root": tmp_path / "v", "image_root": tmp_path / "i"}  # fmt: skip
    flags = [
        text
        for name, value in (selection | assets | others).items()
        for text in (f"--{name.replace('_', '-')}", value)
    ]
    switches = ["absolute_paths", "retry_failed", "verify_videos", "dry_run"]
    flags += [f"--{name.replace('_', '-')}" for name in switches]
    flags += ["--size", "64x128", "--time-limit", 2.5, "--memory-limit", 800]
    result = run("convert", video, tmp_path / "out", *flags)
    assert result.exit_code == 0, result.output
    [((source, output, config), more)] = caught
    assert (source, output, more) == (video, tmp_path / "out", {"dry_run": True, "on_progress": None})
    assert config == ConvertConfig(
        selection=SelectionConfig(**selection),
        assets=AssetConfig(**assets),
        size=(64, 128),
        time_limit_seconds=2.5,
        memory_limit_mb=800,
        **others,
        **dict.fromkeys(switches[:-1], True),
    )


def test_convert_says_where_failures_are(tmp_path):
    (tmp_path / "raw.json").write_text('[{"id": "a", "video": "no.mp4"}, {"id": "b"}]')
    result = run("convert", tmp_path / "raw.json", tmp_path / "out")
    assert result.exit_code == 1
    assert "failed    2 rows, by stage: 1 find, 1 row" in result.stdout
    assert result.stderr == f"error: 2 of 2 rows can't be used; see {tmp_path / 'out' / 'failed.jsonl'}\n"
    dry = run("convert", tmp_path / "raw.json", tmp_path / "dry", "--dry-run")
    assert dry.exit_code == 1
    assert dry.stderr == "error: 2 of 2 rows can't be used\n"
    assert not (tmp_path / "dry").exists()


def test_unknown_policy_is_a_usage_error(video):
    result = run("select", video, "-o", "a.npz", "--policy", "best")
    assert result.exit_code == 2
    assert "replenish" in result.stderr


def test_full_disk_is_one_line(video, tmp_path, monkeypatch):
    def fill_up(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{path}.tmp")

    monkeypatch.setattr(Selection, "save_npz", fill_up)
    result = run("select", video, "-o", tmp_path / "a.npz", *SMALL)
    assert result.exit_code == 1
    assert result.stderr == f"error: {tmp_path / 'a.npz'}: No space left on device\n"


def test_doctor_reports_a_healthy_machine():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for line in (r"^FFmpeg +libavcodec", r"^decoders +h264", r"^motion vectors +ok", r"^coded residual +ok"):
        assert re.search(line, result.stdout, re.MULTILINE)
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_doctor_fails_without_motion_vectors(monkeypatch):
    monkeypatch.setattr(bitstream, "_finds_known_motion", lambda: False)
    result = run("doctor")
    assert result.exit_code == 1
    assert "motion vectors   FAILED" in result.stdout


def test_doctor_names_missing_codecs(monkeypatch):
    has_codec = bitstream.has_codec
    monkeypatch.setattr(bitstream, "has_codec", lambda name, mode: name != "libx265" and has_codec(name, mode))
    result = run("doctor")
    assert result.exit_code == 0
    assert "missing: libx265" in result.stdout


def test_decoder_report_knows_absent_codecs():
    assert not bitstream.has_codec("no_such_codec", "r")
    assert bitstream.decoder_report().exports_motion_vectors


@pytest.mark.parametrize("is_limited", [True, False])
def test_as_a_process(video, tmp_path, is_limited):
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    if is_limited:
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "codec_datasets.cli", "select", str(video), "-o", "a b.npz", *SMALL]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "wrote     a b.npz" in done.stdout
    assert load_npz(tmp_path / "a b.npz").patches.shape == (200, 16, 16, 3)


def test_a_folder_as_target_is_refused_before_any_work(video, tmp_path):
    (tmp_path / "a.png").mkdir()
    result = run("show", video, "-o", tmp_path / "a.png")
    assert result.exit_code == 1
    assert "is a folder; name a file" in result.stderr
    assert not result.stdout


def test_a_reader_that_goes_away_is_no_error_of_the_file(video, tmp_path):
    command = [sys.executable, "-m", "codec_datasets.cli", "select", str(video), "-o", str(tmp_path / "a.npz")]
    command += ["--size", "128", "--num-patches", "256", "--num-frames", "6"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert "error" not in done.stderr
    assert (tmp_path / "a.npz").exists()
