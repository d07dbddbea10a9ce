# SPDX-License-Identifier: Apache-2.0
"""Same input, same bytes: again, with more threads, in another process, with another BLAS thread count."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from codec_datasets import POLICIES, select_video

OPTIONS = {"num_frames": 20, "size": 128, "patch_size": 8, "num_patches": 1200}
PROGRAM = """
import sys, hashlib
from codec_datasets import POLICIES, select_video
for policy in POLICIES:
    kept = select_video(sys.argv[1], num_frames=20, size=128, patch_size=8, num_patches=1200, policy=policy)
    print(policy, hashlib.sha256(kept.patch_positions.tobytes() + kept.patches.tobytes()).hexdigest())
"""


def _digest(selection):
    return hashlib.sha256(selection.patch_positions.tobytes() + selection.patches.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def files(clips):
    """One codec with vectors and one without."""
    return (
        clips.write("same.mp4", g=12, bf=2),
        clips.write("same265.mp4", codec="libx265", x265_params="log-level=none:keyint=12"),
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_twice_and_with_more_threads(files, policy):
    for path in files:
        digests = {
            _digest(select_video(path, policy=policy, num_threads=num_threads, **OPTIONS))
            for num_threads in (1, 1, 2, 3, 8)
        }
        assert len(digests) == 1


def test_threads_that_race_give_the_same_vectors(clips):
    """Frame threads would corrupt exported vectors, differently in each run."""
    path = clips.write("race.mp4", clips.pan(120), g=8, bf=3)
    first, *others = (
        select_video(path, num_frames=64, size=96, num_patches=500, policy="energy", num_threads=4) for _ in range(6)
    )
    for other in others:
        assert np.array_equal(first.patch_positions, other.patch_positions)


def test_another_process_and_another_blas(files):
    """One and two BLAS threads, and other hash seeds."""
    for path in files:
        outputs = set()
        for num_threads in ("1", "2"):
            variables = {"OPENBLAS_NUM_THREADS": num_threads, "OMP_NUM_THREADS": num_threads}
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, str(path)],
                env={**os.environ, **variables, "PYTHONHASHSEED": num_threads},
                capture_output=True,
                text=True,
                check=True,
            )
            outputs.add(done.stdout)
        [output] = outputs
        expected = [f"{policy} {_digest(select_video(path, policy=policy, **OPTIONS))}" for policy in POLICIES]
        assert output.splitlines() == expected
