# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when everything is written.

    A full disk, an error or a killed process leaves what stood there before; two writers don't mix.
    """
    target = Path(path)
    if target.is_symlink():
        target = target.resolve()  # the link stays, what it points to is replaced
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")  # short: the name itself may be as long as allowed
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
