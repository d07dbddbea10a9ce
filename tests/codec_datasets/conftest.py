# SPDX-License-Identifier: Apache-2.0
"""Generated clips with known content, an independent decoder to compare with, the optional folder of real clips."""

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
VIDEOS = Path(os.environ.get("CODEC_VIDEOS") or REPOSITORY.parent / "shared" / "videos")
VIDEO_ENDINGS = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".ts", ".flv", ".m4v"}
QUIET_HEVC = {"x265-params": "log-level=none:keyint=12"}


def pytest_generate_tests(metafunc):
    """Parametrise `shared_video` (every clip), `oracle_case` (clip, stored arrays) and `published_case` (clip, folder
    of published mosaics) over what `CODEC_VIDEOS` holds; skip only where the folder is absent."""
    for name, find in (
        ("shared_video", _find_videos),
        ("oracle_case", _find_oracles),
        ("published_case", _find_published),
    ):
        if name not in metafunc.fixturenames:
            continue
        if not VIDEOS.is_dir():
            cases = [pytest.param(None, marks=pytest.mark.skip(reason=f"no clips at {VIDEOS}"))]
        else:
            cases = find()
            if not cases:
                raise FileNotFoundError(f"{VIDEOS} holds no case for {name}")
        metafunc.parametrize(name, cases)


def _find_videos() -> list:
    found = sorted(path for path in VIDEOS.iterdir() if path.suffix in VIDEO_ENDINGS)
    return [pytest.param(path, id=path.stem) for path in found]


def _find_oracles() -> list:
    stored = sorted(VIDEOS.glob("oracle/*.npz"))
    return [pytest.param((_video_of(path.stem), path), id=path.stem) for path in stored]


def _find_published() -> list:
    folders = sorted(path.parent for path in VIDEOS.rglob("positions_thw.npy"))
    return [pytest.param((_video_of(_mosaic_stem(folder)), folder), id=_mosaic_stem(folder)) for folder in folders]


def _mosaic_stem(folder: Path) -> str:
    return sorted(folder.glob("*_000.jpg"))[0].stem.removesuffix("_000")


def _video_of(stem: str) -> Path:
    [path] = [path for path in VIDEOS.iterdir() if path.stem == stem and path.suffix in VIDEO_ENDINGS]
    return path


class Clips:
    """Makes small clips in one folder and decodes clips the plain way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, tuple] = {}

    @staticmethod
    def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
        """`(H, W, 3)` uint8: random 4 x 4 blocks."""
        blocks = np.random.default_rng(seed).integers(30, 225, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        return blocks.repeat(4, 0).repeat(4, 1)[:height, :width]

    @classmethod
    def pan(cls, num_frames: int = 40, height: int = 96, width: int = 128, step: int = 4) -> np.ndarray:
        """`(T, H, W, 3)` uint8: everything moves right by `step` pixels per frame."""
        wide = cls.texture(height, width + step * num_frames)
        starts = step * np.arange(num_frames)[::-1]
        return np.stack([wide[:, start : start + width] for start in starts])

    @classmethod
    def square(cls, num_frames: int = 12, height: int = 96, width: int = 160, step: int = 4) -> np.ndarray:
        """`(T, H, W, 3)` uint8: on grey, a textured square of 48 px at row 32 moves right from column 16."""
        frames = np.full((num_frames, height, width, 3), 110, np.uint8)
        for t, frame in enumerate(frames):
            left = 16 + step * t
            frame[32:80, left : left + 48] = cls.texture(48, 48, seed=1)[:, : max(0, width - left)]
        return frames

    def write(
        self, name: str, frames=None, codec="libx264", pix_fmt="yuv420p", pts=None, time_base=None, mux=None, **options
    ) -> Path:
        """Encode RGB or RGBA frames; `options` go to the encoder (`x264-params` as `x264_params`), `mux` to the
        container. A file of that name is made once."""
        path = self.folder / name
        frames = self.pan() if frames is None else frames
        recipe = (frames.shape, codec, pix_fmt, tuple(pts or ()), str(mux), str(options))
        if self._made.setdefault(name, recipe) != recipe:
            raise ValueError(f"{name} is made in two ways: {self._made[name]} and {recipe}")
        if path.exists():
            return path
        with av.open(str(path), "w", options=mux or {}) as container:
            stream = container.add_stream(codec, rate=25)
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt, stream.codec_context.thread_count = pix_fmt, 1
            stream.codec_context.time_base = time_base or Fraction(1, 25)
            stream.options = {key.replace("_params", "-params"): str(value) for key, value in options.items()}
            for number, pixels in enumerate(frames):
                layout = "rgba" if pixels.shape[2] == 4 else "rgb24"
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=layout)
                frame.pts, frame.time_base = number if pts is None else pts[number], time_base or Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    def bytes(self, name: str, content: bytes) -> Path:
        """A file with this content."""
        path = self.folder / name
        path.write_bytes(content)
        return path

    def turned(self, name: str, source: Path, clockwise: int) -> Path:
        """A copy of an mp4 file whose track header asks players to turn the picture clockwise."""
        cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[clockwise]
        return self.transformed(name, source, ((cosine, sine), (-sine, cosine)))

    def transformed(self, name: str, source: Path, matrix: tuple[tuple[int, int], tuple[int, int]]) -> Path:
        """A copy of an mp4 file with another display matrix: the rows say where x and y point."""
        one, corner = 1 << 16, 1 << 30
        (a, b), (c, d) = matrix
        content = bytearray(source.read_bytes())
        at = content.find(b"tkhd") + 4
        at += 40 if content[at] == 0 else 52  # the matrix follows times, ids, duration, layer and volume
        content[at : at + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, corner)
        return self.bytes(name, bytes(content))

    @staticmethod
    def decode(path: Path, wanted=None) -> tuple[np.ndarray, list]:
        """Decode everything in order, one thread: RGB of the source size, of all or the wanted frame numbers, and
        the timestamps of all in seconds."""
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            stream.codec_context.thread_type, stream.codec_context.thread_count = "SLICE", 1
            pictures, seconds = [], []
            for number, frame in enumerate(container.decode(stream)):
                if wanted is None or number in wanted:
                    pictures.append(frame.to_ndarray(format="rgb24"))
                seconds.append(None if frame.pts is None else float(frame.pts * stream.time_base))
        return np.stack(pictures), seconds

    @staticmethod
    def decode_vectors(path: Path) -> list:
        """The motion vector records of every frame, decoded in order, one thread."""
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            stream.codec_context.thread_type, stream.codec_context.thread_count = "SLICE", 1
            stream.codec_context.options = {"flags2": "+export_mvs"}
            side_data = [frame.side_data.get("MOTION_VECTORS") for frame in container.decode(stream)]
            return [None if data is None else data.to_ndarray().copy() for data in side_data]


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Clips:
    return Clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def moving_clip(clips) -> Path:
    """H.264, 40 frames of 96 x 128, everything moves right by 4 px per frame, key frames every 12, two B-frames."""
    return clips.write("moving.mp4", g=12, bf=2)


@pytest.fixture(scope="session")
def square_clip(clips) -> Path:
    """H.264 without B-frames: the moving square."""
    return clips.write("square.mp4", clips.square(), preset="medium", bf=0, refs=1, g=250)
