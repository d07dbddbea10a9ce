# SPDX-License-Identifier: Apache-2.0
"""What the package needs, and what its saved folders need: each checked in a process that lacks the rest."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import onevision_encoder
from onevision_encoder import OneVisionEncoderImageProcessor, OneVisionEncoderVideoProcessor

OURS = ("onevision_encoder", "codec_datasets", "llava_codec")


@pytest.fixture
def saved(tmp_path, build_model, frames):
    """A folder with model and processors, a picture, frames, and what they give here.

    The frames have the processor's size: with and without `codec_datasets` they give the same pixels.
    """
    frames = frames[:, :8, :8]
    model = build_model()
    image_processor = OneVisionEncoderImageProcessor(patch_size=4, size={"shortest_edge": 16}, crop_size=16)
    video_processor = OneVisionEncoderVideoProcessor(patch_size=4, size=8, num_frames=3)
    for part in (model, image_processor, video_processor):
        part.save_pretrained(tmp_path / "saved")
    image = Image.fromarray(frames[0])
    image.save(tmp_path / "image.png")
    np.save(tmp_path / "frames.npy", frames)
    with torch.no_grad():
        expected = {
            "image": model(**image_processor(image, return_tensors="pt")).pooler_output,
            "patches": model(**image_processor(image, layout="patches", return_tensors="pt")).pooler_output,
            "video": model(**video_processor(frames, return_tensors="pt")).pooler_output,
        }
    torch.save(expected, tmp_path / "expected.pt")
    return tmp_path


LOAD_AND_COMPARE = """
import numpy as np, torch
from PIL import Image
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
trust = {"trust_remote_code": TRUST}
model = AutoModel.from_pretrained("FOLDER", **trust).eval()
images = AutoImageProcessor.from_pretrained("FOLDER", **trust)
videos = AutoVideoProcessor.from_pretrained("FOLDER", **trust)
assert type(model).__module__.split(".")[0] == "MODULE", type(model)
expected = torch.load("expected.pt")
image, frames = Image.open("image.png"), np.load("frames.npy")
with torch.no_grad():
    found = {
        "image": model(**images(image, return_tensors="pt")).pooler_output,
        "patches": model(**images(image, layout="patches", return_tensors="pt")).pooler_output,
        "video": model(**videos(frames, return_tensors="pt")).pooler_output,
    }
for name, value in expected.items():
    torch.testing.assert_close(found[name], value, atol=2e-6, rtol=0)
"""


def load_and_compare(folder, trust, module):
    return LOAD_AND_COMPARE.replace("FOLDER", folder).replace("TRUST", str(trust)).replace("MODULE", module)


def test_saved_folder_loads_where_nothing_of_ours_is_installed(saved, run_without):
    code = load_and_compare("saved", True, "transformers_modules")
    code += """
try:
    videos("clip.mp4", sampling="codec")
except ImportError as error:
    print(error)
for part in (model, images, videos):
    part.save_pretrained("again")
"""
    assert "pip install codec-datasets" in run_without(OURS, code, cwd=saved)
    run_without(OURS, load_and_compare("again", True, "transformers_modules"), cwd=saved)


def test_model_and_processors_work_without_torchvision(saved, run_without):
    code = load_and_compare("saved", False, "onevision_encoder")
    run_without(("torchvision",), "import onevision_encoder\n" + code, cwd=saved)


def test_remote_code_works_without_torchvision(saved, run_without):
    run_without((*OURS, "torchvision"), load_and_compare("saved", True, "transformers_modules"), cwd=saved)


def test_import_needs_no_video_or_dataset_package():
    code = "import sys, onevision_encoder; print(*{'av', 'datasets', 'codec_datasets', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_version_is_the_installed_one():
    assert onevision_encoder.__version__ == version("onevision-encoder")


def test_only_names_of_ours_are_shown():
    submodules = {path.stem for path in Path(onevision_encoder.__file__).parent.glob("*.py")}
    shown = {name for name in dir(onevision_encoder) if not name.startswith("_")}
    assert shown - submodules == set(onevision_encoder.__all__)


def test_public_names_exist():
    for name in onevision_encoder.__all__:
        assert getattr(onevision_encoder, name).__name__ == name
