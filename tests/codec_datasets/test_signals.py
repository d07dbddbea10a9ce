# SPDX-License-Identifier: Apache-2.0
"""Motion vectors and residuals of clips whose motion is known."""

import numpy as np
import pytest

from codec_datasets import VideoError, bitstream, clip_from_frames, compute_signals, read_clip
from codec_datasets import clip as clip_module
from codec_datasets import signals as signals_module
from codec_datasets.signals import CELL, motion_vector_grid, residual_stride

RECORD = [
    ("source", "i4"),
    ("w", "u1"),
    ("h", "u1"),
    ("src_x", "i2"),
    ("src_y", "i2"),
    ("dst_x", "i2"),
    ("dst_y", "i2"),
]


def _inside_square(t, margin=16):
    """Cells of the moving square at frame t, without its border, which may be coded otherwise."""
    left = 16 + 4 * t
    rows = slice((32 + margin) // CELL, (80 - margin) // CELL)
    return rows, slice((left + margin) // CELL, (left + 48 - margin) // CELL)


def test_moving_square_moves_by_four(square_clip):
    signals = compute_signals(read_clip(square_clip, 12, 96, coded=True))
    assert signals.motion_source == "bitstream"
    assert signals.motion_vectors.shape == (12, 24, 40, 4)
    assert not signals.motion_vectors[0].any()
    for t in range(1, 12):
        inner = signals.motion_vectors[t][_inside_square(t)]
        assert inner.size
        assert (inner == (-4, 0, 0, 0)).all()  # source minus destination: predicted from the left
        assert not signals.motion_vectors[t][:4].any()  # nothing moves above the square


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pan4.mp4", {"codec": "mpeg4", "g": 100}),
        ("pan4.mkv", {"codec": "mpeg2video", "g": 100}),
        ("pan4.flv", {"codec": "flv", "g": 100}),
        ("pan4.ts", {"g": 100, "bf": 0, "refs": 1}),
        ("pan10.mp4", {"g": 100, "bf": 0, "refs": 1, "pix_fmt": "yuv420p10le"}),
    ],
)
def test_panning_moves_by_four(clips, name, options):
    signals = compute_signals(read_clip(clips.write(name, clips.pan(12), **options), 12, 96, coded=True))
    assert signals.motion_source == "bitstream"
    inner = signals.motion_vectors[1:, 2:-2, 8:-4]
    assert (inner[..., :2] == (-4, 0)).all(-1).mean() > 0.9
    assert not inner[..., 2:].any()


def test_both_lists_of_b_frames(clips):
    options = {"g": 100, "bf": 1, "refs": 1, "x264_params": "b-adapt=0:weightb=0:direct=spatial"}
    clip = read_clip(clips.write("lists.mp4", clips.pan(13), **options), 13, 96, coded=True)
    signals = compute_signals(clip)
    between = [t for t, frame in enumerate(clip.coded) if frame.picture_type == "B"]
    assert len(between) > 3
    inner = signals.motion_vectors[between][:, 2:-2, 8:-4]
    past, future = inner[..., :2], inner[..., 2:]
    assert set(np.unique(past[..., 0])) <= {-4, 0}
    assert set(np.unique(future[..., 0])) <= {4, 0}
    assert ((past[..., 0] == -4) | (future[..., 0] == 4)).mean() > 0.9


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("estimate265.mp4", {"codec": "libx265", "x265_params": "log-level=none:keyint=100"}),
        ("estimate.webm", {"codec": "libvpx-vp9", "cpu-used": 8, "deadline": "realtime", "g": 100}),
        ("estimate8.webm", {"codec": "libvpx", "cpu-used": 8, "deadline": "realtime", "g": 100}),
        ("estimate_av1.mkv", {"codec": "libsvtav1", "preset": 12, "g": 100}),
    ],
)
def test_motion_is_estimated_where_decoders_tell_none(clips, name, options):
    clip = read_clip(clips.write(name, clips.pan(12), **options), 12, 96, coded=True)
    signals = compute_signals(clip)
    assert signals.motion_source == "estimated"
    assert signals.picture_size == (96, 128)
    moving = [t for t, frame in enumerate(clip.coded) if frame.reference is not None]
    assert len(moving) >= 10
    assert (signals.motion_vectors[moving][:, 4:-4, 8:-4, 0] == -4).mean() > 0.8
    assert {signals.residual_source[t] for t in moving} == {"estimated"}


def test_still_pictures_have_no_motion(clips):
    clip = read_clip(clips.write("intra.mp4", clips.pan(6), g=1), 6, 96, coded=True)
    signals = compute_signals(clip)
    assert signals.motion_source == "none"
    assert set(signals.residual_source) == {"texture"}
    assert not signals.motion_vectors.any()


@pytest.fixture(scope="module")
def brightened_clip(clips):
    """A still picture of which one square gets brighter in frame 1 and stays so."""
    frames = np.repeat(np.clip(clips.texture(96, 128)[None], 60, 180), 2, 0)
    frames[1, 32:64, 48:80] += 40
    return clips.write("bright.mp4", frames, g=100, bf=0, crf=12, x264_params="scenecut=0:weightp=0:aq-mode=0")


def _square_and_rest(residual):
    inside = np.zeros(residual.shape, bool)
    inside[36:60, 52:76] = True
    outside = np.ones(residual.shape, bool)
    outside[24:72, 40:88] = False
    return residual[inside], residual[outside]


def test_isolated_residual_is_where_the_change_is(brightened_clip):
    clip = read_clip(brightened_clip, 2, 96, coded=True)
    signals = compute_signals(clip)
    assert signals.residual_source == ("texture", "isolated")
    assert signals.stride == 1
    isolated = bitstream.IsolatedDecoder("h264", clip.coded[1].extradata).decode_luma(clip.coded[1].packet)
    inside, outside = _square_and_rest(np.abs(isolated.astype(int) - 128))
    assert inside.mean() > 20
    assert np.median(outside) == 0
    inside, outside = _square_and_rest(signals.residual[1])
    assert inside.mean() > outside.mean() + 15


def test_without_isolated_packets_the_residual_is_motion_compensated(brightened_clip, square_clip, monkeypatch):
    for module in (bitstream, clip_module, signals_module):
        monkeypatch.setattr(module, "isolated_packets_work", lambda: False)
    clip = read_clip(brightened_clip, 2, 96, coded=True)
    assert not any(frame.packet for frame in clip.coded)
    signals = compute_signals(clip)
    assert signals.residual_source == ("texture", "compensated")
    inside, outside = _square_and_rest(signals.residual[1])
    assert inside.mean() > outside.mean() + 15
    moving = compute_signals(read_clip(square_clip, 12, 96, coded=True))
    assert set(moving.residual_source[1:]) == {"compensated"}
    rows, columns = (slice(part.start * CELL, part.stop * CELL) for part in _inside_square(6))
    compensated = moving.residual[6, rows, columns]
    assert np.median(compensated) < 25  # a moved copy; without compensation the texture would differ by more


def test_estimated_residual_without_isolated_packets(clips, monkeypatch):
    path = clips.write("estimate265.mp4", clips.pan(12), codec="libx265", x265_params="log-level=none:keyint=100")
    for module in (bitstream, clip_module, signals_module):
        monkeypatch.setattr(module, "isolated_packets_work", lambda: False)
    signals = compute_signals(read_clip(path, 12, 96, coded=True))
    assert "compensated" in signals.residual_source


def test_background_is_the_frequent_level_of_flat_blocks():
    """Weighted prediction turns mid-grey into another level: distances count from there."""
    picture = np.full((64, 64), 120, np.uint8)
    picture[:, 32:] = 140
    picture[16:32, 16:32] = np.random.default_rng(0).integers(150, 200, (16, 16))
    distance = signals_module._distance_to_background(picture, 1)
    assert not distance[:, 32:].any()
    assert not distance[40:, :32].any()
    assert np.array_equal(
        distance[16:32, 16:32], np.minimum(abs(picture[16:32, 16:32] - 120.0), abs(picture[16:32, 16:32] - 140.0))
    )


def test_background_is_mid_grey_where_no_level_is_frequent():
    levels = np.arange(100, 164).reshape(8, 8).astype(np.uint8)
    picture = levels.repeat(4, 0).repeat(4, 1)
    assert np.array_equal(signals_module._distance_to_background(picture, 1), np.abs(picture.astype(np.float32) - 128))


def test_background_is_mid_grey_where_nothing_is_flat():
    picture = np.random.default_rng(0).integers(0, 255, (16, 16)).astype(np.uint8)
    assert np.array_equal(signals_module._distance_to_background(picture, 1), np.abs(picture.astype(np.float32) - 128))


@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (5, 4), (16, 16)])
def test_texture_is_the_smaller_difference(shape):
    luma = np.random.default_rng(1).integers(0, 255, shape).astype(np.uint8)
    texture = signals_module._texture(luma).astype(int)
    for y in range(1, shape[0]):
        for x in range(1, shape[1]):
            here = int(luma[y, x])
            assert texture[y, x] == min(abs(here - int(luma[y, x - 1])), abs(here - int(luma[y - 1, x])))


def _records(rows):
    return np.array(rows, RECORD)


def test_vectors_are_painted_on_the_cells_they_cover():
    records = _records(
        [(-1, 16, 16, 4, 8, 8, 8), (1, 16, 16, 8, 14, 8, 8), (-1, 8, 8, 20, 0, 20, 4), (-1, 16, 8, 92, 90, 32, 12)]
    )
    vectors, covered = motion_vector_grid(records, 16, 32)
    assert vectors.shape == (4, 8, 4)
    assert (vectors[:4, :4] == (-4, 0, 0, 6)).all()
    assert (vectors[:2, 4:6] == (0, -4, 0, 0)).all()
    assert (vectors[2:4, 6:8, :2] == (60, 78)).all()  # its right part lies outside and is cut
    assert covered.sum() == 16 + 4 + 4


def test_intra_pictures_have_no_vectors():
    for records in (None, _records([])):
        vectors, covered = motion_vector_grid(records, 33, 18)
        assert vectors.shape == (8, 4, 4)
        assert not vectors.any()
        assert not covered.any()


def test_smallest_pictures_have_one_cell():
    assert motion_vector_grid(None, 2, 3)[0].shape == (1, 1, 4)


@pytest.mark.parametrize(("side", "stride"), [(128, 1), (239, 1), (240, 2), (479, 2), (480, 4), (4096, 4)])
def test_residual_stride(side, stride):
    assert residual_stride(side) == stride


def test_clips_without_records_are_refused(clips, moving_clip):
    for clip in (clip_from_frames(clips.pan(3), size=96), read_clip(moving_clip, 3, 96)):
        with pytest.raises(ValueError, match=r"no bitstream records, .* read it with read_clip\(..., coded=True\)"):
            compute_signals(clip)


def test_size_changes_are_refused(clips):
    large, small = clips.write("a.h264", clips.pan(8)), clips.write("b.h264", clips.pan(8, 64, 64))
    path = clips.bytes("ab.h264", large.read_bytes() + small.read_bytes())
    with pytest.raises(VideoError, match=r"ab.h264: select: the picture size changes within the video"):
        compute_signals(read_clip(path, 8, 96, coded=True))


def test_repr_counts_the_sources(square_clip):
    text = repr(compute_signals(read_clip(square_clip, 12, 96, coded=True)))
    assert text == (
        "Signals(motion_vectors=(12, 24, 40, 4), residual=(12, 96, 160), "
        "{'motion': {'bitstream': 12}, 'residual': {'isolated': 11, 'texture': 1}})"
    )


def test_without_an_encoder_the_residual_is_compensated(square_clip, monkeypatch):
    monkeypatch.setattr(bitstream, "has_codec", lambda name, mode: False)
    bitstream.isolated_packets_work.cache_clear()
    try:
        signals = compute_signals(read_clip(square_clip, 12, 96, coded=True))
    finally:
        bitstream.isolated_packets_work.cache_clear()
    assert signals.sources == {"motion": {"bitstream": 12}, "residual": {"compensated": 11, "texture": 1}}


def test_without_an_encoder_motion_is_not_estimated(clips, monkeypatch):
    path = clips.write("no_encoder.webm", codec="libvpx-vp9", **{"cpu-used": 8, "deadline": "realtime"})
    clip = read_clip(path, 8, 96, coded=True)
    monkeypatch.setattr(signals_module, "has_codec", lambda name, mode: False)
    with pytest.raises(VideoError, match=r"no_encoder.webm: select: its codec .* needs the encoder libx264"):
        compute_signals(clip)
