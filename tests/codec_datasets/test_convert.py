# SPDX-License-Identifier: Apache-2.0
"""Conversion: every row accounted for, nothing done twice, the same bytes whatever happened on the way.

The published raw samples and one of their videos lie in the folder `CODEC_VIDEOS`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codec_datasets import SelectionConfig, VideoError, making
from codec_datasets import convert as convert_module
from codec_datasets.assets import AssetConfig, read_assets, stored_record, video_key
from codec_datasets.conversations import Sample, shard_of
from codec_datasets.convert import ConvertConfig, convert

REPOSITORY = Path(__file__).resolve().parents[2]
VIDEOS = Path(os.environ.get("CODEC_VIDEOS") or REPOSITORY.parent / "shared" / "videos")
RECIPE = {"selection": SelectionConfig(num_patches=128), "num_frames": 10, "size": 96}
HERE = ConvertConfig(**RECIPE, num_workers=0)
SMALL_OPTIONS = ["--num-patches", "128", "--num-frames", "10", "--size", "96"]
LARGEST_FILE_KIB = 2  # a mosaic takes more, the positions don't


def turns(token):
    return [{"from": "human", "value": f"{token}\nWhat?"}, {"from": "gpt", "value": "That."}]


def video_row(name, **fields):
    return {"id": f"about {name}", "video": name, "conversations": turns("<video>")} | fields


MIXED = [
    video_row("a.mp4", data_source="x"),
    {"id": "picture", "image": "pictures/p.png", "conversations": turns("<image>"), "kept": 1},
    {"id": "words", "conversations": turns("Hi")},
    video_row("gone.mp4"),
    {"id": "bad", "video": "a.mp4", "image": "pictures/p.png"},
    video_row("folder/b.mp4"),
    video_row("a.mp4", id="again", start=1, end=2),
    video_row("broken.mp4"),
    {"id": "no picture", "image": "pictures/gone.png", "conversations": turns("<image>")},
]


@pytest.fixture
def data(tmp_path, moving_clip, square_clip):
    """A folder with two videos, a broken one, a picture, and `raw.json` about them."""
    root = tmp_path / "data"
    (root / "folder").mkdir(parents=True)
    (root / "pictures").mkdir()
    shutil.copy(moving_clip, root / "a.mp4")
    shutil.copy(square_clip, root / "folder" / "b.mp4")
    (root / "broken.mp4").write_bytes(moving_clip.read_bytes()[:600])
    Image.new("RGB", (8, 8)).save(root / "pictures" / "p.png")
    (root / "raw.json").write_text(json.dumps(MIXED))
    return root


@pytest.fixture
def made(monkeypatch):
    """The videos that were decoded, in this process."""
    decoded = []
    read_and_select = making.read_and_select

    def counted(path, *arguments, **options):
        decoded.append(Path(path).name)
        return read_and_select(path, *arguments, **options)

    monkeypatch.setattr(making, "read_and_select", counted)
    return decoded


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content(folder):
    """Every file of a folder by its path, what other runs left unfinished aside."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if not any(part.startswith(".") for part in name.split("/"))}


def only_videos(folder, names):
    """Rows about these videos; returns the file."""
    (folder / "raw.json").write_text(json.dumps([video_row(name) for name in names]))
    return folder / "raw.json"


def test_every_row_ends_in_one_of_two_files(data, tmp_path, made):
    report = convert(data / "raw.json", tmp_path / "out", HERE)
    train, failed = lines(tmp_path / "out" / "train.jsonl"), lines(tmp_path / "out" / "failed.jsonl")
    assert [line["id"] for line in train] == ["about a.mp4", "picture", "words", "about folder/b.mp4", "again"]
    assert [(line["row"], line["id"], line["video"], line["stage"]) for line in failed] == [
        (3, "about gone.mp4", "gone.mp4", "find"),
        (4, None, None, "row"),
        (7, "about broken.mp4", "broken.mp4", "open"),
        (8, "no picture", None, "find"),
    ]
    assert all(line["error"] for line in failed)
    assert (report.rows, report.made, report.num_failed, report.unclipped) == (9, 2, 4, 1)
    assert report.written == {"image": 1, "text": 1, "video": 3}
    assert report.failures == {"find": 2, "open": 1, "row": 1}
    assert report.states == {"missing": 4}
    assert made == ["a.mp4", "b.mp4", "broken.mp4"]  # a.mp4 once for two rows
    assert stored_record(tmp_path / "out" / "assets" / video_key("gone.mp4"))["stage"] == "find"
    assert max(map(len, report.summary().replace(str(tmp_path), "").splitlines())) <= 80


def test_training_lines_have_the_published_form(data, tmp_path):
    convert(data / "raw.json", tmp_path / "out", HERE)
    about_video, about_picture, words, *_ = lines(tmp_path / "out" / "train.jsonl")
    assert list(about_video) == ["id", "conversations", "image", "positions_thw"]
    assert about_video["conversations"][0]["value"] == "\n".join(["<image>"] * 8) + "\nWhat?"
    assert [Path(path).name for path in about_video["image"]] == [f"a_{number:03d}.jpg" for number in range(8)]
    assert about_picture["kept"] == 1
    assert words == MIXED[2]


def test_relative_paths_open_from_anywhere(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    convert("raw.json", "../out", HERE)
    monkeypatch.chdir("/")
    for line in lines(tmp_path / "out" / "train.jsonl"):
        for path in [*line.get("image", []), *([line["positions_thw"]] if "positions_thw" in line else [])]:
            assert not os.path.isabs(path)
            assert (tmp_path / "out" / path).is_file()


def test_absolute_paths_on_request(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert("data/raw.json", "out", replace(HERE, absolute_paths=True))
    for line in lines(tmp_path / "out" / "train.jsonl"):
        for path in [*line.get("image", []), line.get("positions_thw", str(tmp_path / "out"))]:
            assert os.path.isabs(path)
            assert os.path.exists(path)


def test_a_linked_output_has_paths_that_open(data, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    convert(data / "raw.json", tmp_path / "link", HERE)
    picture = lines(tmp_path / "link" / "train.jsonl")[1]
    assert os.path.isfile(os.path.join(tmp_path / "link", picture["image"][0]))


def test_json_lines_name_the_line_of_a_bad_row(data, tmp_path):
    rows = [json.dumps(video_row("a.mp4")), "", "{broken", json.dumps(video_row("folder/b.mp4"))]
    (data / "raw.jsonl").write_text("\n".join(rows))
    report = convert(data / "raw.jsonl", tmp_path / "out", HERE)
    assert report.written == {"video": 2}
    [failed] = lines(tmp_path / "out" / "failed.jsonl")
    assert (failed["row"], failed["stage"]) == (1, "row")
    assert failed["error"].startswith("line 3: no JSON")


def test_a_folder_of_videos(data, tmp_path):
    report = convert(data, tmp_path / "out", HERE)
    train = lines(tmp_path / "out" / "train.jsonl")
    assert [(line["id"], line["conversations"], len(line["image"])) for line in train] == [
        ("a.mp4", [], 8),
        ("folder/b.mp4", [], 8),
    ]
    assert report.failures == {"open": 1}


@pytest.mark.parametrize("layout", ["training", "evaluation"])
def test_assets_are_those_of_the_selection(data, tmp_path, layout):
    config = replace(HERE, assets=AssetConfig(layout=layout, storage="png"))
    convert(only_videos(data, ["a.mp4"]), tmp_path / "out", config)
    folder = tmp_path / "out" / "assets" / video_key("a.mp4")
    _, expected = making.read_and_select(data / "a.mp4", HERE.selection, num_frames=10, size=96)
    stored = read_assets(folder)
    assert np.array_equal(stored.patches, expected.patches)
    assert np.array_equal(stored.patch_positions, expected.patch_positions)
    [line] = lines(tmp_path / "out" / "train.jsonl")
    assert [tmp_path / "out" / path for path in line["image"]] == sorted(folder.glob("*.png"))


def test_a_second_run_decodes_nothing(data, tmp_path, made):
    convert(data / "raw.json", tmp_path / "out", HERE)
    before = content(tmp_path / "out")
    made.clear()
    report = convert(data / "raw.json", tmp_path / "out", HERE)
    assert made == []
    assert (report.made, report.states) == (0, {"done": 2, "failed": 2})
    assert content(tmp_path / "out") == before


def test_done_assets_need_no_video(data, tmp_path):
    source = only_videos(data, ["a.mp4"])
    convert(source, tmp_path / "out", HERE)
    (data / "a.mp4").unlink()
    assert convert(source, tmp_path / "out", HERE).written == {"video": 1}


def test_other_arguments_remake(data, tmp_path, made):
    source = only_videos(data, ["a.mp4", "gone.mp4"])
    convert(source, tmp_path / "out", HERE)
    other = replace(HERE, selection=SelectionConfig(num_patches=128, policy="uniform"))
    report = convert(source, tmp_path / "out", other)
    assert (report.states, report.made, made) == ({"stale": 2}, 1, ["a.mp4", "a.mp4"])
    convert(source, tmp_path / "fresh", other)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_changed_videos_are_remade_on_request(data, tmp_path, square_clip):
    source = only_videos(data, ["a.mp4"])
    convert(source, tmp_path / "out", HERE)
    shutil.copy(square_clip, data / "a.mp4")
    assert convert(source, tmp_path / "out", HERE).made == 0
    assert convert(source, tmp_path / "out", replace(HERE, verify_videos=True)).made == 1
    assert convert(source, tmp_path / "out", replace(HERE, verify_videos=True)).made == 0


def test_failed_videos_are_tried_again_on_request(data, tmp_path, moving_clip, made):
    source = only_videos(data, ["broken.mp4"])
    convert(source, tmp_path / "out", HERE)
    shutil.copy(moving_clip, data / "broken.mp4")
    first = content(tmp_path / "out")
    assert convert(source, tmp_path / "out", HERE).failures == {"open": 1}
    assert content(tmp_path / "out") == first
    assert made == ["broken.mp4"]
    report = convert(source, tmp_path / "out", replace(HERE, retry_failed=True))
    assert (report.made, report.failures) == (1, {})
    assert (tmp_path / "out" / "failed.jsonl").read_bytes() == b""


def test_missing_videos_are_looked_for_again(data, tmp_path, moving_clip):
    source = only_videos(data, ["gone.mp4"])
    assert convert(source, tmp_path / "out", HERE).failures == {"find": 1}
    shutil.copy(moving_clip, data / "gone.mp4")
    assert convert(source, tmp_path / "out", HERE).made == 1


def test_damaged_records_are_remade(data, tmp_path):
    source = only_videos(data, ["a.mp4"])
    convert(source, tmp_path / "out", HERE)
    before = content(tmp_path / "out")
    (tmp_path / "out" / "assets" / video_key("a.mp4") / "meta.json").write_text('{"arg')
    assert convert(source, tmp_path / "out", HERE).made == 1
    assert content(tmp_path / "out") == before


def test_one_worker_or_two_write_the_same(data, tmp_path):
    for number in (0, 1, 2):
        convert(data / "raw.json", tmp_path / str(number), replace(HERE, num_workers=number))
    assert content(tmp_path / "0") == content(tmp_path / "1") == content(tmp_path / "2")


def test_a_crash_is_recorded(data, tmp_path, monkeypatch):
    source = only_videos(data, ["a.mp4", "folder/b.mp4"])
    monkeypatch.setattr(convert_module, "make_assets", _die_of_b)
    report = convert(source, tmp_path / "out", replace(HERE, num_workers=1))
    assert (report.made, report.failures) == (1, {"run": 1})
    [failed] = lines(tmp_path / "out" / "failed.jsonl")
    assert failed["error"] == "folder/b.mp4: crash: worker was killed by SIGKILL"


def _die_of_b(job, recipe):
    if "b.mp4" in job.path:
        os.kill(os.getpid(), signal.SIGKILL)
    return making.make_assets(job, recipe)


def test_shards_divide_the_rows_as_published(data, tmp_path):
    rows = [{"id": str(number), "conversations": turns("Hi")} for number in range(20)] + [[]]
    (data / "raw.json").write_text(json.dumps(rows))
    found = []
    for shard in range(3):
        report = convert(data / "raw.json", tmp_path / "out", replace(HERE, num_shards=3, shard_id=shard))
        train = lines(tmp_path / "out" / f"train.shard{shard:02d}of03.jsonl")
        expected = [row["id"] for n, row in enumerate(rows[:-1]) if shard_of(Sample(n, row["id"], None), 3) == shard]
        assert [line["id"] for line in train] == expected
        found += [*train, *lines(tmp_path / "out" / f"failed.shard{shard:02d}of03.jsonl")]
        assert report.rows == len(train) + report.num_failed
    assert len(found) == 21


def test_limit_counts_rows(data, tmp_path):
    assert convert(data / "raw.json", tmp_path / "out", replace(HERE, limit=3)).rows == 3


def test_dry_run_counts_and_writes_nothing(data, tmp_path, made):
    report = convert(data / "raw.json", tmp_path / "out", HERE, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert (report.rows, report.states, report.failures) == (9, {"missing": 4}, {"find": 2, "row": 1})
    assert report.written == {"image": 1, "text": 1, "video": 4}
    convert(data / "raw.json", tmp_path / "out", HERE)
    before = content(tmp_path / "out")
    made.clear()
    report = convert(data / "raw.json", tmp_path / "out", HERE, dry_run=True)
    assert report.states == {"done": 2, "failed": 2}
    assert content(tmp_path / "out") == before
    assert made == []


@pytest.mark.parametrize(
    "path", ["../secret.mp4", "/etc/passwd", "folder/../../secret.mp4", "link/secret.mp4", "folder"]
)
def test_paths_stay_below_their_root(data, tmp_path, moving_clip, path):
    shutil.copy(moving_clip, tmp_path / "secret.mp4")
    (data / "link").symlink_to(tmp_path)
    rows = [video_row(path), {"id": "i", "image": path, "conversations": turns("<image>")}]
    (data / "raw.json").write_text(json.dumps(rows))
    report = convert(data / "raw.json", tmp_path / "out", HERE)
    assert report.failures == {"find": 2}
    assert not (tmp_path / "out" / "train.jsonl").read_bytes()


def test_absolute_paths_below_the_root_are_taken(data, tmp_path):
    source = only_videos(data, [str(data / "a.mp4")])
    assert convert(source, tmp_path / "out", HERE).made == 1
    assert convert(source, tmp_path / "other", replace(HERE, video_root=data / "folder")).failures == {"find": 1}
    assert convert(source, tmp_path / "other", replace(HERE, video_root="/")).made == 1


@pytest.mark.parametrize("identifier", ["../../x", "/etc/x", "a\0b", ".", "x" * 400, "é/\u202e"])
def test_ids_lead_nowhere(data, tmp_path, identifier):
    (data / "raw.json").write_text(json.dumps([video_row("a.mp4", id=identifier)]))
    before = set(tmp_path.rglob("*"))
    convert(data / "raw.json", tmp_path / "out", HERE)
    assert lines(tmp_path / "out" / "train.jsonl")[0]["id"] == identifier
    assert all(path.is_relative_to(tmp_path / "out") for path in set(tmp_path.rglob("*")) - before)


def test_equal_ids_and_equal_names_do_not_mix(data, tmp_path):
    shutil.copy(data / "folder" / "b.mp4", data / "b.mp4")
    shutil.copy(data / "a.mp4", data / "folder" / "a.mp4")
    names = ["a.mp4", "b.mp4", "folder/a.mp4", "folder/b.mp4"]
    (data / "raw.json").write_text(json.dumps([video_row(name, id="same") for name in names]))
    convert(data / "raw.json", tmp_path / "out", HERE)
    train = lines(tmp_path / "out" / "train.jsonl")
    assert [line["id"] for line in train] == ["same"] * 4
    assert len({line["positions_thw"] for line in train}) == 4


def test_two_runs_at_once_do_not_mix(data, tmp_path):
    source = only_videos(data, ["a.mp4", "folder/b.mp4"])
    convert(source, tmp_path / "alone", HERE)
    runs = [threading.Thread(target=convert, args=(source, tmp_path / "out", HERE)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert content(tmp_path / "out") == content(tmp_path / "alone")
    assert not list((tmp_path / "out").rglob(".*"))


def test_a_folder_that_another_run_takes_away_is_recorded(data, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "make_assets", lambda job, recipe: None)
    report = convert(only_videos(data, ["a.mp4"]), tmp_path / "out", HERE)
    assert report.failures == {"run": 1}
    assert "missing after it was made" in lines(tmp_path / "out" / "failed.jsonl")[0]["error"]


def _command(source, output, *options):
    return [sys.executable, "-m", "codec_datasets.cli", "convert", source, output, *SMALL_OPTIONS, *options]


def test_killed_and_run_again_is_as_uninterrupted(data, tmp_path):
    names = [f"{number}.mp4" for number in range(6)]
    for name in names:
        shutil.copy(data / "a.mp4", data / name)
    source = only_videos(data, names)
    convert(source, tmp_path / "whole", HERE)
    folder = tmp_path / "out" / "assets"
    run = subprocess.Popen(_command(source, tmp_path / "out"))
    while run.poll() is None and not (folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir())):
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "train.jsonl").exists()
    report = convert(source, tmp_path / "out", HERE)
    assert report.states["done"] >= 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_full_disk_is_one_line_and_resumable(data, tmp_path):
    source = only_videos(data, ["a.mp4"])
    command = ["bash", "-c", f'ulimit -f {LARGEST_FILE_KIB}; exec "$@"', "bash", *_command(source, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    folder = tmp_path / "out" / "assets" / video_key("a.mp4")
    assert done.stderr == f"error: {folder}: File too large\n"
    assert content(tmp_path / "out") == {}
    assert convert(source, tmp_path / "out", HERE).written == {"video": 1}


def test_an_output_that_cannot_be_a_folder_is_an_error(data, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OSError, match="file"):
            convert(data / "raw.json", output, HERE)


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may write everywhere")
def test_a_read_only_output_is_an_error(data, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(PermissionError):
        convert(data / "raw.json", tmp_path / "out", HERE)


def test_a_read_only_file_system_ends_the_run(data, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(making, "write_assets", refuse)
    with pytest.raises(OSError, match="Read-only file system") as caught:
        convert(data / "raw.json", tmp_path / "out", HERE)
    assert caught.value.filename == str(tmp_path / "out" / "assets" / video_key("a.mp4"))


def test_a_video_that_cannot_be_read_is_recorded(data, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(making, "file_sha256", refuse)
    report = convert(only_videos(data, ["a.mp4"]), tmp_path / "out", HERE)
    assert report.failures == {"open": 1}
    assert "Permission denied" in lines(tmp_path / "out" / "failed.jsonl")[0]["error"]


def test_memory_that_runs_out_is_left_to_the_worker(data, tmp_path, monkeypatch):
    def exhaust(path, *_, **__):
        raise VideoError(str(path), "decode", "no memory", "Use a smaller size") from MemoryError()

    monkeypatch.setattr(making, "read_and_select", exhaust)
    convert(only_videos(data, ["a.mp4"]), tmp_path / "out", HERE)
    [failed] = lines(tmp_path / "out" / "failed.jsonl")
    assert failed["stage"] == "run"
    assert failed["error"].startswith("a.mp4: memory limit: ")


def test_a_missing_source_writes_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        convert(tmp_path / "no.json", tmp_path / "out", HERE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"size": 100}, "not divisible"),
        ({"selection": SelectionConfig(num_patches=100)}, "use 72 or 128"),
        ({"selection": SelectionConfig(num_patches=128, allow_fewer=True)}, "mosaics are always full"),
        ({"selection": SelectionConfig(num_patches=128, stop_below_error=1.0)}, "mosaics are always full"),
        ({"shard_id": 1}, "shard_id must be 0 to num_shards - 1, got 1 of 1"),
        ({"num_shards": 0}, "shard_id must be"),
    ],
)
def test_impossible_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConvertConfig(**RECIPE | options)


@pytest.mark.parametrize("options", [{"num_workers": -1}, {"attempts": 0}, {"time_limit_seconds": 0}])
def test_impossible_workers_write_nothing(data, tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        convert(data / "raw.json", tmp_path / "out", ConvertConfig(**RECIPE, **options))
    assert not (tmp_path / "out").exists()


def test_progress_counts_rows_and_failures(data, tmp_path):
    told = []
    convert(data / "raw.json", tmp_path / "out", HERE, on_progress=lambda *counts: told.append(counts))
    assert told[-1] == (9, 4)


@pytest.mark.skipif(not VIDEOS.is_dir(), reason=f"no clips at {VIDEOS}")
def test_published_samples_become_what_published_readers_take(tmp_path):
    config = ConvertConfig(video_root=VIDEOS.parent, num_workers=0)
    report = convert(VIDEOS / "onevision_demo" / "raw_video_samples.json", tmp_path / "out", config)
    assert (report.rows, report.made, report.failures) == (2, 1, {"find": 1})
    [line], [failed] = (lines(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "failed"))
    assert failed["video"] == "videos/ytb_YVQwAEKZpaU.mp4"
    published = next(
        row for row in lines(VIDEOS / "onevision_demo" / "training_codec.jsonl") if row["id"] == line["id"]
    )
    assert line["conversations"] == published["conversations"]
    assert line["conversations"][0]["value"].count("<image>") == len(line["image"]) == 8
    for path in line["image"]:
        with Image.open(tmp_path / "out" / path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (576, 576))
    positions = np.load(tmp_path / "out" / line["positions_thw"], allow_pickle=False)
    assert (positions.shape, positions.dtype) == ((10368, 3), np.int32)
    assert np.array_equal(np.lexsort(positions.T[::-1]), np.arange(10368))
    assert positions.min() == 0
    assert (positions.max(axis=0) < (64, 36, 36)).all()
