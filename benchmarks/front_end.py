# SPDX-License-Identifier: Apache-2.0
"""Cost of `select_video` against plainly decoding the frames it needs, and of the selection step alone.

CPU seconds of one core, best of `--runs`. "Plain" seeks to the key frame before each group of sampled frames and
decodes every picture up to the last one of the group, without converting any: the least a frame reader has to do.
"""

import argparse
import time

from facts import find_clips, print_header, print_table, single_thread

single_thread()

import av  # noqa: E402  after the thread settings
import numpy as np  # noqa: E402

import codec_datasets as cd  # noqa: E402

ALLOWED_RATIO, ALLOWED_SECONDS = 1.3, 0.6


def cpu_seconds(function, runs: int) -> float:
    """Least process time of several calls."""
    best = float("inf")
    for _ in range(runs):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def decode_plainly(path: str, frame_indices: np.ndarray) -> int:
    """Decode what the sampled frames need; returns how many pictures that were."""
    with av.open(path) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_type, stream.codec_context.thread_count = "SLICE", 1
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
        order = sorted(pts for pts, _ in packets)
        keys = sorted(pts for pts, is_key in packets if is_key)
        groups: dict[int, int] = {}
        for pts in (order[index] for index in frame_indices):
            key = keys[max(int(np.searchsorted(keys, pts, "right")) - 1, 0)]
            groups[key] = max(groups.get(key, pts), pts)
        decoded = 0
        for key, last in groups.items():
            container.seek(key, stream=stream)
            for frame in container.decode(stream):
                decoded += 1
                if frame.pts >= last:
                    break
        return decoded


def bench_clips(runs: int, policies: list[str]) -> None:
    print_header("Front end: `select_video` against a plain decode")
    rows = []
    for path in find_clips():
        indices = cd.read_clip(path).frame_indices
        plain = cpu_seconds(lambda: decode_plainly(str(path), indices), runs)  # noqa: B023
        row = [path.name, f"{plain:.2f}"]
        for policy in policies:
            select = cpu_seconds(lambda: cd.select_video(path, policy=policy, allow_fewer=True, num_threads=1), runs)  # noqa: B023
            allowed = ALLOWED_RATIO * plain + ALLOWED_SECONDS
            row.append(
                f"{select:.2f} ({select / plain:.1f}x, {'within' if select <= allowed else 'above'} {allowed:.2f})"
            )
        rows.append(row)
    print_table(["clip", "plain decode, s", *(f"{policy}, s" for policy in policies)], rows)


def bench_selection_step(runs: int) -> None:
    print_header("Selection step alone: 64 frames of 36x36 patches, full-resolution colour, 10 368 kept")
    rows = []
    for path in find_clips():
        for fit in ("letterbox", "crop"):
            clip = cd.read_clip(path, fit=fit)
            if len(clip.frames) < 64:
                continue
            grid = cd.make_grid(64, clip.placement, 16)
            row = [path.name, fit, str(int(grid.content.sum()))]
            for policy in ("replenish", "rate_distortion", "coverage"):
                config = cd.SelectionConfig(policy=policy)
                seconds = cpu_seconds(lambda: cd.select_patches(clip.frames, grid, config), runs)  # noqa: B023
                row.append(f"{1000 * seconds:.0f}")
            rows.append(row)
    print_table(["clip", "fit", "patches per frame", "replenish, ms", "rate_distortion, ms", "coverage, ms"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--policies", nargs="+", default=["replenish", "rate_distortion", "energy"])
    arguments = parser.parse_args()
    bench_clips(arguments.runs, arguments.policies)
    bench_selection_step(arguments.runs)


if __name__ == "__main__":
    main()
