# SPDX-License-Identifier: Apache-2.0
"""`Raw training data -> samples -> training lines and message rows`: conversations about videos and images.

Files are streamed: what is in memory is one element and one chunk of text. A row that can't be used is a `BadSample`
among the others, never an exception. Understood are a JSON array, JSON lines and a folder of videos, with rows like

- LLaVA, OneVision-Encoder: `{id, video | image, conversations: [{from: human | gpt, value}]}`, `<video>` or `<image>`
  where the picture belongs (LLaVA-NeXT, docs of `LazySupervisedDataset`)
- LLaVA-Video-178K: the same with `data_source`; `<image>` may stand for the video (lmms-lab/LLaVA-Video-178K)
- OpenAI, TRL: `{messages: [{role: user | assistant, content}], images | videos}`, content a string or typed blocks
- VideoChat2-IT: `{video | image, QA: [{i, q, a}]}`, instruction, question, answer (Ask-Anything, `it_dataset.py`)
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from .json_rows import VIDEO_SUFFIXES, read_elements

VIDEO_TOKEN, IMAGE_TOKEN = "<video>", "<image>"

_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_MESSAGE_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_KNOWN_FIELDS = ("id", "video", "videos", "image", "images", "conversations", "messages", "QA", "_row_idx")


@dataclass(frozen=True)
class Sample:
    """One row of training data in normal form.

    Attributes:
        row: 0-based place in its file, bad rows counted, blank lines not; a pre-sharded file's `_row_idx` goes before.
        id: as written; the row number where absent.
        video: path as written, None for rows without video.
        images: paths as written; empty for rows with a video.
        conversations: `{"from": "human" | "gpt" | "system", "value": text}` per turn. With a video the first human
            turn holds one `<video>`; with images the human turns hold one `<image>` for each.
        source: all other fields, such as `data_source`, or `start` and `end` in seconds.
    """

    row: int
    id: str
    video: str | None
    images: tuple[str, ...] = ()
    conversations: tuple[dict[str, str], ...] = ()
    source: dict = field(default_factory=dict)


@dataclass(frozen=True)
class BadSample:
    """A row that can't be used.

    Attributes:
        row: 0-based place in its file.
        line: 1-based line number in a JSON lines file, None elsewhere.
        reason: what is wrong with it.
    """

    row: int
    line: int | None
    reason: str


def read_samples(path: str | Path, *, limit: int | None = None) -> Iterator[Sample | BadSample]:
    """Stream the rows of a file or a folder, in order.

    A file that begins with `[` is a JSON array, any other one JSON lines, whatever its name. A folder gives its videos
    (`VIDEO_SUFFIXES`, hidden ones left out) folder by folder in the order of names, with no conversations and the path
    below the folder as `id` and `video`.

    Args:
        path: JSON array, JSON lines (UTF-8, byte order mark allowed) or folder.
        limit: rows to read, bad ones counted; None for all.

    Yields:
        A `Sample`, or a `BadSample` for each row that is no JSON object, contradicts itself, or can't be stored as
        UTF-8 JSON. Where the syntax of an array breaks, a `BadSample` is the last row.

    Raises:
        FileNotFoundError: if nothing is there.
        OSError: while it is read, if the file or a folder inside can't be.
        ValueError: if `limit` is negative.
    """
    path = Path(path)
    if limit is not None and limit < 0:
        raise ValueError(f"limit must be None or at least 0, got {limit}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return islice((_read_row(row, *element) for row, element in enumerate(read_elements(path))), limit)


def shard_of(sample: Sample, num_shards: int) -> int:
    """Which of `num_shards` a sample belongs to: `int(sha1("{video}|{id}|{row}")[:8], 16) % num_shards`.

    The rule is the published stage 1's, which skips rows without video; here their place is empty.

    Raises:
        ValueError: if `num_shards` is less than 1.
    """
    if num_shards < 1:
        raise ValueError(f"num_shards must be at least 1, got {num_shards}")
    key = f"{sample.video or ''}|{sample.id}|{sample.row}"
    return int(hashlib.sha1(key.encode()).hexdigest()[:8], 16) % num_shards


def with_image_tokens(conversations: Sequence[dict[str, str]], num_images: int) -> tuple[dict[str, str], ...]:
    """Write `<image>` for the pictures of a video, by the published rule of stage 2.

    In the first human turn the first `<video>` becomes `num_images` times `<image>`, joined by newlines. Without one,
    an `<image>` is left alone; with neither, the tokens and a newline are put in front.
    """
    turns = [dict(turn) for turn in conversations]
    first = next((turn for turn in turns if turn["from"] == "human"), None)
    tokens = "\n".join([IMAGE_TOKEN] * num_images)
    if first and VIDEO_TOKEN in first["value"]:
        first["value"] = first["value"].replace(VIDEO_TOKEN, tokens, 1)
    elif first and IMAGE_TOKEN not in first["value"]:
        first["value"] = f"{tokens}\n{first['value']}"
    return tuple(turns)


def training_line(sample: Sample, image_paths: Sequence[str] = (), positions_path: str | None = None) -> dict:
    """The published training JSONL line of a sample.

    Args:
        sample: as read.
        image_paths: the mosaics of its video; empty for rows without video.
        positions_path: of `positions_thw.npy`; None leaves the key out.

    Returns:
        `{id, conversations, image, positions_thw}` for a video, its other fields dropped as published. Rows of images
        or text pass through with all their fields; `image` is always a list, so that the column has one type.

    Raises:
        ValueError: if a video has no pictures, or a row without video is given some.
    """
    if bool(image_paths) != (sample.video is not None):
        raise ValueError(f"row {sample.row}: {len(image_paths)} mosaics for video {sample.video!r}")
    line = {"id": sample.id, "conversations": list(sample.conversations)}
    if sample.video is None:
        return line | ({"image": list(sample.images)} if sample.images else {}) | sample.source
    line["conversations"] = list(with_image_tokens(sample.conversations, len(image_paths)))
    line["image"] = [str(path) for path in image_paths]
    return line if positions_path is None else line | {"positions_thw": str(positions_path)}


def to_messages(sample: Sample) -> list[dict[str, str]]:
    """The `messages` column of TRL's trainers; `images` beside it holds the video's path, or those of the images.

    Contents are plain strings without `<video>` and `<image>`: for plain strings TRL puts the placeholders itself, all
    in front of the first user turn, and typed blocks run in some of its trainers only. Images that stood between words
    therefore come first.
    """
    return [
        {"role": _MESSAGE_ROLES[turn["from"]], "content": _without_tokens(turn["value"])}
        for turn in sample.conversations
    ]


def safe_join(root: str | Path, relative: str, *, allow_absolute: bool = False) -> Path:
    """`root / relative`, refused if it leads out of `root`.

    Args:
        root: folder that paths in data are relative to.
        relative: path as written in the data; it need not exist.
        allow_absolute: take an absolute path as it is.

    Returns:
        The joined path. Symbolic links are followed for the check only.

    Raises:
        ValueError: for an empty path, a NUL, an absolute path, one that names `root` itself, or one that leaves it by
            `..` or by a symbolic link.
    """
    if not relative or "\0" in relative:
        raise ValueError(f"{relative!r} is no path: it is empty or holds a NUL")
    if os.path.isabs(relative):
        if allow_absolute:
            return Path(relative)
        raise ValueError(f"{relative!r} is absolute; expected a path below {root}, or allow_absolute=True")
    joined = Path(root, relative)
    inside, real = Path(os.path.realpath(root)), Path(os.path.realpath(joined))
    if inside not in real.parents:
        raise ValueError(f"{relative!r} leads to {real}, which is not below {inside}")
    return joined


def _read_row(row: int, line: int | None, element: object, reason: str | None) -> Sample | BadSample:
    if reason is not None:
        return BadSample(row, line, reason)
    try:
        return _to_sample(row, element)
    except ValueError as error:
        return BadSample(row, line, str(error))


def _to_sample(row: int, element: object) -> Sample:
    """The normal form of a row; raises ValueError saying what contradicts."""
    if not isinstance(element, dict):
        raise ValueError(f"a row must be a JSON object, got {element!r:.80}")
    fields = {name: value for name, value in element.items() if value is not None}
    row, turns = _row_number(fields, row), _read_turns(fields)
    video, images = _find_media(fields)
    if not (turns or video or images):
        raise ValueError("no video, no image and no conversation")
    source = {name: value for name, value in element.items() if name not in _KNOWN_FIELDS}
    return Sample(row, _identifier(fields, row), video, images, _place_tokens(turns, video, images), source)


def _row_number(fields: dict, row: int) -> int:
    value = fields.get("_row_idx", row)
    if type(value) is not int or value < 0:  # a bool is an int to isinstance
        raise ValueError(f"_row_idx must be a whole number, got {value!r:.80}")
    return value


def _identifier(fields: dict, row: int) -> str:
    value = fields.get("id", "")
    if not isinstance(value, str) and type(value) is not int:
        raise ValueError(f"id must be a string or a whole number, got {value!r:.80}")
    return str(row) if value == "" else str(value)


def _read_turns(fields: dict) -> list[dict[str, str]]:
    names = [name for name in _STYLES if name in fields]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)}: only one of them can be the conversation")
    for name in names:
        entries = fields[name]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{name} must be a list of objects, got {entries!r:.80}")
        return list(_STYLES[name](entries))
    return []


def _from_turns(entries: list[dict]) -> Iterator[dict[str, str]]:
    """`{from, value}` or `{role, content}` per turn."""
    for number, entry in enumerate(entries, 1):
        role, content = ("from", "value") if "from" in entry else ("role", "content")
        speaker = entry.get(role)
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise ValueError(f"turn {number}: {role} must be one of {', '.join(_ROLES)}, got {speaker!r:.80}")
        yield {"from": _ROLES[speaker], "value": _plain_text(entry.get(content), f"turn {number}: {content}")}


def _from_questions(entries: list[dict]) -> Iterator[dict[str, str]]:
    """`{i, q, a}` per question: an instruction opens the turn where it first applies; captions have no question.

    VideoChat2 itself puts the instruction into the system text, which LLaVA trainers fix for all rows.
    """
    instruction = ""
    for number, entry in enumerate(entries, 1):
        entry = {"i": "", "q": ""} | entry
        i, question, answer = (_plain_text(entry.get(name), f"QA {number}: {name}") for name in "iqa")
        asked = "\n".join(text for text in (i if i != instruction else "", question) if text)
        instruction = i
        if asked or number == 1:
            yield {"from": "human", "value": asked}
        yield {"from": "gpt", "value": answer}


_STYLES = {"conversations": _from_turns, "messages": _from_turns, "QA": _from_questions}


def _plain_text(content: object, name: str) -> str:
    """A string, or typed blocks joined by newlines with a placeholder for each video and image."""
    if isinstance(content, list) and all(isinstance(block, dict) for block in content):
        return "\n".join(_block_text(block, name) for block in content)
    if not isinstance(content, str):
        raise ValueError(f"{name} must be text, got {content!r:.80}")
    return content


def _block_text(block: dict, name: str) -> str:
    kind = block.get("type")
    if kind in ("video", "image"):
        return f"<{kind}>"
    if kind != "text" or not isinstance(block.get("text"), str):
        raise ValueError(f"{name} can hold blocks of text, image and video, got {block!r:.80}")
    return block["text"]


def _find_media(fields: dict) -> tuple[str | None, tuple[str, ...]]:
    videos, images = _paths(fields, "video"), _paths(fields, "image")
    if not videos and len(images) == 1 and os.path.splitext(images[0])[1].lower() in VIDEO_SUFFIXES:
        videos, images = images, []  # the row form for TRL, which has no column for videos
    if len(videos) > 1 or (videos and images):
        raise ValueError(f"{len(videos)} videos and {len(images)} images; a row is about one video or about images")
    return (videos[0] if videos else None), tuple(images)


def _paths(fields: dict, kind: str) -> list[str]:
    """Files of one kind, from the field `kind`, from `kind` + `s`, or from the typed blocks of `messages`."""
    given = [fields.get(kind), fields.get(kind + "s"), _block_paths(fields.get("messages", ()), kind)]
    given = [value if isinstance(value, list) else [value] for value in given if value not in (None, [])]
    for paths in given:
        if not all(isinstance(path, str) and path for path in paths):
            raise ValueError(f"{kind} must be a path or a list of paths, got {paths!r:.80}")
        if paths != given[0]:
            raise ValueError(f"two lists of {kind}s that differ: {given[0]!r:.80} and {paths!r:.80}")
    return given[0] if given else []


def _block_paths(messages: Sequence[dict], kind: str) -> list:
    """Paths that typed blocks carry themselves, under their kind, `path` or `url`."""
    contents = [turn["content"] for turn in messages if isinstance(turn.get("content"), list)]
    blocks = [block for content in contents for block in content if block["type"] == kind]
    paths = [block.get(kind) or block.get("path") or block.get("url") for block in blocks]
    return [path for path in paths if path is not None]


def _place_tokens(
    turns: list[dict[str, str]], video: str | None, images: tuple[str, ...]
) -> tuple[dict[str, str], ...]:
    """Check the placeholders against the files; where there are none, put them in front of the first human turn."""
    if video and _count(turns, IMAGE_TOKEN) == 1 and not _count(turns, VIDEO_TOKEN):
        turns = [turn | {"value": turn["value"].replace(IMAGE_TOKEN, VIDEO_TOKEN)} for turn in turns]
    token, number = (VIDEO_TOKEN, 1) if video else (IMAGE_TOKEN, len(images))
    _check_tokens(turns, token, number)
    if turns and number and not _count(turns, token):
        first = next(turn for turn in turns if turn["from"] == "human")
        first["value"] = "\n".join([token] * number + [first["value"]] * bool(first["value"]))
    return tuple(turns)


def _check_tokens(turns: list[dict[str, str]], token: str, number: int) -> None:
    human = [turn for turn in turns if turn["from"] == "human"]
    if turns and number and not human:
        raise ValueError(f"no human turn that could hold {token}")
    other, found = IMAGE_TOKEN if token == VIDEO_TOKEN else VIDEO_TOKEN, _count(turns, token)
    if _count(turns, other):
        raise ValueError(f"{other}, but no {other.strip('<>')} that it stands for")
    if found not in (0, number):
        raise ValueError(f"{found} {token} for {number} {token.strip('<>')}{'' if number == 1 else 's'}")
    if found > _count(human[:1] if token == VIDEO_TOKEN else human, token):
        raise ValueError(f"{token} outside of the {'first human turn' if token == VIDEO_TOKEN else 'human turns'}")


def _count(turns: Sequence[dict[str, str]], token: str) -> int:
    return sum(turn["value"].count(token) for turn in turns)


def _without_tokens(text: str) -> str:
    stripped = re.sub(f"(?:{VIDEO_TOKEN}|{IMAGE_TOKEN})\n?", "", text)
    return text if stripped == text else stripped.strip()
