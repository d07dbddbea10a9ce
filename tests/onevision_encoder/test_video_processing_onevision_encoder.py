# SPDX-License-Identifier: Apache-2.0
"""The video processor; reading and selecting, the work of `codec_datasets`, is replaced where the hand-over counts."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from onevision_encoder import OneVisionEncoderVideoProcessor
from onevision_encoder.inputs_onevision_encoder import patchify
from onevision_encoder.video_inputs_onevision_encoder import fit_frames
from onevision_encoder.video_processing_onevision_encoder import time_slots

# files are resized in YUV and converted then, decoded frames are converted at full size: rounding differs, by 1 in the
# grey clip; another filter differs by 80 (Pillow's bicubic)
GREY_LEVELS_BETWEEN_YUV_AND_RGB = 2


@pytest.fixture
def calls(monkeypatch):
    """Replace `codec_datasets` by a module that records its calls and returns small results."""
    recorded = []
    video = SimpleNamespace(num_frames=90, average_fps=30.0, width=60, height=40, duration_seconds=3.0)

    def clip(num_frames, size):
        frames = np.arange(num_frames, dtype=np.uint8)[:, None, None, None] + np.zeros((1, size, size, 3), np.uint8)
        indices = np.arange(num_frames)
        return SimpleNamespace(frames=frames, frame_indices=indices, pts_seconds=indices / 30, video=video)

    def selection(clip, patch_size, num_patches, **kwargs):
        patches = np.full((num_patches, patch_size, patch_size, 3), 7, np.uint8)
        positions = np.stack([np.arange(num_patches)] * 3, axis=1).astype(np.int32) % len(clip.frames)
        return SimpleNamespace(patches=patches, patch_positions=positions, **vars(clip))

    def select_video(path, **kwargs):
        recorded.append(("select_video", path, kwargs))
        return selection(clip(kwargs["num_frames"], 8), kwargs["patch_size"], kwargs["num_patches"])

    def read_clip(path, **kwargs):
        recorded.append(("read_clip", path, kwargs))
        return clip(kwargs["num_frames"], kwargs["size"])

    def clip_from_frames(frames, **kwargs):
        recorded.append(("clip_from_frames", frames.shape, kwargs))
        return clip(len(frames), kwargs["size"])

    def select_clip(clip, config):
        recorded.append(("select_clip", clip.frames.shape, config))
        return selection(clip, **{**config, "num_patches": min(config["num_patches"], 6)})

    module = ModuleType("codec_datasets")
    module.SelectionConfig = dict
    for function in (select_video, read_clip, clip_from_frames, select_clip):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "codec_datasets", module)
    return recorded


@pytest.fixture
def without_codec_datasets(monkeypatch):
    """Make the import of `codec_datasets` fail as if it were not installed."""
    monkeypatch.setitem(sys.modules, "codec_datasets", None)


def test_time_slots_are_the_published_ones():
    assert time_slots(8).tolist() == [0, 9, 18, 27, 36, 45, 54, 63]
    assert time_slots(16).tolist() == [0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63]
    assert time_slots(1).tolist() == [0]
    assert time_slots(100).tolist() == list(range(100))


def test_uniform_frames_are_the_dense_input(without_codec_datasets, frames, build_model):
    processor, model = OneVisionEncoderVideoProcessor(patch_size=4), build_model()
    found = processor(frames, num_frames=3, size=16, return_tensors="pt", return_metadata=True)
    metadata = found.pop("video_metadata")[0]
    assert metadata.frame_indices == [0, 5, 11]
    assert metadata.num_patches == 48
    pixels = torch.from_numpy(fit_frames(frames[[0, 5, 11]], 16, "crop")).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    dense = ((pixels - mean) / std).transpose(0, 1)[None]  # (1, 3, T, H, W)
    torch.testing.assert_close(found.pixel_values, patchify(dense, 4), atol=1e-5, rtol=0)
    positions = found.image_position_ids
    assert positions[0, ::16, 0].tolist() == [0, 31, 63]
    with torch.no_grad():
        outputs, expected = model(**found), model(dense, patch_positions=positions)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=0)


def test_uniform_frames_are_fitted_as_frames_of_files_are(frames):
    codec_datasets = pytest.importorskip("codec_datasets")
    processor = OneVisionEncoderVideoProcessor(patch_size=4, do_normalize=False, rescale_factor=1.0)
    found = processor(frames, num_frames=3, size=16, return_tensors="pt", return_metadata=True)
    metadata = found["video_metadata"][0]
    assert (metadata.frame_indices, metadata.total_num_frames) == ([0, 5, 11], 12)
    assert (metadata.height, metadata.width, metadata.duration) == (40, 60, None)
    expected = codec_datasets.clip_from_frames(frames[[0, 5, 11]], size=16, fit="crop").frames
    expected = torch.from_numpy(expected).permute(3, 0, 1, 2)[None].float()  # (1, 3, T, H, W)
    assert torch.equal(found["pixel_values"], patchify(expected, 4))


def test_defaults_of_uniform_sampling(frames):
    found = OneVisionEncoderVideoProcessor()(frames, return_tensors="pt")
    assert found.pixel_values.shape == (1, 8 * 16 * 16, 588)
    assert found.pixel_values.dtype == torch.float32
    assert found.image_position_ids.dtype == torch.int64
    assert OneVisionEncoderVideoProcessor()(frames)["pixel_values"].__class__ is np.ndarray


def test_short_and_long_videos_share_a_batch(frames):
    processor = OneVisionEncoderVideoProcessor(patch_size=4, size=8, num_frames=6)
    found = processor([frames, frames[:2]], return_tensors="pt")
    assert (found.image_position_ids >= 0).all(-1).sum(-1).tolist() == [24, 8]
    assert found.image_position_ids[1, :8:4, 0].tolist() == [0, 63]


def test_all_frames_on_request(frames):
    processor = OneVisionEncoderVideoProcessor(patch_size=4, size=8, num_frames=2)
    assert processor(frames, do_sample_frames=False)["pixel_values"].shape == (1, 12 * 4, 48)


def test_codec_defaults(calls):
    found = OneVisionEncoderVideoProcessor()("clip.mp4", sampling="codec", return_tensors="pt")
    assert found.pixel_values.shape == (1, 10368, 588)
    assert calls == [
        (
            "select_video",
            "clip.mp4",
            {
                "num_frames": 64,
                "size": 504,
                "fit": "letterbox",
                "patch_size": 14,
                "num_threads": 1,
                "num_patches": 10368,
                "policy": "replenish",
                "block": 1,
                "first_frame": "full",
                "padding": "exclude",
                "motion_weight": 0.0,
                "stop_below_error": 0.0,
                "seed": 0,
                "allow_fewer": True,
            },
        )
    ]


def test_codec_arguments_reach_the_selection(calls):
    changed = {"num_patches": 5, "policy": "energy", "block": 2, "first_frame": "selected", "padding": "zero"}
    changed |= {"motion_weight": 0.5, "stop_below_error": 2.0, "seed": 3, "allow_fewer": False}
    changed |= {"num_frames": 4, "size": 56, "fit": "crop"}
    OneVisionEncoderVideoProcessor(sampling="codec")("clip.mp4", **changed)
    assert changed.items() <= calls[0][2].items()


def test_codec_budget_follows_size_and_frames(calls):
    processor = OneVisionEncoderVideoProcessor(sampling="codec", size=28)
    processor(["a.mp4", "b.mp4"])
    processor("c.mp4", num_frames=3)
    assert [(path, kwargs["num_patches"]) for _, path, kwargs in calls] == [
        ("a.mp4", 32),
        ("b.mp4", 32),
        ("c.mp4", 12),
    ]


def test_codec_patches_are_flattened_channels_first(calls, monkeypatch):
    patches = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    codec_datasets = sys.modules["codec_datasets"]
    original = codec_datasets.select_video

    def select_video(path, **kwargs):
        selection = original(path, **kwargs)
        selection.patches = patches
        return selection

    monkeypatch.setattr(codec_datasets, "select_video", select_video)
    processor = OneVisionEncoderVideoProcessor(sampling="codec", patch_size=4, do_normalize=False, rescale_factor=1.0)
    found = processor("clip.mp4", num_patches=2)["pixel_values"]
    assert np.array_equal(found[0].reshape(2, 3, 4, 4), patches.transpose(0, 3, 1, 2))


def test_energy_of_decoded_frames_raises_before_anything_is_read(calls, frames):
    processor = OneVisionEncoderVideoProcessor(sampling="codec", policy="energy")
    with pytest.raises(ValueError, match=r"bitstream, which decoded frames have lost.*path of the file"):
        processor(["a.mp4", frames])
    assert calls == []


def test_codec_of_decoded_frames(calls, frames):
    processor = OneVisionEncoderVideoProcessor(sampling="codec", num_frames=4, size=28)
    found = processor(frames, return_metadata=True)
    assert [call[:2] for call in calls] == [("clip_from_frames", (4, 40, 60, 3)), ("select_clip", (4, 28, 28, 3))]
    assert calls[0][2]["frame_indices"].tolist() == [0, 3, 7, 11]
    assert calls[0][2]["fit"] == "letterbox"
    assert found["pixel_values"].shape == (1, 6, 588)


@pytest.mark.parametrize("sampling", ["uniform", "codec"])
def test_times_of_decoded_frames(calls, frames, sampling):
    processor = OneVisionEncoderVideoProcessor(sampling=sampling, num_frames=3, size=28, return_metadata=True)
    assert processor(frames)["video_metadata"][0].pts_seconds is None
    facts = [{"fps": 5.0, "total_num_frames": 12}, {"total_num_frames": 12}]
    timed, untimed = processor([frames, frames], video_metadata=facts)["video_metadata"]
    assert timed.timestamps == timed.pts_seconds == [index / 5 for index in timed.frame_indices]
    assert untimed.pts_seconds is None
    assert timed.total_num_frames == 12


def test_uniform_from_a_file(calls):
    found = OneVisionEncoderVideoProcessor(size=28)("clip.mp4", num_frames=3, return_metadata=True)
    assert calls == [("read_clip", "clip.mp4", {"num_frames": 3, "size": 28, "fit": "crop", "num_threads": 1})]
    assert found["image_position_ids"][0, :, 0].tolist() == [0] * 4 + [31] * 4 + [63] * 4
    metadata = found["video_metadata"][0]
    assert (metadata.sampling, metadata.num_patches, metadata.fps) == ("uniform", 12, 30.0)
    assert metadata.frame_indices == [0, 1, 2]
    assert metadata.timestamps == metadata.pts_seconds == [0, 1 / 30, 2 / 30]


@pytest.mark.parametrize("arguments", [{}, {"fit": "letterbox"}, {"sampling": "codec"}])
def test_threads_reach_the_decoder(calls, arguments):
    OneVisionEncoderVideoProcessor(num_threads=4)("clip.mp4", **arguments)
    assert calls[0][2]["num_threads"] == 4


def test_uniform_letterbox_drops_the_padding(calls):
    found = OneVisionEncoderVideoProcessor(size=28)("clip.mp4", num_frames=3, fit="letterbox")
    assert calls[1][2] == {
        "patch_size": 14,
        "num_patches": 12,
        "policy": "uniform",
        "padding": "exclude",
        "allow_fewer": True,
    }
    assert found["image_position_ids"][0, :3, 0].tolist() == [0, 31, 63]  # slots of the clip spread over 64


@pytest.mark.parametrize(
    ("videos", "kwargs", "message"),
    [
        ([], {}, "at least one video"),
        (np.zeros((4, 8, 8, 3), np.float32), {}, r"\(T, H, W, 3\) uint8, got float32 of shape \(4, 8, 8, 3\)"),
        (np.zeros((4, 8, 8, 1), np.uint8), {}, r"got uint8 of shape \(4, 8, 8, 1\)"),
        (np.zeros((8, 8, 3), np.uint8), {}, r"got uint8 of shape \(8, 8, 3\)"),
        ("a.mp4", {"size": 100}, "multiple of patch_size=14, got 100"),
        ("a.mp4", {"size": {"height": 14, "width": 28}}, "square size.*14.*28"),
        ("a.mp4", {"fps": 2, "do_resize": False}, "takes no do_resize, fps: frames are sampled"),
        ("a.mp4", {"policy": "energy", "seed": 1}, 'Only sampling="codec" .*takes policy, seed, got'),
        ("a.mp4", {"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ("a.mp4", {"num_frames": -2, "sampling": "codec"}, "num_frames must be at least 1, got -2"),
        ("a.mp4", {"size": 0}, "size must be at least 1, got 0"),
        ("a.mp4", {"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ("a.mp4", {"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ("a.mp4", {"do_sample_frames": False}, r"decoded frames only, got the file 'a\.mp4'.*raise num_frames=8"),
        (["a.mp4"] * 3, {"video_metadata": [{"fps": 5.0}] * 2}, "one video_metadata per video, got 2 for 3 videos"),
    ],
)
def test_inputs_that_do_not_fit_raise(calls, videos, kwargs, message):
    with pytest.raises(ValueError, match=message):
        OneVisionEncoderVideoProcessor()(videos, **kwargs)


def test_unknown_options_raise(frames):
    with pytest.raises(TypeError, match="sampler"):
        OneVisionEncoderVideoProcessor()(frames, sampler="codec")
    with pytest.raises(ValueError, match="sampling must be 'uniform' or 'codec', got 'codecs'"):
        OneVisionEncoderVideoProcessor()(frames, sampling="codecs")
    with pytest.raises(ValueError, match="sampling must be 'uniform' or 'codec', got 'codecs'"):
        OneVisionEncoderVideoProcessor(sampling="codecs")(frames)
    with pytest.raises(ValueError, match=r"fit must be one of \['crop', 'resize', 'letterbox'\], got 'stretch'"):
        OneVisionEncoderVideoProcessor()(frames, fit="stretch")


@pytest.mark.parametrize("kwargs", [{}, {"sampling": "codec"}])
def test_missing_package_is_named(without_codec_datasets, kwargs):
    with pytest.raises(
        ImportError, match=r"pip install codec-datasets or, from a clone, pip install \./packages/codec_datasets\."
    ):
        OneVisionEncoderVideoProcessor()("clip.mp4", **kwargs)


def test_saved_is_loaded(tmp_path, frames):
    processor = OneVisionEncoderVideoProcessor(
        patch_size=4, size=8, num_frames=3, policy="coverage", motion_weight=0.5
    )
    processor.save_pretrained(tmp_path)
    loaded = AutoVideoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is OneVisionEncoderVideoProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert np.array_equal(loaded(frames)["pixel_values"], processor(frames)["pixel_values"])
    assert AutoVideoProcessor.from_pretrained(tmp_path, sampling="codec").sampling == "codec"


def test_published_folder_gives_its_normalisation(tmp_path, config, frames):
    fields = {"size": {"shortest_edge": 448}, "crop_size": {"height": 448, "width": 448}, "do_center_crop": True}
    fields |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3, "image_processor_type": "CLIPImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    config.save_pretrained(tmp_path)
    processor = AutoVideoProcessor.from_pretrained(tmp_path)
    assert type(processor) is OneVisionEncoderVideoProcessor
    assert (list(processor.image_mean), processor.size) == ([0.1, 0.2, 0.3], None)
    assert processor(frames)["pixel_values"].shape == (1, 8 * 256, 588)


@pytest.fixture
def clip_path(tmp_path):
    """A square of 16 pixels that moves 4 pixels per frame over a grey ramp, 20 frames of 64 x 48, H.264."""
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):
            frame = np.repeat(np.linspace(40, 120, 64).astype(np.uint8)[None, :, None], 48, axis=0).repeat(3, axis=2)
            frame[16:32, 2 * i : 2 * i + 16] = 230
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_two_lines_from_file_to_features(clip_path, build_model):
    processor, model = OneVisionEncoderVideoProcessor(patch_size=4), build_model()
    arguments = {"sampling": "codec", "num_frames": 10, "size": 32, "num_patches": 100}
    inputs = processor(str(clip_path), **arguments, return_tensors="pt", return_metadata=True)
    metadata = inputs.pop("video_metadata")[0]
    positions = inputs.image_position_ids[0]
    assert inputs.pixel_values.shape == (1, 100, 48)
    assert positions[:, 1].min() == 1  # 64 x 48 is letterboxed to 32 x 24: the first row of patches is padding
    assert positions[:, 1].max() == 6
    assert (positions[:, 0] == 0).sum() == 48  # the first frame is whole
    assert positions[:, 0].max() == 9
    assert (metadata.total_num_frames, len(metadata.pts_seconds)) == (20, 10)
    assert metadata.pts_seconds[-1] == pytest.approx(1.9)
    assert model(**inputs).pooler_output.shape == (1, 64)


def test_file_and_decoded_frames_agree_in_layout(clip_path):
    processor = OneVisionEncoderVideoProcessor(patch_size=4, size=32)
    dense = processor([clip_path], num_frames=5)
    letterboxed = processor(clip_path, num_frames=5, fit="letterbox")
    assert dense["pixel_values"].shape == (1, 5 * 64, 48)
    assert letterboxed["pixel_values"].shape == (1, 5 * 48, 48)  # the two padded rows of patches are dropped
    assert np.unique(letterboxed["image_position_ids"][..., 0]).tolist() == [0, 15, 31, 47, 63]


@pytest.mark.parametrize("fit", ["crop", "resize", "letterbox"])
def test_file_and_decoded_frames_agree_in_pixels(clip_path, fit):
    av = pytest.importorskip("av")
    pytest.importorskip("codec_datasets")
    with av.open(str(clip_path)) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    processor = OneVisionEncoderVideoProcessor(patch_size=4, size=32, fit=fit, do_normalize=False, rescale_factor=1.0)
    by_path, by_frames = (processor(video, num_frames=7, return_metadata=True) for video in (clip_path, decoded))
    indices, expected_indices = (x["video_metadata"][0].frame_indices for x in (by_frames, by_path))
    assert indices == expected_indices
    assert np.array_equal(by_frames["image_position_ids"], by_path["image_position_ids"])
    difference = np.abs(by_frames["pixel_values"] - by_path["pixel_values"])
    assert difference.max() <= GREY_LEVELS_BETWEEN_YUV_AND_RGB


def test_unreadable_file_raises(tmp_path):
    codec_datasets = pytest.importorskip("codec_datasets")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(codec_datasets.VideoError, match=r"broken\.mp4"):
        OneVisionEncoderVideoProcessor()(tmp_path / "broken.mp4", sampling="codec")
