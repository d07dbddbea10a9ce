# SPDX-License-Identifier: Apache-2.0
"""What the decoders reveal: droppable packets, luma, isolated packets, motion between two pictures."""

import av
import numpy as np
import pytest

from codec_datasets import bitstream


def _coded_packets(path):
    """Codec name, extradata and the packets in decoding order."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        data = [bytes(packet) for packet in container.demux(stream) if packet.size]
        return stream.codec_context.name, stream.codec_context.extradata, data


def test_dropping_non_reference_packets_changes_no_other_picture(clips):
    """Without the packets that the function names every remaining picture decodes to the same pixels."""
    for name, codec, options in (
        ("drop.mp4", "libx264", {"g": 20, "bf": 3}),
        ("drop.h264", "libx264", {"g": 20, "bf": 3}),
        ("drop265.mp4", "libx265", {"x265_params": "bframes=4:log-level=none"}),
    ):
        path = clips.write(name, codec=codec, **options)
        codec_name, extradata, packets = _coded_packets(path)
        length_size = bitstream.nal_length_size(codec_name, extradata)
        assert length_size == (0 if name.endswith("h264") else 4)
        kept = [not bitstream.is_non_reference(codec_name, packet, length_size) for packet in packets]
        assert 3 < sum(kept) < len(packets) - 3
        everything, remaining = (
            _decode_packets(codec_name, extradata, packets, keep) for keep in (np.ones(len(kept), bool), kept)
        )
        assert set(remaining) == set(np.flatnonzero(kept))
        assert all(np.array_equal(remaining[number], everything[number]) for number in remaining)


def _decode_packets(codec_name, extradata, packets, keep):
    """Luma by packet number."""
    decoder = av.CodecContext.create(codec_name, "r")
    decoder.extradata, decoder.thread_count = extradata, 1
    decoder.flags |= av.codec.context.Flags.copy_opaque
    found = {}
    for number, payload in enumerate([*packets, None]):
        packet = None
        if payload is not None:
            if not keep[number]:
                continue
            packet = av.Packet(payload)
            packet.opaque = (number,)
        for frame in decoder.decode(packet):
            found[frame.opaque[0]] = bitstream.luma_plane(frame)
    return found


def test_long_prefix_is_not_taken_for_a_start_code():
    """A NAL of 256 to 511 bytes has the length prefix 00 00 01 xx."""
    reference, disposable = 0x41, 0x01
    for header, expected in ((reference, False), (disposable, True)):
        payload = (300).to_bytes(4, "big") + bytes([header]) + bytes(299)
        assert bitstream.is_non_reference("h264", payload, 4) is expected
    assert bitstream.is_non_reference("vp9", b"\0\0\0\1\x01", 0) is False


@pytest.mark.parametrize(("extradata", "expected"), [(None, 0), (b"", 0), (b"\0\0\0\1g", 0), (b"\1abc\xff", 4)])
def test_nal_length_size_follows_the_extradata(extradata, expected):
    assert bitstream.nal_length_size("h264", extradata) == expected


@pytest.mark.parametrize("payload", [b"", b"\0\0\1", b"\0\0\0\1", b"\xff" * 9, b"\0" * 40, b"\0\0\0\0" * 9])
@pytest.mark.parametrize("length_size", [0, 1, 2, 4])
@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_damaged_packets_are_kept(codec, payload, length_size):
    assert bitstream.is_non_reference(codec, payload, length_size) in (True, False)  # ends, and does not raise


@pytest.mark.parametrize(
    ("format", "level"),
    [("gray", 90), ("yuv420p", 90), ("yuv444p", 90), ("yuv420p10le", 90), ("yuv422p12le", 90), ("gray16le", 90)],
)
def test_luma_of_planar_formats_is_the_plane_in_8_bits(format, level):
    frame = av.VideoFrame(33, 18, format)
    deep = frame.format.components[0].bits > 8
    for plane in frame.planes:
        samples = np.frombuffer(plane, np.uint16 if deep else np.uint8)
        samples[:] = level << (frame.format.components[0].bits - 8) if deep else level
    luma = bitstream.luma_plane(frame)
    assert luma.shape == (18, 33)
    assert luma.dtype == np.uint8
    assert (luma == level).all()


@pytest.mark.parametrize("format", ["rgb24", "bgra", "gbrp", "yuyv422", "nv12", "ya8", "monow", "rgb48le"])
def test_luma_of_other_formats_is_white_for_white(format):
    white = av.VideoFrame.from_ndarray(np.full((18, 32, 3), 255, np.uint8), format="rgb24").reformat(format=format)
    luma = bitstream.luma_plane(white)
    assert luma.shape == (18, 32)
    assert luma.min() >= 234  # limited range ends at 235


def test_isolated_packets_work_here():
    assert bitstream.isolated_packets_work()


def test_isolated_packet_shows_the_residual_where_it_is():
    rng = np.random.default_rng(2)
    first = rng.integers(60, 190, (96, 128), dtype=np.uint8)
    second = first.copy()
    second[32:64, 48:80] += 40
    packets, extradata = bitstream._encode_pair(first, second)
    difference = bitstream.IsolatedDecoder("h264", extradata).decode_luma(packets[1]).astype(int) - 128
    changed = np.zeros_like(first, bool)
    changed[32:64, 48:80] = True
    assert difference[changed].mean() > 25
    assert np.abs(difference[~changed]).max() <= 2


def test_self_test_fails_where_decoding_alone_gives_nothing(monkeypatch):
    monkeypatch.setattr(bitstream.IsolatedDecoder, "decode_luma", lambda self, payload: None)
    assert bitstream.isolated_packets_work.__wrapped__() is False


def test_isolated_decoder_survives_damage():
    packets, extradata = bitstream._encode_pair(*np.zeros((2, 32, 32), np.uint8))
    decoder = bitstream.IsolatedDecoder("h264", extradata)
    assert decoder.decode_luma(b"\xff" * 50) is None
    assert decoder.decode_luma(packets[1]).shape == (32, 32)


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(96, 128, (96, 128)), (2, 2, (16, 16)), (1080, 1920, (320, 576))]
)
def test_reduced_size(height, width, expected):
    assert bitstream.reduced_size(height, width) == expected
    assert bitstream.shrink_for_pair(np.zeros((height, width), np.uint8)).shape == expected


def test_pair_encoding_finds_known_motion(clips):
    first, second = (bitstream.luma_plane(av.VideoFrame.from_ndarray(f, format="rgb24")) for f in clips.pan(2))
    records, packet, _ = bitstream.encode_pair(first, second)
    inner = records[(records["dst_x"] > 16) & (records["dst_x"] < 112)]
    assert len(inner) > 20
    assert (inner["src_x"] - inner["dst_x"] == -4).mean() > 0.9
    assert (inner["src_y"] == inner["dst_y"]).mean() > 0.9
    assert packet
