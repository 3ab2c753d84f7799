"""Rows in aligned columns, for people."""

from __future__ import annotations

from collections.abc import Sequence


def table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Return rows in aligned columns under a title."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join([title, *(f"  {line.rstrip()}" for line in cells)])
