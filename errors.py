"""The one exception that users see, and how it reads.

Invariant: an error says what went wrong, where (the user's file and line, or a file and a tensor),
in which pass, and what to do about it. It depends on nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

_NODE_WIDTH = 160  # a node's text in a message; the whole of it is in a dump


@dataclass(frozen=True, slots=True)
class Loc:
    """A place that the user can open: a line of a file, or a tensor in a file."""

    file: str
    line: int | None = None
    tensor: str | None = None

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return place if self.tensor is None else f"{place}, tensor {self.tensor!r}"


class DiluError(Exception):
    """Say what is wrong (`message`), where (`loc`), and what the user can do (`hint`)."""

    def __init__(self, message: str, loc: Loc | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.loc = loc
        self.hint = hint
        self.pass_name: str | None = None
        self.node: str | None = None

    def in_pass(self, pass_name: str, node: object = None, loc: Loc | None = None) -> Self:
        """Add the pass and the node at fault; what is known already stays, so innermost wins."""
        self.pass_name = self.pass_name or pass_name
        if self.node is None and node is not None:
            self.node = str(node)
        self.loc = self.loc or loc
        return self

    def __str__(self) -> str:
        lines = [self.message]
        if self.loc is not None:
            lines.append(f"  at {self.loc}")
        if self.pass_name is not None:
            lines.append(f"  in pass {self.pass_name}")
        if self.node is not None:
            lines.append(f"  node {_shorten(self.node)}")
        if self.hint is not None:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def format(self) -> str:
        """Return the text that the command line prints."""
        return f"error: {self}"


class UnsupportedError(DiluError):
    """Something dilu does not know how to do, where a caller may still try another way."""


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _NODE_WIDTH else line[: _NODE_WIDTH - 1] + "…"
