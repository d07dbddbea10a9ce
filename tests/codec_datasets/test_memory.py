# SPDX-License-Identifier: Apache-2.0
"""A long video is not held in memory, whether it is found by seeking or decoded in order."""

import subprocess
import sys

import numpy as np
import pytest

NUM_FRAMES, HEIGHT, WIDTH = 3000, 160, 192
WHOLE_VIDEO = NUM_FRAMES * HEIGHT * WIDTH * 3 // 2  # bytes of its decoded pictures: 138 MB
PROGRAM = """
import resource, sys
from codec_datasets import select_video
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
def run(path):
    return select_video(path, num_frames=16, size=96, num_patches=100, policy="energy", num_threads=2)
run(sys.argv[1])  # libraries, tables and pools
before = peak()
assert run(sys.argv[2]).video.num_frames == int(sys.argv[3])
print(peak() - before)
"""


@pytest.fixture(scope="module")
def endless(clips):
    """Frames that repeat, made as they are asked for."""
    loop = clips.pan(30, HEIGHT, WIDTH)

    class Frames:
        shape = (NUM_FRAMES, HEIGHT, WIDTH, 3)

        def __getitem__(self, at):
            if not 0 <= at < NUM_FRAMES:
                raise IndexError(at)
            return loop[at % 30]

    return Frames()


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is missing on Windows")
@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("mp4", {"g": 30, "preset": "ultrafast"}),
        ("ts", {"g": 30, "preset": "ultrafast"}),
        ("webm", {"codec": "libvpx", "deadline": "realtime", "cpu-used": 16, "g": 30}),
    ],
)
def test_long_video_is_not_held_in_memory(clips, endless, ending, options):
    short = clips.write(f"brief.{ending}", clips.pan(30, HEIGHT, WIDTH), **options)
    long = clips.write(f"long.{ending}", endless, **options)
    command = [sys.executable, "-c", PROGRAM, str(short), str(long), str(NUM_FRAMES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < WHOLE_VIDEO / 3


def test_only_sampled_frames_are_decoded(clips, monkeypatch):
    """Seeking sends the decoder the groups of pictures of the sampled frames, not the file."""
    from codec_datasets import clip, read_clip

    path = clips.write("groups.mp4", clips.pan(120), g=10, bf=2)
    sent = []
    decode_packet = clip.decode_packet
    monkeypatch.setattr(
        clip, "decode_packet", lambda codec, packet: sent.append(packet) or decode_packet(codec, packet)
    )
    frames = read_clip(path, 3, 96).frame_indices
    assert np.array_equal(frames, [0, 59, 119])
    assert sum(packet is not None for packet in sent) < 25
