"""Collects lines of Python with indentation, and hands out fresh names."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


class Writer:
    """Lines of Python, indented by the blocks that they are in, and names that are new."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._level = 0
        self._counts: dict[str, int] = {}

    def fresh(self, base: str) -> str:
        """Return a new name that begins with `base`; no name of the graph ends like it."""
        self._counts[base] = count = self._counts.get(base, -1) + 1
        return f"{base}_{count}_"

    def line(self, text: str = "") -> None:
        self._lines.append("    " * self._level + text if text else "")

    @contextmanager
    def block(self, head: str) -> Generator[None]:
        """Write `head:` and, indented, what is written within."""
        self.line(f"{head}:")
        self._level += 1
        yield
        self._level -= 1

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)
