# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from onevision_encoder.video_inputs_onevision_encoder import fit_frames, known_fps, split_videos


def test_every_form_of_decoded_frames(frames):
    images = [Image.fromarray(frame) for frame in frames]
    tensor = torch.from_numpy(frames)
    for video in (frames, images, list(frames), tensor, tensor.permute(0, 3, 1, 2), frames[None], [frames], [images]):
        (found,) = split_videos(video)
        assert np.array_equal(found, frames)
    assert split_videos(["a.mp4", Path("b.mp4")]) == ["a.mp4", "b.mp4"]
    assert split_videos("http://host/c.mp4") == ["http://host/c.mp4"]
    assert len(split_videos([frames, "a.mp4", images])) == 3


def test_crop_keeps_the_centre_and_resize_the_whole():
    frame = np.zeros((1, 10, 30, 3), np.uint8)
    frame[:, :, 10:20] = 200
    assert (fit_frames(frame, 10, "crop") == 200).all()
    assert fit_frames(frame, 10, "resize").mean() == pytest.approx(200 / 3, abs=2)


def test_known_fps_of_one_mapping_a_list_or_nothing():
    assert known_fps({"fps": 5.0}, 3) == 5.0
    assert [known_fps([{"fps": 5.0}, {}, None], number) for number in range(3)] == [5.0, None, None]
    assert known_fps(None, 0) is None
