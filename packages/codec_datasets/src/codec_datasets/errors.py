# SPDX-License-Identifier: Apache-2.0
"""The one error that unusable videos end in."""


class VideoError(ValueError):
    """A video that can't be used: which file, at which stage, why, and what to do.

    Attributes:
        path: the file as the caller named it.
        stage: `find`, `open`, `probe`, `decode` or `select`.
        reason: what was found.
        advice: what to do about it.
    """

    def __init__(self, path: str, stage: str, reason: str, advice: str) -> None:
        super().__init__(path, stage, reason, advice)  # positional args: survives pickling between processes
        self.path, self.stage, self.reason, self.advice = path, stage, reason, advice

    def __str__(self) -> str:
        return f"{self.path}: {self.stage}: {self.reason}. {self.advice}"
