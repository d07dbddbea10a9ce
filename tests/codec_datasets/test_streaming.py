# SPDX-License-Identifier: Apache-2.0
"""Frame by frame and all at once keep the same patches; the stream remembers one picture."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from codec_datasets import ReplenishStream, SelectionConfig, clip_from_frames, make_grid, select_patches

PATCH = 4


def _noisy_frames(seed, num_frames, height, width):
    rng = np.random.default_rng(seed)
    still = rng.integers(0, 256, (height, width, 3))
    noise = rng.integers(-30, 30, (num_frames, height, width, 3)) * (rng.random((num_frames, height, width, 1)) < 0.3)
    return np.clip(still + noise, 0, 255).astype(np.uint8)


@example(0, 2, (8, 11), 1.0, 2, "full", "exclude")  # blocks that are half letterbox
@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.tuples(st.integers(8, 40), st.integers(8, 40)),
    st.floats(0.5, 40),
    st.sampled_from([1, 2]),
    st.sampled_from(["full", "selected"]),
    st.sampled_from(["exclude", "zero"]),
)
def test_stream_is_batch(seed, num_frames, sides, threshold, block, first_frame, padding):
    clip = clip_from_frames(_noisy_frames(seed, num_frames, *sides), size=8 * PATCH)
    grid = make_grid(num_frames, clip.placement, PATCH)
    config = SelectionConfig(
        patch_size=PATCH,
        num_patches=64 * num_frames,
        block=block,
        first_frame=first_frame,
        padding=padding,
        stop_below_error=threshold,
        allow_fewer=True,
    )
    batch = select_patches(clip.frames, grid, config)
    valid = grid.content if padding == "exclude" else None
    stream = ReplenishStream(threshold, PATCH, block=block, valid=valid, first_frame=first_frame)
    streamed = np.concatenate([stream.push(frame) for frame in clip.frames])
    assert streamed.dtype == np.int32
    assert np.array_equal(streamed, batch)


def test_state_is_one_picture():
    stream = ReplenishStream(8.0, PATCH)
    rng = np.random.default_rng(0)
    for t in range(300):
        positions = stream.push(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        assert (positions[:, 0] == t).all()
    held = [value for value in vars(stream).values() if isinstance(value, np.ndarray)]
    assert sum(value.nbytes for value in held) == 16 * 16 * 3
    assert stream.num_frames == 300


def test_pushed_frames_are_not_changed_or_kept():
    stream, frame = ReplenishStream(1.0, PATCH), np.full((8, 8, 3), 9, np.uint8)
    assert len(stream.push(frame)) == 4
    frame[:] = 200  # a camera reuses its buffer
    assert len(stream.push(frame)) == 4
    assert (frame == 200).all()
    assert len(stream.push(frame)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1.0, 4), "threshold >= 0"), ((1.0, 0), "patch_size >= 1"), ((1.0, 4, 3), "block 1 or 2")],
)
def test_impossible_streams_are_refused(arguments, message):
    threshold, patch_size, *block = arguments
    with pytest.raises(ValueError, match=message):
        ReplenishStream(threshold, patch_size, block=block[0] if block else 1)


def test_frames_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"frame must be \(H, W, 3\) uint8, got \(8, 8\) uint8"):
        ReplenishStream(1.0, 4).push(np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="frame of 10x8 is not divisible by 4 pixels"):
        ReplenishStream(1.0, 4).push(np.zeros((10, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"valid must be \(2, 2\) for these frames, got \(3, 3\)"):
        ReplenishStream(1.0, 4, valid=np.ones((3, 3), bool)).push(np.zeros((8, 8, 3), np.uint8))
    stream = ReplenishStream(1.0, 4)
    stream.push(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"frame size changed from \(8, 8, 3\) to \(8, 12, 3\); start a new stream"):
        stream.push(np.zeros((8, 12, 3), np.uint8))
