# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from onevision_encoder import OneVisionEncoderImageProcessor
from onevision_encoder.image_processing_onevision_encoder import (
    cut_patches,
    grid_of_positions,
    normalize_patches,
    patch_aligned_size,
)
from onevision_encoder.inputs_onevision_encoder import grid_positions, patchify

# as published; the fields are those CLIPImageProcessor wrote
PUBLISHED = {
    "crop_size": {"height": 448, "width": 448},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 448},
}


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_twins_in_numpy_and_torch_agree():
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 12), dtype=np.uint8)
    expected = patchify(torch.from_numpy(image)[None, :, None], 4)[0].numpy()
    assert np.array_equal(cut_patches(image, 4), expected)
    expected = grid_positions(torch.arange(5 * 2 * 3)[None], 2, 3)[0].numpy()
    assert np.array_equal(grid_of_positions(np.arange(5), 2, 3), expected)


def test_normalize_patches_is_per_channel():
    image = np.stack([np.full((4, 4), value, np.uint8) for value in (10, 20, 30)])
    options = {"do_rescale": True, "rescale_factor": 0.1, "do_normalize": True}
    found = normalize_patches(cut_patches(image, 2), 2, **options, image_mean=(1, 1, 1), image_std=(1, 2, 4))
    np.testing.assert_allclose(found, np.repeat([[0, 0.5, 0.5]], 4, axis=0).repeat(4, axis=1), rtol=1e-6)
    assert found.dtype == np.float32
    plain = normalize_patches(
        found, 2, do_rescale=False, rescale_factor=9, do_normalize=False, image_mean=0, image_std=1
    )
    assert np.array_equal(plain, found)


def test_default_is_the_published_preprocessing(image):
    processor = OneVisionEncoderImageProcessor()
    expected = CLIPImageProcessorPil(**PUBLISHED)(image, return_tensors="pt").pixel_values
    found = processor(image, return_tensors="pt")
    assert list(found) == ["pixel_values"]
    assert found.pixel_values.shape == (1, 3, 448, 448)
    assert torch.equal(found.pixel_values, expected)


def test_patches_are_the_image_at_its_resolution(image, build_model):
    processor = OneVisionEncoderImageProcessor(patch_size=4)
    small = image.resize((32, 20))
    found = processor([small, image.resize((8, 12))], layout="patches", return_tensors="pt")
    assert found.pixel_values.shape == (2, 40, 48)
    assert found.image_position_ids.shape == (2, 40, 3)
    assert (found.image_position_ids[1, 6:] == -1).all()
    assert not found.pixel_values[1, 6:].any()
    dense = processor(small, do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(found.pixel_values[0], patchify(dense.unsqueeze(2), 4)[0], atol=1e-6, rtol=0)
    with torch.no_grad():
        tokens, expected = build_model()(**found).last_hidden_state[0], build_model()(dense).last_hidden_state[0]
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("height", "width", "max_num_patches", "expected"),
    [
        (448, 448, None, (448, 448)),
        (300, 500, None, (294, 504)),  # nearest multiples of 14
        (5, 5, None, (14, 14)),
        (300, 500, 100, (98, 168)),  # 7 x 12 patches keep the aspect
        (14, 14000, 10, (14, 140)),
        (2000, 14, 10, (140, 14)),
    ],
)
def test_patch_aligned_size(height, width, max_num_patches, expected):
    assert patch_aligned_size(height, width, 14, max_num_patches) == expected


def test_size_that_may_not_change_raises(image):
    with pytest.raises(ValueError, match=r"90x130 pixels is not whole in patches of 14.*84x126"):
        OneVisionEncoderImageProcessor()(image, layout="patches", do_resize=False)


@pytest.mark.parametrize("name", ["patch_size", "max_num_patches"])
def test_counts_below_one_raise(image, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        OneVisionEncoderImageProcessor()(image, layout="patches", **{name: 0})


def test_unknown_option_raises(image):
    with pytest.raises(TypeError, match="paches"):
        OneVisionEncoderImageProcessor()(image, paches=True)
    with pytest.raises(ValueError, match="layout must be 'image' or 'patches', got 'rows'"):
        OneVisionEncoderImageProcessor()(image, layout="rows")


def test_saved_is_loaded(tmp_path, image):
    processor = OneVisionEncoderImageProcessor(layout="patches", patch_size=16, max_num_patches=20)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is OneVisionEncoderImageProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert torch.equal(
        loaded(image, return_tensors="pt").pixel_values, processor(image, return_tensors="pt").pixel_values
    )


@pytest.mark.parametrize("names_its_class", [True, False])
def test_published_preprocessor_config_loads(tmp_path, config, image, names_its_class):
    fields = {name: value for name, value in PUBLISHED.items() if names_its_class or name != "image_processor_type"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    config.save_pretrained(tmp_path)
    by_auto = AutoImageProcessor.from_pretrained(tmp_path)  # the class the file names, ours if it names none
    assert isinstance(by_auto, OneVisionEncoderImageProcessor) == (not names_its_class)
    ours = OneVisionEncoderImageProcessor.from_pretrained(tmp_path)
    expected = ours(image, return_tensors="pt").pixel_values
    found = by_auto(image, return_tensors="pt").pixel_values
    # torchvision and Pillow resample uint8 with other roundings: some grey levels, in units of std 0.26
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
