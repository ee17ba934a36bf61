"""What was wrong with which file: the lines of `quarantine.jsonl`, and the exception that becomes one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One line of `quarantine.jsonl`. `kept` says that the file or caption is used all the same."""

    file: str
    reason: str
    detail: str = ""
    kept: bool = False

    def row(self) -> dict[str, Any]:
        """As it is written: without an empty detail."""
        detail = {"detail": self.detail} if self.detail else {}
        return {"file": self.file, "reason": self.reason, **detail, "kept": self.kept}


class Rejected(Exception):
    """A file that can't be used; `reason` is one of few, `detail` says more of this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = " ".join(detail.split())[:200]


# Reasons that more than one module needs.
ESCAPES = "path leads out of the source"
NOT_A_PICTURE = "not a picture"
NOT_UTF8 = "caption is not UTF-8"
NO_CAPTION = "picture without caption"
NO_PICTURE = "caption without picture"
MISSING = "missing picture"
OUTSIDE = "in none of the split lists"
SAME_NAME = "name appears twice"
SAID_TWICE = "captions stand in another file too"
UNREADABLE = "can't be read"
BAD_LINE = "line can't be understood"


def json_line(value: Any) -> str:
    """One line of JSON Lines, legible in any language and one line for every reader (str.splitlines too)."""
    text = json.dumps(value, ensure_ascii=False)
    for character in "\x85\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode() + "\n"
