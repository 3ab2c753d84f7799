"""What the documentation's helper takes for equal: nothing that differs."""

from __future__ import annotations

import pytest
from pages import blocks, difference, text_of

REAL = "a = 1\nb = 2\nc = 3\nd = 4\n"


@pytest.mark.parametrize(
    "shown",
    [REAL, "…\nc = 3\nd = 4\n", "a = 1\n…\n", "a = …\n…\nd = 4\n", "…\nb = 2\n…\nd = …\n", "…\n"],
)
def test_what_fits(shown):
    assert difference(shown, REAL) is None


@pytest.mark.parametrize(
    ("shown", "at"),
    [
        ("a = 1\n", "(end, before 'b = 2')"),
        ("b = 2\n…\n", "b = 2"),
        ("…\nb = 2\n", "b = 2"),
        ("a = 1\nc = 3\n…\n", "a = 1\nc = 3"),
        ("…\nc = 3\n…\nb = 2\n…\n", "b = 2"),
        ("a = 1\n…\nx = …\n", "x = …"),
        ("", "(end, before 'a = 1')"),
    ],
)
def test_what_does_not_fit(shown, at):
    assert difference(shown, REAL) == at


def test_a_part_begins_and_ends_anywhere():
    assert difference("b = 2\n…\nd = 4\n", REAL, part=True) is None
    assert difference("b = 2\nd = 4\n", REAL, part=True) == "b = 2\nd = 4"


def test_blocks_know_their_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```c a/b.h\nint x;\n```\nmore\n```\nplain\n```\n")
    first, second = blocks(page)
    assert (first.words, first.text, first.line) == (("c", "a/b.h"), "int x;\n", 4)
    assert (second.language, second.text) == ("", "plain\n")
    assert text_of(page) == "text\n\n" + "\n" * 2 + "\nmore\n" + "\n" * 2 + "\n"
