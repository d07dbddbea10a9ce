# SPDX-License-Identifier: Apache-2.0
"""`Selection <-> asset folder`: selected patches on disk, in the published formats, written whole or not at all.

A folder holds M mosaics, the position of every patch in them, and `meta.json`. Two layouts differ in names only:
`training` (`<stem>_000.jpg` ... and `positions_thw.npy`) and `evaluation` (`mosaic_000.jpg` ..., also
`visible_indices.npy` and `frame_ids.npy`). A folder appears under its name when it is complete; a video that can't be
used leaves one with `error.json` alone. Nothing in a folder says when or where it was made, so that equal input gives
equal bytes, and an interrupted run, resumed, ends like one that was not.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import unicodedata
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import VideoError
from .front_end import Selection
from .packing import pack_mosaics, unpack_mosaics

Layout = Literal["training", "evaluation"]
Storage = Literal["jpeg", "png", "webp"]

FORMAT = "codec_datasets_assets_v1"
META, ERROR, POSITIONS = "meta.json", "error.json", "positions_thw.npy"
_SUFFIXES = {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}
_LONGEST_PART = 60  # bytes of a readable part of a name; file systems allow 255 for the whole
_HASHED_AT_ONCE = 1 << 20
_RENAME_ATTEMPTS = 10  # two runs may replace the same folder at the same time


@dataclass(frozen=True)
class AssetConfig:
    """How selections are stored.

    Attributes:
        layout: names of the files in a folder.
        num_mosaics: M; the budget must be M times a square number.
        storage: `jpeg` as published, or lossless `png` or `webp`.
        quality: of JPEG, 1 to 100; chroma is 4:2:0 as published.

    Raises:
        ValueError: if a value is not possible.
    """

    layout: Layout = "training"
    num_mosaics: int = 8
    storage: Storage = "jpeg"
    quality: int = 95

    def __post_init__(self) -> None:
        for name, allowed in (("layout", get_args(Layout)), ("storage", get_args(Storage))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.num_mosaics < 1 or not 1 <= self.quality <= 100:
            raise ValueError(f"num_mosaics >= 1 and quality 1 to 100; got {self.num_mosaics} and {self.quality}")

    def check_budget(self, num_patches: int) -> None:
        """Refuse a number of patches that does not fill the mosaics.

        Raises:
            ValueError: naming the nearest numbers that do.
        """
        side = int((num_patches / self.num_mosaics) ** 0.5)
        if side**2 * self.num_mosaics != num_patches:
            near = [self.num_mosaics * max(side + step, 1) ** 2 for step in (0, 1)]
            raise ValueError(
                f"{num_patches} patches don't fill {self.num_mosaics} square mosaics; use {near[0]} or {near[1]}"
            )


@dataclass(frozen=True)
class Assets:
    """What an asset folder holds.

    Attributes:
        patches: `(N, P, P, 3)` uint8, as stored.
        patch_positions: `(N, 3)` int32 `(t, h, w)`, sorted.
        frame_indices: `(T,)` int64 source frame of each slot; empty where the folder does not say.
        pts_seconds: `(T,)` float64 time of each slot; empty where the folder does not say.
        meta: content of `meta.json`, empty where there is none.
    """

    patches: np.ndarray
    patch_positions: np.ndarray
    frame_indices: np.ndarray
    pts_seconds: np.ndarray
    meta: dict[str, Any]


def video_key(video: str) -> str:
    """Folder name of a video's evaluation assets: its stem and 64 bits of the hash of its whole path.

    The stem alone, as published, mixes up files of one name in different folders; published readers find the folder by
    `video` in its `meta.json`.
    """
    return f"{readable_part(Path(video).stem)}__{_short_hash(video, 16)}"


def readable_part(text: str) -> str:
    """The text as part of a file name: letters, digits, `.`, `-` and `_`, at most 60 bytes of UTF-8."""
    plain = re.sub(r"[^\w.\-]", "_", unicodedata.normalize("NFC", text)).strip(".")
    return plain.encode(errors="ignore")[:_LONGEST_PART].decode(errors="ignore") or "_"


def _short_hash(text: str, digits: int) -> str:
    return hashlib.sha1(text.encode(errors="surrogateescape")).hexdigest()[:digits]


def file_sha256(path: str | Path) -> str:
    """Hash of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_HASHED_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def mosaic_names(video: str, config: AssetConfig) -> list[str]:
    """File names of a folder's mosaics, in order."""
    start = "mosaic" if config.layout == "evaluation" else readable_part(Path(video).stem)
    return [f"{start}_{number:03d}{_SUFFIXES[config.storage]}" for number in range(config.num_mosaics)]


def write_assets(
    folder: str | Path, selection: Selection, config: AssetConfig, arguments: dict[str, Any], video_sha256: str
) -> list[Path]:
    """Write one asset folder; what stood there before is replaced when the new one is complete.

    Args:
        folder: its name is the key.
        selection: with as many patches as the mosaics hold.
        config: layout and storage.
        arguments: everything that was asked for; a reader that asks for the same may use the folder.
        video_sha256: hash of the video's content.

    Returns:
        the mosaics, in order.

    Raises:
        ValueError: if the selection does not fill the mosaics.
        OSError: if the folder can't be written.
    """
    target = Path(folder)
    config.check_budget(len(selection.patches))
    mosaics, positions = pack_mosaics(selection.patches, selection.patch_positions, config.num_mosaics)
    names = mosaic_names(selection.video.path, config)
    with _written_whole(target) as unfinished:
        for name, mosaic in zip(names, mosaics):
            _save_mosaic(mosaic, unfinished / name, config)
        np.save(unfinished / POSITIONS, positions)
        if config.layout == "evaluation":
            flat = np.ravel_multi_index(tuple(positions.T.astype(np.int64)), selection.grid.shape)
            np.save(unfinished / "visible_indices.npy", flat)
            np.save(unfinished / "frame_ids.npy", selection.frame_indices.astype(np.int32))
        _write_json(unfinished / META, _describe(target.name, selection, arguments, video_sha256))
    return [target / name for name in names]


def _describe(key: str, selection: Selection, arguments: dict[str, Any], video_sha256: str) -> dict[str, Any]:
    """The content of `meta.json`: all that made the folder."""
    return {
        "version": FORMAT,
        "key": key,
        "video": selection.video.path,
        "video_sha256": video_sha256,
        "arguments": arguments,
        "source": asdict(selection.video),
        "placement": asdict(selection.placement),
        "patches_per_frame": selection.patches_per_frame.tolist(),
        "frame_indices": selection.frame_indices.tolist(),
        "pts_seconds": selection.pts_seconds.tolist(),
        "signal_sources": selection.signal_sources,
        "versions": {package: version(package) for package in ("codec-datasets", "numpy", "av", "pillow")},
    }


def write_error(folder: str | Path, video: str, error: Exception | str, arguments: dict[str, Any]) -> None:
    """Record that a video could not be used: a folder with `error.json` alone.

    Raises:
        OSError: if the folder can't be written.
    """
    stage = error.stage if isinstance(error, VideoError) else "run"
    record = {"version": FORMAT, "key": Path(folder).name, "video": video, "stage": stage, "error": str(error)}
    with _written_whole(Path(folder)) as unfinished:
        _write_json(unfinished / ERROR, record | {"arguments": arguments})


def read_assets(folder: str | Path) -> Assets:
    """Read an asset folder, ours or one of the published tools.

    Raises:
        ValueError: if files are missing, damaged or don't fit each other; the message names folder and file.
    """
    folder = Path(folder)
    meta = _read_json(folder / META) if (folder / META).exists() else {}
    positions = _load_array(folder / POSITIONS)
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise ValueError(f"{folder / POSITIONS}: expected (N, 3) positions, got {positions.shape}")
    mosaics = [_load_mosaic(path) for path in _mosaic_paths(folder, meta)]
    if len({mosaic.shape for mosaic in mosaics}) != 1:
        raise ValueError(f"{folder}: expected mosaics of one size, got {[mosaic.shape for mosaic in mosaics]}")
    cells = len(positions) / len(mosaics)
    side = round(cells**0.5)
    if side**2 * len(mosaics) != len(positions) or mosaics[0].shape[0] % side:
        raise ValueError(f"{folder}: {len(positions)} positions don't fit {len(mosaics)} mosaics {mosaics[0].shape}")
    patches = unpack_mosaics(np.stack(mosaics), mosaics[0].shape[0] // side)
    frame_indices = np.asarray(meta.get("frame_indices", []), np.int64)
    if not len(frame_indices) and (folder / "frame_ids.npy").exists():
        frame_indices = _load_array(folder / "frame_ids.npy").astype(np.int64)
    pts_seconds = np.asarray(meta.get("pts_seconds", []), np.float64)
    return Assets(patches, positions.astype(np.int32), frame_indices, pts_seconds, meta)


def stored_state(folder: str | Path, arguments: dict[str, Any]) -> tuple[str, str]:
    """What stands in a folder, without reading its pictures.

    Returns:
        `done`, `failed` (this was tried with the same arguments), `stale` (made with other ones) or `missing`; and for
        the second and third which error, or which arguments differ.
    """
    stored = stored_record(folder)
    if not stored:
        return "missing", ""
    known = stored.get("arguments", {})
    if known != arguments and (different := list(_differences(known, _as_stored(arguments)))):
        return "stale", "; ".join(different)
    return ("failed", str(stored["error"])) if "error" in stored else ("done", "")


def stored_record(folder: str | Path) -> dict[str, Any]:
    """What `meta.json` says of a folder, or else `error.json`; empty where neither is.

    Raises:
        ValueError: if the file is damaged.
    """
    for name in (META, ERROR):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return _read_json(Path(path))
    return {}


def _differences(stored: Any, asked: Any, place: str = "") -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(asked, dict):
        for name in sorted(stored.keys() | asked.keys()):
            yield from _differences(stored.get(name), asked.get(name), f"{place}.{name}".lstrip("."))
    elif stored != asked:
        yield f"{place}: stored {stored!r}, asked {asked!r}"


def _as_stored(arguments: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(arguments))  # tuples become lists


def _mosaic_paths(folder: Path, meta: dict[str, Any]) -> list[Path]:
    """The mosaics in order; with our `meta.json` exactly the ones it speaks of."""
    found = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES.values())
    stored = meta.get("arguments", {}).get("assets")
    if stored:
        expected = [folder / name for name in mosaic_names(meta["video"], AssetConfig(**stored))]
        if found != expected:
            names = [[path.name for path in paths] for paths in (expected, found)]
            raise ValueError(f"{folder}: expected {names[0]}, got {names[1]}")
    if not found:
        raise ValueError(f"{folder}: no mosaics")
    return found


def _load_mosaic(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # Pillow's types for damaged files
        raise ValueError(f"{path}: not readable as a picture ({error})") from error


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not readable as an array ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_mosaic(mosaic: np.ndarray, path: Path, config: AssetConfig) -> None:
    options = {
        "jpeg": {"quality": config.quality, "subsampling": "4:2:0"},
        "png": {"compress_level": 6},
        "webp": {"lossless": True, "exact": True},
    }
    encoded = io.BytesIO()  # given a file, Pillow takes a write cut short by a full disk for a whole one
    Image.fromarray(mosaic).save(encoded, config.storage, **options[config.storage])
    path.write_bytes(encoded.getbuffer())


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A folder to fill that takes its name when all is written; an error leaves what stood there before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.parent / f".{uuid.uuid4().hex}.tmp"
    unfinished.mkdir()
    try:
        yield unfinished
        _take_place(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _take_place(folder: Path, target: Path) -> None:
    """Rename, moving away what is in the way; another process may be doing the same."""
    for _ in range(_RENAME_ATTEMPTS):
        aside = target.parent / f".{uuid.uuid4().hex}.tmp"
        with suppress(FileNotFoundError):
            os.rename(target, aside)
        try:
            os.rename(folder, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    raise OSError(errno.EBUSY, "other processes keep writing this folder", str(target))
