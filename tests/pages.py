"""What pages of documentation show: blocks of code and their output, run and compared.

A block ```python is run, all of a page in one process in order; a block ```output behind it is
what it prints. A block ```console has `$ command` and its output. A block ```c PATH is of a file.
In all but Python, `…` alone on a line stands for any lines, and within one for anything.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_END = "\x1e"


@dataclass(frozen=True)
class Block:
    """A fenced block: the words behind the fence, its text, and the line of its first line."""

    words: tuple[str, ...]
    text: str
    line: int

    @property
    def language(self) -> str:
        return self.words[0] if self.words else ""


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    found: list[Block] = []
    lines, start = page.read_text("utf-8").splitlines(), 0
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if start:
            words = tuple(lines[start - 1].removeprefix("```").split())
            text = "".join(f"{t}\n" for t in lines[start : number - 1])
            found.append(Block(words, text, start + 1))
        start = 0 if start else number
    assert not start, f"{page}:{start}: a block that does not end"
    return found


def text_of(page: Path) -> str:
    """Return a page without its fenced blocks, each of which leaves its lines empty."""
    parts = page.read_text("utf-8").split("```")
    return "".join(p if i % 2 == 0 else "\n" * p.count("\n") for i, p in enumerate(parts))


def run_python(page: Path, folder: Path) -> list[tuple[Block, str]]:
    """Run the Python of a page in a process of its own; return what each block prints."""
    code = [b for b in blocks(page) if b.language == "python"]
    program = "".join(f"{_at(b, page)}\nprint(end={_END!r}, flush=True)\n" for b in code)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return list(zip(code, done.stdout.split(_END), strict=False))


def _at(block: Block, page: Path) -> str:
    """Return code that runs a block, whose lines in tracebacks are those of the page."""
    source = "\n" * (block.line - 1) + block.text
    return f"exec(compile({source!r}, {str(page)!r}, 'exec'))"


def environment() -> dict[str, str]:
    """Return the environment in which this package is the one that is imported."""
    import dilu

    first = str(Path(dilu.__file__).parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join([first, os.environ.get("PYTHONPATH", "")])}


def run_dilu(arguments: Sequence[str], folder: Path) -> str:
    """Return what a command prints."""
    command = [sys.executable, "-m", "dilu", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected(page: Path) -> Iterator[tuple[Block, Block]]:
    """Yield the blocks of Python that say what they print, and the blocks of that."""
    for code, output in pairwise(blocks(page)):
        if output.language == "output":
            assert code.language == "python", f"{page}:{output.line}: nothing prints this"
            yield code, output


def difference(shown: str, real: str, *, part: bool = False) -> str | None:
    """Return the first line of `shown` that `real` does not have there, None where all fit.

    `part`: what is shown may begin and end anywhere in `real`.
    """
    wanted, lines = shown.splitlines(), real.splitlines()
    if part:
        wanted = ["…", *wanted, "…"]
    runs: list[list[str]] = [[]]
    for line in wanted:
        if line == "…":
            runs.append([])
        else:
            runs[-1].append(line)
    at = 0
    for number, run in enumerate(runs):
        last = number == len(runs) - 1
        places = range(at, len(lines) - len(run) + 1) if number else range(1)
        if last and number:  # the end of what is shown is the end of what there is
            places = range(max(at, len(lines) - len(run)), len(lines) - len(run) + 1)
        place = next((p for p in places if _fits(run, lines[p:])), None)
        if place is None:
            return next((line for line in run if not _somewhere(line, lines)), "\n".join(run))
        at = place + len(run)
    return None if at == len(lines) else f"(end, before {lines[at]!r})"


def _fits(run: Sequence[str], lines: Sequence[str]) -> bool:
    pairs = zip(run, lines, strict=False)
    return len(lines) >= len(run) and all(_pattern(a).fullmatch(b) for a, b in pairs)


def _somewhere(line: str, lines: Sequence[str]) -> bool:
    return any(_pattern(line).fullmatch(other) for other in lines)


def _pattern(line: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, line.split("…"))))
