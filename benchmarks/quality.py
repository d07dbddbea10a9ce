# SPDX-License-Identifier: Apache-2.0
"""Hold and coverage PSNR of every policy at one budget, and agreement of `energy` with published selections.

A published selection is an array `visidx_thw` in `oracle/<clip>.npz` beside the clips.
"""

import argparse

from facts import VIDEOS, find_clips, print_header, print_table, single_thread

single_thread()

import numpy as np  # noqa: E402  after the thread settings

import codec_datasets as cd  # noqa: E402


def published_selection(clip_name: str) -> np.ndarray | None:
    path = VIDEOS / "oracle" / f"{clip_name}.npz"
    return np.load(path)["visidx_thw"] if path.exists() else None


def decibels(clip: cd.Clip, grid: cd.PatchGrid, positions: np.ndarray) -> tuple[float, float]:
    return cd.hold_psnr(clip.frames, grid, positions), cd.coverage_psnr(clip.frames, grid, positions)


def measure_clip(path, padding: str) -> dict[str, tuple[float, float]]:
    """`{policy: (hold, coverage)}` in dB, at 10 368 patches of 64 frames."""
    clip = cd.read_clip(path, coded=True)
    grid = cd.make_grid(len(clip.frames), clip.placement, 16)
    results = {}
    for policy in cd.POLICIES:
        selection = cd.select_clip(clip, cd.SelectionConfig(policy=policy, padding=padding, allow_fewer=True))
        results[policy] = decibels(clip, grid, selection.patch_positions)
    published = published_selection(path.stem)
    if published is not None:
        results["published"] = decibels(clip, grid, published)
    return results


def print_quality(padding: str) -> None:
    policies = ["published", "random", "uniform", "energy", "replenish", "rate_distortion", "coverage"]
    rows, with_oracle = [], []
    for path in find_clips():
        results = measure_clip(path, padding)
        cells = [
            f"{h:.2f} / {c:.2f}" if (h := results.get(p, (0, 0))[0]) and (c := results[p][1]) else "" for p in policies
        ]
        rows.append([path.name, *cells])
        if "published" in results:
            with_oracle.append([results[policy] for policy in policies])
    if with_oracle:
        means = np.mean(with_oracle, axis=0)
        rows.append(
            [
                f"**mean of the {len(with_oracle)} with a published selection**",
                *(f"{h:.2f} / {c:.2f}" for h, c in means),
            ]
        )
    print_table(["clip", *policies], rows)


def print_agreement() -> None:
    rows = []
    for path in find_clips():
        published = published_selection(path.stem)
        if published is None:
            continue
        ours = cd.select_video(path, policy="energy", padding="zero").patch_positions
        a, b = ({tuple(row) for row in positions if row[0] > 0} for positions in (ours, published))
        rows.append([path.name, f"{len(a & b) / len(a | b):.3f}", f"{len(a & b) / len(b):.3f}"])
    print_table(["clip", "IoU outside the first frame", "recall"], rows)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print_header("Quality: hold / coverage PSNR in dB, 10 368 patches of 64 frames, 576 px, patch 16")
    print("Letterbox padding excluded (the default): the whole budget goes to picture.\n")
    print_quality("exclude")
    print('`padding="zero"`: the padding of the first frame counts against the budget, as in the published layout.\n')
    print_quality("zero")
    print_header("Agreement of `energy` with the published selection")
    print_agreement()


if __name__ == "__main__":
    main()
