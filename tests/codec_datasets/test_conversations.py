# SPDX-License-Identifier: Apache-2.0
"""Conversations: files of any shape and style become the same samples, bad rows are named, lines are as published.

The published pair of raw samples and training lines lies in the folder `CODEC_VIDEOS`.
"""

import hashlib
import io
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_datasets import json_rows
from codec_datasets.conversations import (
    BadSample,
    Sample,
    read_samples,
    safe_join,
    shard_of,
    to_messages,
    training_line,
    with_image_tokens,
)

REPOSITORY = Path(__file__).resolve().parents[2]
PUBLISHED = Path(os.environ.get("CODEC_VIDEOS") or REPOSITORY.parent / "shared" / "videos") / "onevision_demo"
MEGABYTE = 1 << 20

needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"no published samples at {PUBLISHED}")

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(exclude_categories=["Cs"])) | st.text('\\"{}[],:/u \n', max_size=8)
values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
spaces = st.text(" \t\n\r", max_size=20)


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def row(**fields):
    """A sound row, with other fields where given."""
    return {"id": "a", "video": "a.mp4", "conversations": [human("<video>\nWhat?"), gpt("That.")]} | fields


def text_row(number):
    return {"id": str(number), "conversations": [human(f"Question {number}"), gpt("Answer")]}


@pytest.fixture
def write(tmp_path):
    """Writes text, bytes, or rows as a JSON array to a file that `read_samples` can read."""

    def make(content, name="data.json"):
        content = json.dumps(content) if isinstance(content, list) else content
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


@pytest.fixture
def read(write):
    """The samples of such a file, as a list."""
    return lambda content, **options: list(read_samples(write(content), **options))


@pytest.fixture
def reason(read):
    """Why a single row is refused."""

    def ask(element):
        [bad] = read([element])
        assert isinstance(bad, BadSample), bad
        assert (bad.row, bad.line) == (0, None)
        return bad.reason

    return ask


def elements_of(text, chunk):
    """What the array reader makes of a text read in chunks of so many characters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK_CHARACTERS", chunk)
        return list(json_rows._array_elements(io.StringIO(text)))


# files


@needs_published
def test_published_raw_samples_become_the_published_lines():
    samples = list(read_samples(PUBLISHED / "raw_video_samples.json"))
    lines = [json.loads(line) for line in (PUBLISHED / "training_codec.jsonl").read_text().splitlines()]
    assert [sample.video for sample in samples] == ["videos/ytb_YVQwAEKZpaU.mp4", "videos/ytb_XwB-dkS5BVM.mp4"]
    assert samples[0].source == {"data_source": "0_30_s_youtube_v0_1"}
    assert [
        training_line(sample, line["image"], line["positions_thw"]) for sample, line in zip(samples, lines)
    ] == lines


@needs_published
def test_published_lines_pass_through():
    path = PUBLISHED / "training_codec.jsonl"
    samples = list(read_samples(path))
    assert [len(sample.images) for sample in samples] == [8, 8]
    assert [training_line(sample) for sample in samples] == [
        json.loads(line) for line in path.read_text().splitlines()
    ]


@needs_published
def test_the_published_key_counts_rows_from_zero():
    [meta] = [json.loads(path.read_text()) for path in PUBLISHED.glob("*.meta.json")]
    sample = list(read_samples(PUBLISHED / "raw_video_samples.json"))[1]
    assert f"{sample.video}|{sample.id}|{sample.row}" == meta["sample_key"]


@given(st.lists(values, max_size=6), st.data(), st.integers(1, 7), st.booleans())
def test_arrays_are_read_as_json_does_whatever_the_chunks(elements, data, chunk, is_ascii):
    pieces = [
        json.dumps(element, ensure_ascii=is_ascii, indent=data.draw(st.none() | st.just(1))) for element in elements
    ]

    def pad(text):
        return data.draw(spaces) + text + data.draw(spaces)

    text = pad("[" + (",".join(map(pad, pieces)) or data.draw(spaces)) + "]")
    assert [value for _, value, _ in elements_of(text, chunk)] == json.loads(text)
    assert {(line, reason) for line, _, reason in elements_of(text, chunk)} <= {(None, None)}


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_numbers_are_not_cut(chunk):
    text = "[1.5, 2e+3, -0.25e-1, 40, 1E5]"
    assert [value for _, value, _ in elements_of(text, chunk)] == json.loads(text)


@given(st.integers(1, 7), st.data())
def test_a_cut_array_ends_with_one_bad_row(chunk, data):
    text = json.dumps([text_row(number) for number in range(3)])
    cut = data.draw(st.integers(1, len(text) - 1))
    *sound, last = elements_of(text[:cut], chunk)
    assert [value for _, value, _ in sound] == json.loads(text)[: len(sound)]
    assert last[1] is None
    assert "reading ends here" in last[2]


def test_an_element_longer_than_many_chunks(read):
    long = row(note="{]\\" * 200_000)
    samples = read([text_row(0), long, text_row(2)])
    assert samples[1].source == {"note": long["note"]}
    assert [sample.id for sample in samples] == ["0", "a", "2"]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \r\n"])
@pytest.mark.parametrize("is_array", [True, False])
def test_content_decides_not_the_name(write, name, start, is_array):
    rows = [row(id="ü"), text_row(1)]
    text = (
        json.dumps(rows, indent=1) if is_array else "\r\n".join(json.dumps(each, ensure_ascii=False) for each in rows)
    )
    assert [sample.id for sample in read_samples(write(start + text, name))] == ["ü", "1"]


@pytest.mark.parametrize("text", ["", "\ufeff", " \n", "[]", " [ \n ] "])
def test_nothing_gives_nothing(read, text):
    assert read(text) == []


def test_bad_lines_are_named_and_the_rest_goes_on(read):
    sound = json.dumps(row())
    lines = [sound, "", '{"id": ', sound + "x", "  ", "[1]", sound]
    samples = read("\n".join(lines))
    assert [sample.row for sample in samples] == list(range(5))
    assert [(bad.line, bad.row) for bad in samples if isinstance(bad, BadSample)] == [(3, 1), (4, 2), (6, 3)]
    assert [bad.reason.split(":")[0] for bad in samples[1:4]] == [
        "no JSON",
        "no JSON",
        "a row must be a JSON object, got [1]",
    ]
    assert f"Extra data at character {len(sound)} of the line" in samples[2].reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"id": "\xff", "video": "a.mp4"}', "not UTF-8"),
        (b'{"id": "\\ud800", "video": "a.mp4"}', "not UTF-8"),
        (b'{"id": 1, "id": 2, "video": "a.mp4"}', "field 'id' is there twice"),
        (b'{"video": "a.mp4", "x": {"y": [{"z": 1, "z": 1}]}}', "field 'z' is there twice"),
        (b'{"video": "a.mp4", "x": NaN}', "NaN is no JSON number"),
        (b'{"video": "a.mp4", "x": -Infinity}', "-Infinity is no JSON number"),
        (b'{"video": "a.mp4", "x": 1e999}', "1e999 is too large"),
        (b'{"video": "a.mp4", "x": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
    ],
)
@pytest.mark.parametrize("is_array", [True, False])
def test_what_json_forbids_spoils_one_row(read, text, message, is_array):
    sound = json.dumps(row(id="😀")).encode()  # written as a pair of surrogate escapes
    parts = [sound, text, sound]
    first, bad, last = read(b"[" + b",".join(parts) + b"]" if is_array else b"\n".join(parts))
    assert (first.id, last.id) == ("😀", "😀")
    assert (bad.row, bad.line) == (1, None if is_array else 2)
    assert message in bad.reason


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (" {}]", "Expecting ',' or ']' after an element, but found '{' at character"),
        (",]", "Expecting value"),
        (", {'a': 1}]", "Expecting property name"),
        (', {"a": "line\nbreak"}]', "Invalid control character"),
        (", " + "[" * 100_000, "Nested too deeply"),
        ("] []", "Extra data after the array"),
        ("", "the file ends at character"),
    ],
)
def test_where_an_array_breaks_reading_ends(read, after, message):
    *sound, bad = read("[" + json.dumps(row()) + after)
    assert [sample.id for sample in sound] == ["a"]
    assert (bad.row, bad.line) == (1, None)
    assert message in bad.reason
    assert bad.reason.endswith("reading ends here")


def test_the_place_of_a_break_counts_the_whole_file(read):
    start = json.dumps([text_row(number) for number in range(3000)])[:-1]
    assert f"at character {len(start) + 2};" in read(start + ", x]")[-1].reason


def test_nested_too_deeply_spoils_one_line(read):
    assert [type(sample) for sample in read("[" * 3 + "\n")] == [BadSample]  # an array that ends at once
    sound = json.dumps(row())
    assert [type(sample) for sample in read(sound + '\n{"a":' + "[" * 100_000 + "\n" + sound)] == [
        Sample,
        BadSample,
        Sample,
    ]


@pytest.mark.parametrize("is_array", [True, False])
def test_memory_stays_small(tmp_path, is_array):
    path, element = tmp_path / "large", json.dumps(row(note="x" * 5000))
    num_rows = 50 * MEGABYTE // len(element)
    with open(path, "w") as file:
        file.write("[" if is_array else "")
        for number in range(num_rows):
            file.write(("" if number == 0 else "," if is_array else "\n") + element)
        file.write("]" if is_array else "")
    tracemalloc.start()
    try:
        assert sum(isinstance(sample, Sample) for sample in read_samples(path)) == num_rows
        assert tracemalloc.get_traced_memory()[1] < 5 * MEGABYTE
    finally:
        tracemalloc.stop()


def test_limit_counts_bad_rows_too(read):
    rows = [text_row(0), 7, text_row(2)]
    assert [len(read(rows, limit=limit)) for limit in (0, 2, 9, None)] == [0, 2, 3, 3]
    with pytest.raises(ValueError, match="limit must be None or at least 0, got -1"):
        read(rows, limit=-1)


def test_a_missing_file_is_told_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_samples(tmp_path / "missing.json")


def test_a_folder_gives_its_videos_in_order(tmp_path):
    for name in (
        "b.MP4",
        "a/z.webm",
        "a/deep/c d.mkv",
        "notes.txt",
        "a.json",
        ".hidden.mp4",
        ".cache/x.mp4",
        "a0.mov",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = ["a0.mov", "b.MP4", "a/z.webm", "a/deep/c d.mkv"]
    assert list(read_samples(tmp_path)) == [Sample(number, name, name) for number, name in enumerate(found)]
    assert list(read_samples(tmp_path, limit=1)) == [Sample(0, "a0.mov", "a0.mov")]


def test_a_file_name_that_is_no_text_is_a_bad_row(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"\xff.mp4")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert list(read_samples(tmp_path)) == [BadSample(0, None, "its name is not UTF-8")]


# styles


@pytest.mark.parametrize(
    "fields",
    [
        {"video": "a.mp4", "conversations": [human("<video>\nWhat?"), gpt("That.")]},
        {"video": "a.mp4", "conversations": [human("<image>\nWhat?"), gpt("That.")]},  # LLaVA-Video-178K
        {"video": "a.mp4", "conversations": [human("What?"), gpt("That.")], "image": None},
        {"video": "a.mp4", "QA": [{"q": "What?", "a": "That."}]},
        {"video": "a.mp4", "QA": [{"i": "", "q": "What?", "a": "That."}]},
        {"video": "a.mp4", "QA": [{"i": "What?", "q": "", "a": "That."}]},
        {
            "images": ["a.mp4"],
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}],
        },
        {
            "videos": ["a.mp4"],
            "images": [],
            "messages": [
                {"role": "user", "content": [{"type": "video", "text": None}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
            ],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "video", "path": "a.mp4"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "That."},
            ],
        },
    ],
)
def test_every_style_gives_the_same_sample(read, fields):
    turns = (human("<video>\nWhat?"), gpt("That."))
    expected = Sample(0, "a", "a.mp4", (), turns, {"data_source": "s", "start": 1.5})
    assert read([{"id": "a", "data_source": "s", "start": 1.5} | fields]) == [expected]


def test_videochat2_questions_become_turns(read):
    entries = [
        {"i": "Be brief.", "q": "One?", "a": "1"},
        {"i": "Be brief.", "q": "Two?", "a": "2"},
        {"i": "Be long.", "q": "Three?", "a": "3"},
        {"i": "Be long.", "q": "", "a": "and more"},
    ]
    [sample] = read([{"video": "a.webm", "QA": entries}])
    first = [human("<video>\nBe brief.\nOne?"), gpt("1"), human("Two?"), gpt("2")]
    assert sample.conversations == (*first, human("Be long.\nThree?"), gpt("3"), gpt("and more"))
    assert sample.id == "0"


def test_a_caption_needs_no_question(read):
    [sample] = read([{"video": "a.webm", "QA": [{"q": "", "a": "A cat."}]}])
    assert sample.conversations == (human("<video>"), gpt("A cat."))


def test_rows_of_images_and_of_text(read):
    turns = [human("<image> or"), gpt("Yes."), human("<image>?"), gpt("No.")]
    samples = read(
        [
            {"image": "a.jpg", "conversations": [human("<image>\nWhat?"), gpt("That.")]},
            {"images": ["a.jpg", "b.jpg"], "conversations": turns},
            {"image": ["a.jpg", "b.jpg"], "conversations": [human("Both?"), gpt("Yes.")]},
            {"conversations": [{"from": "system", "value": "S"}, human("Hi"), gpt("Ho")]},
            {"video": "a.mp4"},
        ]
    )
    assert [(sample.id, sample.video) for sample in samples] == [
        (str(n), "a.mp4" if n == 4 else None) for n in range(5)
    ]
    assert [sample.images for sample in samples] == [("a.jpg",), ("a.jpg", "b.jpg"), ("a.jpg", "b.jpg"), (), ()]
    assert samples[1].conversations == tuple(turns)
    assert samples[2].conversations[0] == human("<image>\n<image>\nBoth?")
    assert samples[3].conversations[0] == {"from": "system", "value": "S"}
    assert samples[4].conversations == ()


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ("text", "a row must be a JSON object, got 'text'"),
        ({}, "no video, no image and no conversation"),
        ({"id": "a", "conversations": []}, "no video, no image and no conversation"),
        (row(id=1.5), "id must be a string or a whole number, got 1.5"),
        (row(id=True), "id must be a string"),
        (row(_row_idx=-1), "_row_idx must be a whole number, got -1"),
        (row(video=7), r"video must be a path or a list of paths, got [7]"),
        (row(video={"path": "a.mp4"}), "video must be a path"),
        (row(video=["a.mp4", "b.mp4"]), "2 videos and 0 images"),
        (row(image="a.jpg"), "1 videos and 1 images"),
        (row(videos=["b.mp4"]), "two lists of videos that differ"),
        (row(messages=[]), "conversations and messages: only one of them"),
        (row(conversations={"from": "human"}), "conversations must be a list of objects"),
        (row(conversations=["Hi"]), "conversations must be a list of objects"),
        (row(conversations=[{"from": "tool", "value": ""}]), "turn 1: from must be one of human, user, gpt"),
        (row(conversations=[human("Hi"), {"from": ["gpt"]}]), "turn 2: from must be"),
        (row(conversations=[human(None)]), "turn 1: value must be text, got None"),
        (row(conversations=[{"role": "user", "content": [{"type": "audio"}]}]), "blocks of text, image and video"),
        (row(conversations=[{"role": "user", "content": [{"type": "text"}]}]), "blocks of text, image and video"),
        (row(conversations=[gpt("A cat.")]), "no human turn that could hold <video>"),
        (row(conversations=[human("<video><video>")]), "2 <video> for 1 video"),
        (row(conversations=[human("<image><image>")]), "<image>, but no image that it stands for"),
        (row(conversations=[human("Hi"), gpt("<video>")]), "<video> outside of the first human turn"),
        (row(conversations=[human("Hi"), gpt("Ho"), human("<video>")]), "<video> outside of the first human turn"),
        (row(video=None), "<video>, but no video that it stands for"),
        (row(video=None, conversations=[human("<image>")]), "1 <image> for 0 images"),
        (row(video=None, image="a.jpg", conversations=[human("<image><image>")]), "2 <image> for 1 image"),
        (row(video=None, image="a.jpg", conversations=[human(""), gpt("<image>")]), "<image> outside of the human"),
        ({"video": "a.mp4", "QA": [{"q": "?"}]}, "QA 1: a must be text, got None"),
        ({"video": "a.mp4", "QA": [{"q": "?", "a": 5}]}, "QA 1: a must be text, got 5"),
        ({"video": "a.mp4", "QA": ["?"]}, "QA must be a list of objects"),
    ],
)
def test_contradictions_are_named(reason, element, message):
    assert message in reason(element)


# rules


@pytest.mark.parametrize("num_shards", [1, 2, 7, 1000])
def test_shards_follow_the_published_rule(read, num_shards):
    samples = read([row(id=5), row(video="videos/ü.mp4"), text_row(2), row(_row_idx=41)])
    keys = ["a.mp4|5|0", "videos/ü.mp4|a|1", "|2|2", "a.mp4|a|41"]
    expected = [int(hashlib.sha1(key.encode("utf-8")).hexdigest()[:8], 16) % num_shards for key in keys]
    assert [shard_of(sample, num_shards) for sample in samples] == expected


def test_shards_need_a_number():
    with pytest.raises(ValueError, match="num_shards must be at least 1, got 0"):
        shard_of(Sample(0, "a", "a.mp4"), 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<video>\nWhat?", "<image>\n<image>\nWhat?"),
        ("What? <video>", "What? <image>\n<image>"),
        ("<video><video>", "<image>\n<image><video>"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?", "<image>\n<image>\nWhat?"),
        ("", "<image>\n<image>\n"),
    ],
)
def test_image_tokens_stand_in_the_first_human_turn(text, expected):
    before = [{"from": "system", "value": "<video>"}, human(text), gpt("<video>"), human("<video>")]
    kept = json.loads(json.dumps(before))
    assert with_image_tokens(before, 2) == (before[0], human(expected), before[2], before[3])
    assert before == kept


def test_image_tokens_need_no_human_turn():
    assert with_image_tokens([gpt("Hi")], 2) == (gpt("Hi"),)


def test_training_lines(read):
    video, image, text = read(
        [row(data_source="s"), {"image": "a.jpg", "conversations": [human("Hi")], "width": 3}, text_row(2)]
    )
    line = training_line(video, ["m0.jpg", "m1.jpg"], "p.npy")
    assert list(line) == ["id", "conversations", "image", "positions_thw"]
    assert line["conversations"] == [human("<image>\n<image>\nWhat?"), gpt("That.")]
    assert "positions_thw" not in training_line(video, ["m0.jpg"])
    passed = {"id": "1", "conversations": [human("<image>\nHi")], "image": ["a.jpg"], "width": 3}
    assert training_line(image) == passed
    assert training_line(text) == text_row(2)
    with pytest.raises(ValueError, match=r"row 0: 0 mosaics for video 'a.mp4'"):
        training_line(video)
    with pytest.raises(ValueError, match="row 2: 1 mosaics for video None"):
        training_line(text, ["m0.jpg"])


def test_messages_hold_text_only(read):
    turns = [{"from": "system", "value": "S"}, human("See <image>\nand <image>\n"), gpt(" a\n"), human(" b")]
    samples = read([row(), {"images": ["a.jpg", "b.jpg"], "conversations": turns}, {"video": "a.mp4"}])
    assert to_messages(samples[0]) == [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    assert [message["role"] for message in to_messages(samples[1])] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in to_messages(samples[1])] == ["S", "See and", " a\n", " b"]
    assert to_messages(samples[2]) == []


def test_message_rows_read_back(read):
    [sample] = read([row()])
    assert read([{"id": "a", "messages": to_messages(sample), "images": [sample.video]}]) == [sample]


# paths


@pytest.mark.parametrize("name", ["a.mp4", "b/../a.mp4", "./a.mp4", "..a/b..mp4", "new folder/ü", "C:\\a.mp4"])
def test_paths_below_the_root_are_joined(tmp_path, name):
    assert safe_join(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../a.mp4", "which is not below"),
        ("b/../../a.mp4", "which is not below"),
        ("out/a.mp4", "which is not below"),
        (".", "which is not below"),
        ("/etc/passwd", "is absolute; expected a path below .*allow_absolute=True"),
        ("", "is empty or holds a NUL"),
        ("a\0.mp4", "is empty or holds a NUL"),
    ],
)
def test_paths_that_lead_out_are_refused(tmp_path, name, message):
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=message):
        safe_join(root, name)


def test_links_are_followed_for_the_check_only(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "inner").symlink_to(tmp_path / "real")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert safe_join(tmp_path / "root", "inner/a.mp4") == tmp_path / "root" / "inner" / "a.mp4"


def test_absolute_paths_on_request(tmp_path):
    assert safe_join(tmp_path, "/data/a.mp4", allow_absolute=True) == Path("/data/a.mp4")
    with pytest.raises(ValueError, match="NUL"):
        safe_join(tmp_path, "/data/\0", allow_absolute=True)
