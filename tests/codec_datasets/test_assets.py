# SPDX-License-Identifier: Apache-2.0
"""Asset folders: published files, exact round trips, nothing half-written, names that don't collide."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from codec_datasets import VideoError, select_video
from codec_datasets import assets as assets_module
from codec_datasets.assets import (
    AssetConfig,
    file_sha256,
    read_assets,
    readable_part,
    stored_state,
    video_key,
    write_assets,
    write_error,
)

ARGUMENTS = {"selection": {"policy": "replenish", "size": (96, 96)}}
JPEG_TOLERANCE = (
    3  # mean grey levels at quality 95, in brightness: the halved colours of noise-like blocks are far off
)
BRIGHTNESS = (0.299, 0.587, 0.114)


@pytest.fixture(scope="module")
def selection(moving_clip):
    return select_video(moving_clip, num_frames=10, size=96, num_patches=128)


def _write(folder, selection, **options):
    config = AssetConfig(num_mosaics=8, **options)
    return write_assets(folder, selection, config, {**ARGUMENTS, "assets": vars(config)}, "0" * 64)


@pytest.mark.parametrize("storage", ["png", "webp"])
@pytest.mark.parametrize("layout", ["training", "evaluation"])
def test_lossless_folders_give_back_everything(tmp_path, selection, layout, storage):
    mosaics = _write(tmp_path / "a", selection, layout=layout, storage=storage)
    assert [path.stem for path in mosaics] == [
        f"{'moving' if layout == 'training' else 'mosaic'}_{number:03d}" for number in range(8)
    ]
    stored = read_assets(tmp_path / "a")
    assert np.array_equal(stored.patches, selection.patches)
    assert np.array_equal(stored.patch_positions, selection.patch_positions)
    assert stored.patch_positions.dtype == np.int32
    assert np.array_equal(stored.frame_indices, selection.frame_indices)
    assert np.array_equal(stored.pts_seconds, selection.pts_seconds)


def test_jpeg_folders_are_close_and_have_the_published_form(tmp_path, selection):
    mosaics = _write(tmp_path / "a", selection)
    stored = read_assets(tmp_path / "a")
    assert np.abs(stored.patches @ BRIGHTNESS - selection.patches @ BRIGHTNESS).mean() < JPEG_TOLERANCE
    with Image.open(mosaics[0]) as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (64, 64))
        assert [component[1:3] for component in picture.layer] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0


def test_evaluation_arrays_are_the_published_ones(tmp_path, selection):
    _write(tmp_path / "a", selection, layout="evaluation")
    positions = np.load(tmp_path / "a" / "positions_thw.npy")
    visible = np.load(tmp_path / "a" / "visible_indices.npy")
    frame_ids = np.load(tmp_path / "a" / "frame_ids.npy")
    assert (positions.dtype, visible.dtype, frame_ids.dtype) == (np.int32, np.int64, np.int32)
    assert np.array_equal(visible, positions @ [36, 6, 1])
    assert np.array_equal(frame_ids, selection.frame_indices)
    meta = json.loads((tmp_path / "a" / "meta.json").read_text(encoding="utf-8"))
    assert meta["key"] == "a"
    assert meta["pts_seconds"] == selection.pts_seconds.tolist()
    assert meta["arguments"]["selection"] == {"policy": "replenish", "size": [96, 96]}


def test_published_training_folder_reads(published_case):
    _, folder = published_case
    stored = read_assets(folder)
    assert np.array_equal(stored.patch_positions, np.load(folder / "positions_thw.npy"))
    assert len(stored.patches) == len(stored.patch_positions)
    assert stored.meta == {}
    with Image.open(sorted(folder.glob("*.jpg"))[1]) as picture:
        mosaic = np.asarray(picture.convert("RGB"))
    size = stored.patches.shape[1]
    cells = (mosaic.shape[0] // size) ** 2
    assert np.array_equal(stored.patches[cells + 1], mosaic[:size, size : 2 * size])


def test_equal_input_gives_equal_bytes(tmp_path, selection):
    for name in ("a/x", "b/x"):
        _write(tmp_path / name, selection, layout="evaluation")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n / "x").iterdir()} for n in "ab")
    assert first == second


def test_states(tmp_path, selection):
    config = {"assets": vars(AssetConfig())}
    arguments = {**ARGUMENTS, **config}
    assert stored_state(tmp_path / "a", arguments) == ("missing", "")
    write_error(tmp_path / "a", "x.mp4", VideoError("x.mp4", "open", "no such file", "Check the path"), arguments)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["error.json"]
    state, reason = stored_state(tmp_path / "a", arguments)
    assert (state, reason) == ("failed", "x.mp4: open: no such file. Check the path")
    _write(tmp_path / "a", selection)
    assert stored_state(tmp_path / "a", arguments) == ("done", "")
    assert not (tmp_path / "a" / "error.json").exists()
    other = {**config, "selection": {"policy": "energy", "size": (96, 96)}}
    assert stored_state(tmp_path / "a", other) == ("stale", "selection.policy: stored 'replenish', asked 'energy'")


def test_an_error_while_writing_leaves_the_old_folder(tmp_path, selection, monkeypatch):
    _write(tmp_path / "a", selection)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(assets_module, "_write_json", full)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path / "a", selection, storage="png")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_many_writers_of_one_folder_leave_one_whole_folder(tmp_path, selection):
    kinds = ["png", "webp", "jpeg"] * 3
    threads = [threading.Thread(target=_write, args=(tmp_path / "a", selection), kwargs={"storage": k}) for k in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert len(read_assets(tmp_path / "a").patches) == 128


def _remove(folder: Path) -> None:
    next(folder.glob("*_003.jpg")).unlink()


def _add(folder: Path) -> None:
    (folder / "moving_008.jpg").write_bytes(next(folder.glob("*_003.jpg")).read_bytes())


def _cut(folder: Path) -> None:
    path = next(folder.glob("*_003.jpg"))
    path.write_bytes(path.read_bytes()[:300])


def _shrink(folder: Path) -> None:
    Image.new("RGB", (32, 32)).save(next(folder.glob("*_003.jpg")))


def _positions(array):
    return lambda folder: np.save(folder / "positions_thw.npy", array, allow_pickle=array.dtype == object)


DAMAGES = {
    "missing mosaic": (_remove, r"expected \['moving_000.jpg', .* got"),
    "one too many": (_add, r"expected \['moving_000.jpg', .* got"),
    "cut mosaic": (_cut, "moving_003.jpg: not readable as a picture"),
    "another size": (_shrink, "expected mosaics of one size"),
    "short positions": (_positions(np.zeros((127, 3), np.int32)), "127 positions don't fit 8 mosaics"),
    "flat positions": (_positions(np.zeros(384, np.int32)), r"expected \(N, 3\) positions, got \(384,\)"),
    "pickled positions": (_positions(np.array([{}], object)), "positions_thw.npy: not readable as an array"),
    "no positions": (lambda folder: (folder / "positions_thw.npy").unlink(), "positions_thw.npy: not readable"),
    "broken meta": (lambda folder: (folder / "meta.json").write_text("{"), "meta.json: not readable as JSON"),
    "list as meta": (lambda folder: (folder / "meta.json").write_text("[]"), "expected a JSON object, got list"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_folders_are_refused(tmp_path, selection, case):
    damage, message = DAMAGES[case]
    _write(tmp_path / "a", selection)
    damage(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        read_assets(tmp_path / "a")


def test_budgets_that_do_not_fill_the_mosaics_are_refused(tmp_path, moving_clip):
    odd = select_video(moving_clip, num_frames=10, size=96, num_patches=100)
    with pytest.raises(ValueError, match="100 patches don't fill 8 square mosaics; use 72 or 128"):
        _write(tmp_path / "a", odd)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [{"layout": "odd"}, {"storage": "gif"}, {"num_mosaics": 0}, {"quality": 101}],
    ids=lambda options: next(iter(options)),
)
def test_impossible_configs_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AssetConfig(**options)


def test_keys_do_not_collide():
    videos = ["a/x.mp4", "b/x.mp4", "a/x__y.mp4", "a/x/__y.mp4", "a/x:y.mp4", "a/x_y.mp4", "é.mp4", "e\u0301.mp4"]
    videos += [f"{'long' * 100}{end}.mp4" for end in ("a", "b")]
    assert len({video_key(video) for video in videos}) == len(videos)


@given(st.text(min_size=1, max_size=300))
def test_keys_are_file_names(video):
    name = video_key(video)
    assert len(os.fsencode(name)) < 255
    assert not {"/", "\0", "\\"} & set(name)
    assert not name.startswith(".")


def test_readable_parts_stay_readable():
    assert readable_part("ytb_XwB-dkS5BVM") == "ytb_XwB-dkS5BVM"
    assert readable_part("../../etc/passwd") == "_.._etc_passwd"
    assert readable_part("...") == "_"


def test_hash_is_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
