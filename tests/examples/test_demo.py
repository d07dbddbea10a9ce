# SPDX-License-Identifier: Apache-2.0
"""The demo and its clip."""

import importlib.util
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo():
    return load_example("demo")


@pytest.fixture(scope="module")
def tiny_video(tmp_path_factory):
    """Six frames, 64 x 64: fewer patches than the demo's budget."""
    path = tmp_path_factory.mktemp("demo") / "tiny.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=6)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for t in range(6):
            frame = np.full((64, 64, 3), 80, np.uint8)
            frame[16:32, 8 * t : 8 * t + 16] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clip_frames():
    """The committed clip: its pictures' types and small grey frames."""
    with av.open(str(EXAMPLES / "demo_clip.mp4")) as container:
        frames = list(container.decode(video=0))
    return [frame.pict_type for frame in frames], np.stack([f.to_ndarray(format="gray")[::8, ::8] for f in frames])


def test_clip_is_small_and_plain():
    assert (EXAMPLES / "demo_clip.mp4").stat().st_size < 500_000
    with av.open(str(EXAMPLES / "demo_clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height, stream.average_rate) == ("h264", 640, 360, 25)
        assert 10 <= float(stream.duration * stream.time_base) <= 12


def test_clip_has_b_frames_cuts_stillness_and_an_event(clip_frames):
    types, luma = clip_frames
    assert sum(kind == PictureType.B for kind in types) > 50
    change = np.abs(np.diff(luma.astype(int), axis=0)).mean((1, 2))
    assert np.flatnonzero(change > 20).tolist() == [74, 149, 224]  # the last frames before the cuts
    still, event = change[152:182], change[185:203]
    assert still.max() < 0.5 < event.min()


def test_clip_is_what_the_script_renders():
    make_demo_clip = load_example("make_demo_clip")
    first = next(make_demo_clip.render())
    assert np.array_equal(first, next(make_demo_clip.render()))
    with av.open(str(EXAMPLES / "demo_clip.mp4")) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(first.astype(int) - stored).mean() < 6  # what compression costs


def test_encoding_leaves_a_whole_file_or_none(tmp_path):
    make_demo_clip = load_example("make_demo_clip")

    def breaks_off():
        yield np.zeros((360, 640, 3), np.uint8)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        make_demo_clip.encode(breaks_off(), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_demo_runs_and_says_what_it_used(demo, tiny_video, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert demo.main(["--video", str(tiny_video), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "small, random weights" in printed
    assert f"MODEL={demo.PUBLISHED}" in printed
    assert "the clip holds only 7,776 patches" in printed
    assert "features 7,776 x 128" in printed
    for policy in demo.POLICIES:
        assert policy in printed
    assert {path.name for path in tmp_path.iterdir()} == {"selection.png", "stages.gif", "selection.npz"}
    with Image.open(tmp_path / "stages.gif") as animation:
        assert animation.n_frames == 6


def test_demo_takes_the_patch_size_of_a_saved_model(demo, tiny_video, tmp_path, capsys):
    from onevision_encoder import OneVisionEncoderConfig, OneVisionEncoderModel, OneVisionEncoderVideoProcessor

    config = OneVisionEncoderConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, patch_size=8
    )
    OneVisionEncoderModel(config).save_pretrained(tmp_path / "model")
    OneVisionEncoderVideoProcessor(patch_size=8).save_pretrained(tmp_path / "model")
    arguments = ["--video", str(tiny_video), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert demo.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "features 7,776 x 64" in printed
    assert "random weights" not in printed


def test_policies_share_the_budget(demo, tiny_video):
    clip = demo.read_clip(tiny_video, size=64, coded=True)
    results = demo.compare_policies(clip, 16, budget=40)
    assert {len(result.selection.patches) for result in results.values()} == {40}
    assert results["rate_distortion"].hold >= results["random"].hold


@pytest.mark.parametrize(
    ("name", "message"), [("missing.mp4", "missing.mp4: open: no such file"), ("text.mp4", "not readable as video")]
)
def test_bad_videos_are_one_line(demo, tmp_path, capsys, name, message):
    (tmp_path / "text.mp4").write_text("no video")
    assert demo.main(["--video", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_bad_models_are_one_line(demo, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert demo.main(["--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: model {tmp_path}: ")
    assert error.count("\n") == 1
