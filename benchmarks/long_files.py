# SPDX-License-Identifier: Apache-2.0
"""`select_video` on files of ten minutes to two hours: seconds and peak memory, each in a process of its own.

The files are stream copies of one clip, repeated; they are made in a temporary folder.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from facts import VIDEOS, print_header, print_table, single_thread

single_thread()

import av  # noqa: E402  after the thread settings

MEASURE = """
import json, resource, sys, time
start = time.perf_counter()
import codec_datasets
imported = time.perf_counter()
selection = codec_datasets.select_video(sys.argv[1], policy=sys.argv[2], num_threads=int(sys.argv[3]))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps(dict(frames=selection.video.num_frames, seconds=time.perf_counter() - imported,
                      imports=imported - start, megabytes=usage.ru_maxrss / 1024)))
"""


def repeat_clip(source: Path, target: Path, minutes: int) -> None:
    """Write `source` over and over, without re-encoding, until it lasts `minutes`."""
    with av.open(str(source)) as container:
        stream = container.streams.best("video")
        packets = [packet for packet in container.demux(stream) if packet.size]
        times = [(packet.pts, packet.dts) for packet in packets]
        span = max(pts for pts, _ in times) + packets[0].duration
        with av.open(str(target), "w") as output:
            copy = output.add_stream_from_template(stream)
            for repetition in range(int(minutes * 60 / float(span * stream.time_base)) + 1):
                for packet, (pts, dts) in zip(packets, times):
                    packet.pts, packet.dts = pts + repetition * span, dts + repetition * span
                    packet.time_base, packet.stream = stream.time_base, copy
                    output.mux(packet)


def measure(path: Path, policy: str, num_threads: int) -> dict:
    """Run `select_video` in a fresh process."""
    command = [sys.executable, "-c", MEASURE, str(path), policy, str(num_threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", nargs="+", type=Path, default=None, help="default: three of the clip folder")
    parser.add_argument("--minutes", nargs="+", type=int, default=[10, 60, 120])
    parser.add_argument("--policies", nargs="+", default=["replenish", "rate_distortion"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    arguments = parser.parse_args()
    clips = arguments.clips or [VIDEOS / name for name in ("bikes.mp4", "ytb_XwB-dkS5BVM.mp4", "vid_h264.mp4")]
    print_header("Long files: seconds and peak memory of `select_video`")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for clip in clips:
            for minutes in arguments.minutes:
                path = Path(folder) / f"{minutes}.mp4"
                repeat_clip(clip, path, minutes)
                for policy, threads in product(arguments.policies, arguments.threads):
                    result = measure(path, policy, threads)
                    rows.append(
                        [
                            clip.name,
                            str(minutes),
                            str(result["frames"]),
                            policy,
                            str(threads),
                            f"{result['seconds']:.2f}",
                            f"{result['megabytes']:.0f}",
                        ]
                    )
                path.unlink()
    print_table(
        ["clip, repeated", "minutes", "frames", "policy", "threads", "seconds", "peak MB, imports included"], rows
    )


if __name__ == "__main__":
    main()
