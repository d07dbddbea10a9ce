# SPDX-License-Identifier: Apache-2.0
"""`File or folder -> decoded elements`: JSON arrays and JSON lines as streams, folders as lists of their videos.

What is in memory is one element and one chunk of text. An element that is no sound JSON comes with its reason instead
of an exception, so that it spoils one row and not the reading.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

VIDEO_SUFFIXES = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")

# line number or None, decoded element, why it can't be used or None
Element = tuple[int | None, object, str | None]

_CHUNK_CHARACTERS = 1 << 16
_WHITESPACE = " \t\n\r"  # JSON's; str.strip() would take more
_SPACES = re.compile(f"[{_WHITESPACE}]*")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_LONGEST_LITERAL = len("-Infinity")  # how far before its end a cut text may be reported as wrong


def read_elements(path: Path) -> Iterator[Element]:
    """The elements of a JSON array or of JSON lines, whatever the name says, or the videos of a folder, in order.

    Raises:
        OSError: while it is read, if the file or a folder inside can't be.
    """
    return _folder_elements(path) if path.is_dir() else _file_elements(path)


def _folder_elements(folder: Path) -> Iterator[Element]:
    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in VIDEO_SUFFIXES:
                continue
            relative = Path(place, name).relative_to(folder).as_posix()
            yield None, {"id": relative, "video": relative}, None if _is_utf8(relative) else "its name is not UTF-8"


def _file_elements(path: Path) -> Iterator[Element]:
    # bytes that are no UTF-8 become lone surrogates, so that they spoil one row and not the reading
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        is_array = _Window(file).next_character() == "["
        file.seek(0)
        yield from _array_elements(file) if is_array else _line_elements(file)


def _line_elements(file: TextIO) -> Iterator[Element]:
    decoder = _StrictDecoder()
    for number, line in enumerate(file, 1):
        text = line.strip(_WHITESPACE)
        if not text:
            continue
        try:
            value, end, reason = decoder.decode(text, 0)
            if end < len(text):
                raise json.JSONDecodeError("Extra data", text, end)
            yield number, value, reason
        except json.JSONDecodeError as error:
            yield number, None, f"no JSON: {error.msg} at character {error.pos} of the line"


def _array_elements(file: TextIO) -> Iterator[Element]:
    window = _Window(file)
    try:
        yield from _split_array(window)
    except json.JSONDecodeError as error:
        yield None, None, f"no JSON: {error.msg} at character {window.start + error.pos}; reading ends here"


def _split_array(window: "_Window") -> Iterator[Element]:
    decoder = _StrictDecoder()
    separator = window.take()  # the opening bracket
    if window.next_character() == "]":
        separator = window.take()
    while separator != "]":
        yield None, *window.take_element(decoder)
        separator = window.take()
        if separator not in ("]", ","):
            found = f"found {separator!r}" if separator else "the file ends"
            place = window.at - len(separator)
            raise json.JSONDecodeError(f"Expecting ',' or ']' after an element, but {found}", window.text, place)
    if window.next_character():
        raise json.JSONDecodeError("Extra data after the array", window.text, window.at)


class _Window:
    """What of a long text is in memory: `text[at:]` lies ahead, `start` characters were dropped before `text`."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.text, self.at, self.start = "", 0, 0

    def next_character(self) -> str:
        """The next one that is no white space; empty at the end of the file."""
        while True:
            self.at = _SPACES.match(self.text, self.at).end()
            if self.at < len(self.text) or not self._grow():
                return self.text[self.at : self.at + 1]

    def take(self) -> str:
        """`next_character`, and go past it."""
        character = self.next_character()
        self.at += len(character)
        return character

    def take_element(self, decoder: "_StrictDecoder") -> tuple[object, str | None]:
        """`(value, reason)` of the next JSON value, however long; raises `JSONDecodeError` where there is none."""
        self.next_character()
        while True:
            try:
                value, end, reason = decoder.decode(self.text, self.at)
                is_whole = self.text[end - 1] in '}]"' or end + 2 < len(self.text)  # a number cut at `1e+` ends at `1`
                if is_whole or not self._grow():
                    self.at = end
                    return value, reason
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self.text) - _LONGEST_LITERAL or error.msg.startswith("Unterminated string")
                if not is_cut or not self._grow():
                    raise

    def _grow(self) -> bool:
        """Read on, at least as much as lies ahead: a long element is parsed a few times, not once per chunk."""
        ahead = self.text[self.at :]
        more = self._file.read(max(_CHUNK_CHARACTERS, len(ahead)))
        if more:
            self.text, self.at, self.start = ahead + more, 0, self.start + self.at
        return bool(more)


class _StrictDecoder:
    """json's decoder, with a reason for what it accepts although JSON has no such thing."""

    def __init__(self) -> None:
        self._flaws: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_int=self._integer,
            parse_float=self._real,
        )

    def decode(self, text: str, at: int) -> tuple[object, int, str | None]:
        """`(value, end, reason)` of the JSON value at `text[at]`; the reason is None for a sound one."""
        self._flaws.clear()
        try:
            value, end = self._decoder.raw_decode(text, at)
            written = text[at:end]
            is_storable = _is_utf8(written) and (
                not _SURROGATE_ESCAPE.search(written) or _is_utf8(json.dumps(value, ensure_ascii=False))
            )
        except RecursionError as error:
            raise json.JSONDecodeError("Nested too deeply", text, at) from error
        flaws = self._flaws if is_storable else [*self._flaws, "text that is not UTF-8"]
        return value, end, flaws[0] if flaws else None

    def _object(self, pairs: list[tuple[str, object]]) -> dict:
        members = dict(pairs)
        if len(members) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._flaws.append(f"field {twice!r} is there twice")
        return members

    def _constant(self, name: str) -> None:
        self._flaws.append(f"{name} is no JSON number")

    def _integer(self, digits: str) -> int | None:
        try:
            return int(digits)
        except ValueError:  # Python's limit on the digits of a whole number
            self._flaws.append(f"a number of {len(digits)} digits")
            return None

    def _real(self, digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            self._flaws.append(f"the number {digits:.40} is too large")
        return number


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
