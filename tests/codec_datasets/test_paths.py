# SPDX-License-Identifier: Apache-2.0
"""Names and addresses: any file name, pipes, directories, http with and without ranges, fsspec."""

import contextlib
import http.server
import io
import os
import re
import shutil
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from codec_datasets import VideoError, probe_video, select_video, video

SMALL = {"num_frames": 8, "size": 96, "num_patches": 100}
NAMES = [
    "-lead.mp4",
    " spaces  in it .mp4",
    "a:b.mp4",
    "http:x.mp4",
    "concat:z.mp4",
    "pipe:0",
    "file:x.mp4",
    "img%03d.mp4",
    "#%20&?*[x].mp4",
    "tab\tline\n.mp4",
    "ünïcode 日本語 🎬.mp4",
    "no ending",
    "wrong.txt",
    "x" * 240 + ".mp4",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_file_name_opens(moving_clip, tmp_path, monkeypatch, name):
    shutil.copy(moving_clip, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, Path(name), tmp_path / name, str(tmp_path / name)):
        assert probe_video(path).num_frames == 40


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_names_that_are_no_text_open(moving_clip, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.mp4")
    shutil.copy(moving_clip, path)
    assert probe_video(path).num_frames == 40


def _refused(path, stage, reason, advice):
    with pytest.raises(VideoError, match=f"^{re.escape(str(path))}: ({stage}): ") as caught:
        select_video(path, **SMALL)
    assert re.search(reason, caught.value.reason), caught.value.reason
    assert re.search(advice, caught.value.advice), caught.value.advice


@pytest.mark.parametrize("name", ["missing.mp4", "", "\udcff.mp4", "concat:missing.mp4", "data:xx", "frame%03d.png"])
def test_missing_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _refused(name, "open", "no such file", "Check the path")


@pytest.mark.parametrize("path", [None, 7, io.BytesIO(b"")])
def test_only_names_are_taken(path):
    with pytest.raises(TypeError, match="a video is named by a str or Path, got"):
        probe_video(path)


def test_names_that_no_file_can_have():
    for name in ("x" * 300 + ".mp4", "nul\0.mp4"):
        _refused(name, "open", "no such file", "Check the path")


def test_directory(tmp_path):
    _refused(tmp_path, "open", "is a directory", "Pass one video file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    _refused(tmp_path / "pipe.mp4", "open", "is a pipe or a device", "Save it as a file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_file_without_permission(moving_clip, tmp_path):
    path = Path(shutil.copy(moving_clip, tmp_path / "locked.mp4"))
    path.chmod(0)
    _refused(path, "open", "no permission to read it", "Check its permissions")


def test_permission_is_checked(moving_clip, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    _refused(moving_clip, "open", "no permission to read it", "Check its permissions")


def test_fsspec_addresses(moving_clip):
    fsspec.filesystem("memory").pipe("/clips/moving.mp4", moving_clip.read_bytes())
    local, remote = (select_video(path, **SMALL) for path in (moving_clip, "memory://clips/moving.mp4"))
    assert np.array_equal(local.patch_positions, remote.patch_positions)
    assert np.array_equal(local.patches, remote.patches)
    assert probe_video(f"file://{moving_clip}").num_frames == 40


@pytest.mark.parametrize(
    ("address", "reason"),
    [("memory://clips/missing.mp4", "missing.mp4"), ("nosuch://x/y.mp4", "Protocol not known: nosuch")],
)
def test_fsspec_addresses_that_lead_nowhere(address, reason):
    _refused(address, "open", reason, "Check the address")


def test_fsspec_file_that_breaks_off(moving_clip):
    content = moving_clip.read_bytes()
    fsspec.filesystem("memory").pipe("/clips/cut.mp4", content[: len(content) // 2])
    _refused("memory://clips/cut.mp4", "open", "Invalid data", "Check the address")


class _Handler(http.server.BaseHTTPRequestHandler):
    """Sends the files of `folder`, with ranges or only from the beginning."""

    folder: Path
    has_ranges: bool
    breaks: str = ""

    def do_GET(self):
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        content, start = path.read_bytes(), 0
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.has_ranges else None
        if wanted:
            start = int(wanted[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        with contextlib.suppress(OSError):  # the reader has seen enough
            half = len(content) // 2 if self.breaks else len(content)
            self.wfile.write(content[start:half])
            self.wfile.flush()
            if self.breaks == "stalls":
                self.server.silence.wait(60)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def _serving(folder, monkeypatch, **options):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler = type("Handler", (_Handler,), {"folder": folder, **options})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads, server.silence = True, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.silence.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def address(request, clips, monkeypatch):
    with _serving(clips.folder, monkeypatch, has_ranges=request.param) as server:
        yield request.param, server


@pytest.fixture(scope="module")
def noise():
    """Too large for the reader's buffer, so that seeking back needs the server."""
    return np.random.default_rng(0).integers(0, 255, (24, 144, 176, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["net.mp4", "net.mkv", "net.flv", "net.ts"])
@pytest.mark.parametrize("policy", ["replenish", "energy"])
def test_http(clips, noise, address, name, policy):
    _, server = address
    path = clips.write(name, noise, mux={"movflags": "faststart"} if name == "net.mp4" else None, g=6, crf=5)
    assert path.stat().st_size > 500_000
    local, remote = (select_video(p, policy=policy, num_threads=2, **SMALL) for p in (path, f"{server}/{name}"))
    assert np.array_equal(local.frame_indices, remote.frame_indices)
    assert np.array_equal(local.patch_positions, remote.patch_positions)
    assert np.array_equal(local.patches, remote.patches)
    assert remote.video.is_seekable <= local.video.is_seekable


def test_http_with_the_index_at_the_end(clips, noise, address):
    has_ranges, server = address
    clips.write("index_last.mp4", noise, g=6, crf=5)
    if has_ranges:
        assert probe_video(f"{server}/index_last.mp4").num_frames == 24
    else:
        _refused(f"{server}/index_last.mp4", "decode", "reading failed", "Check the disk or the connection")


@pytest.mark.parametrize("breaks", ["closes", "stalls"])
@pytest.mark.parametrize("name", ["net.mp4", "net.mkv", "net.flv", "net.ts"])
@pytest.mark.parametrize("has_ranges", [True, False])
def test_http_that_breaks_off(clips, noise, monkeypatch, name, breaks, has_ranges):
    """Half a file is no video: the connection failed, not the data. And nobody waits for ever."""
    monkeypatch.setattr(video, "_TIMEOUT_SECONDS", 0.2)
    clips.write(name, noise, mux={"movflags": "faststart"} if name == "net.mp4" else None, g=6, crf=5)
    with _serving(clips.folder, monkeypatch, has_ranges=has_ranges, breaks=breaks) as server:
        reason = "Input/output error|no data for 0.2 seconds"
        _refused(f"{server}/{name}", "decode", rf"reading failed \(({reason})\)", "Check the disk or the connection")


def test_fsspec_file_that_fails_while_it_is_read(clips, noise, monkeypatch):
    content = clips.write("net.mkv", noise, g=6, crf=5).read_bytes()

    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 300_000:
                raise OSError(5, "the disk failed")
            return super().read(size)

    opened = type("Opened", (), {"open": lambda self: Failing(content)})
    monkeypatch.setattr(fsspec, "open", lambda name, mode: opened())
    _refused("memory://failing.mkv", "decode", r"reading failed \(the disk failed\)", "Check the disk")


def test_http_errors(clips, address):
    _, server = address
    clips.bytes("page.mp4", b"<html>not here</html>" * 50)
    _refused(f"{server}/missing.mp4", "open", "404", "Check the address")
    _refused(f"{server}/page.mp4", "open", "Invalid data", "Check the address")


def test_http_without_a_server():
    _refused("http://127.0.0.1:9/x.mp4", "open", "refused|not readable", "Check the address")


@pytest.mark.parametrize("fails_at", ["open", "first read", "later read"])
def test_fsspec_backends_may_raise_anything(clips, noise, monkeypatch, fails_at):
    path = clips.write("backend.mp4", noise, g=6, crf=5)
    opened = []

    class File(io.BytesIO):
        reads = 0

        def read(self, size=-1):
            self.reads += 1
            if fails_at == "first read" or (fails_at == "later read" and self.reads > 3):
                raise RuntimeError("token expired")
            return super().read(size)

    class Opener:
        def open(self):
            if fails_at == "open":
                raise RuntimeError("token expired")
            opened.append(File(path.read_bytes()))
            return opened[-1]

    monkeypatch.setattr(fsspec, "open", lambda *arguments: Opener())
    with pytest.raises(VideoError, match=r"cloud://a.mp4: (open|decode): .*token expired"):
        select_video("cloud://a.mp4", **SMALL)
    assert all(file.closed for file in opened)
