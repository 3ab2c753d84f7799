"""Collects lines of C with indentation."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


class Writer:
    """Lines of C, indented by the blocks that they are in."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._level = 0

    def line(self, text: str = "") -> None:
        self._lines.append("  " * self._level + text if text else "")

    @contextmanager
    def block(self, head: str = "", tail: str = "}") -> Generator[None]:
        """Write `head {`, what is written within, indented, and `tail`."""
        self.line(f"{head} {{" if head else "{")
        self._level += 1
        yield
        self._level -= 1
        self.line(tail)

    def append(self, other: Writer) -> None:
        """Write all lines of another writer, at this one's indentation."""
        for line in other._lines:
            self.line(line)

    def pragma(self, text: str) -> None:
        self.line(f"#pragma {text}")

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"
