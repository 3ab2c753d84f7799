"""What the documentation names exists: files, links, commands and their options, variables."""

from __future__ import annotations

import ast
import io
import re
import shlex
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pages import PAGES, ROOT, blocks, text_of

from dilu import cli, knobs

ROOMS = ("frontend", "ir", "passes", "planner", "codegen", "runtime")
SOURCES = sorted([*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).rglob("*.py"))])
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
#: A folder and a file: what has a place-holder (`isa_NAME.h`) is none.
PLACE = re.compile(
    r"(?<![\w/.:…-])((?:[\w.-]+/)+[\w.-]+\.(?:py|h|c|md|txt|json|ya?ml|toml|svg|safetensors))\b"
)
#: Files that commands make, and those of checkpoints and artifacts.
MADE = re.compile(r"^(?:build|site|graph)/|\.dilu[./]|NAME")
#: Files of other projects, which formulas are from.
OTHERS = {"Objects/floatobject.c"}


def places(text: str) -> Iterator[tuple[str, int]]:
    """Yield the files that a text names, and the number of the line."""
    for number, line in enumerate(text.splitlines(), 1):
        for found in PLACE.finditer(line):
            if found[1] not in OTHERS and not MADE.search(found[1]):
                yield found[1], number


def prose(source: str) -> str:
    """Return the comments and the docstrings of a module, in their lines."""
    lines = [""] * (source.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] += token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                for n, line in enumerate(str(first.value.value).splitlines()):
                    lines[first.lineno - 1 + n] += line
    return "\n".join(lines)


def is_there(name: str, folder: Path) -> bool:
    """Whether a file is named from the root, or from a folder of the one that names it."""
    above = [folder, *folder.parents]
    return any((place / name).exists() for place in above[: above.index(ROOT) + 1])


def test_what_is_found_in_prose():
    source = '"""See a/b.py."""\nx = "c/d.py"  # and e/f.md, not build/g.json\n'
    assert [name for name, _ in places(prose(source))] == ["a/b.py", "e/f.md"]
    assert [*places("in x/y.py and `z/w.h`, https://h/i.md")] == [("x/y.py", 1), ("z/w.h", 1)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path):
    links = [m[1] for m in LINK.finditer(text_of(page)) if not re.match(r"\w+:", m[1])]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_pages_name_exist(page: Path):
    named = places(page.read_text("utf-8"))
    assert [f"{page.name}:{n} {name}" for name, n in named if not is_there(name, page.parent)] == []


def test_files_that_the_package_names_exist():
    assert [
        f"{file.relative_to(ROOT)}:{number} {name}"
        for file in SOURCES
        for name, number in places(prose(file.read_text("utf-8")))
        if not is_there(name, file.parent)
    ] == []


def test_every_page_is_reached_from_readme():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name})" not in readme] == []


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 125


# ---------------------------------------------------------------------- commands


def commands(page: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield the `dilu …` commands of a page, their lines, and whether they are whole."""
    for block in blocks(page):
        if block.language not in ("", "console", "sh"):
            continue
        joined = block.text.replace("\\\n", " " * 2)
        for number, line in enumerate(joined.splitlines(), block.line):
            found = re.match(r"(?:\$ )?(?:torchrun .*-m )?(dilu .*)", line)
            if found:
                yield found[1].split(" #")[0].rstrip(), number, True
                for option in re.findall(r"--[\w-]+", line.partition(" #")[2]):
                    yield f"{' '.join(found[1].split()[:2])} {option}", number, False
    for number, line in enumerate(text_of(page).splitlines(), 1):
        for span in re.findall(r"`(dilu [^`]+)`", line):
            yield span, number, False


def wrong(command: str, whole: bool) -> str | None:
    """Return what is wrong with a command: it is parsed if it is whole, else its options are."""
    words = shlex.split(command.replace("[", " ").replace("]", " "))[1:]
    group: Any = typer.main.get_command(cli.app)  # of click, or of typer's own copy of it
    if words[0].startswith("-") or words[0] == "…":
        return None
    if words[0] not in group.commands:
        return f"there is no command {words[0]!r}"
    chosen = group.commands[words[0]]
    if whole:
        try:
            chosen.make_context(words[0], words[1:]).close()
        except Exception as error:
            told = getattr(error, "format_message", None)
            return told() if told else repr(error)
        return None
    known = {name for p in chosen.params for name in p.opts}
    used = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
    unknown = used - known
    return f"no such option: {', '.join(sorted(unknown))}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_understood(page: Path):
    found = [(wrong(text, whole), f"{page.name}:{n} {text}") for text, n, whole in commands(page)]
    assert [pair for pair in found if pair[0]] == []


def test_commands_are_found_and_wrong_ones_seen(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "`dilu inspect --stages`\n```\ndilu run m.dilu --prompt x [--seed 1]  # --top-z\n"
        "torchrun -m dilu run m.dilu --prompts \\\n  x\ndilu walk\n```\n"
    )
    results = [wrong(text, whole) for text, _, whole in commands(page)]
    assert results[0] is None and results[1] == "no such option: --top-z"
    assert str(results[2]).startswith("No such option: --prompts")
    assert results[3] == "there is no command 'walk'"
    assert results[4] == "no such option: --stages"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_variables_exist(page: Path):
    named = set(re.findall(r"\bDILU_[A-Z0-9_]+\b", text_of(page)))
    assert named <= {knob.name for knob in knobs.KNOBS}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_targets_exist(page: Path):
    from dilu.codegen.targets import TARGETS, other_targets

    mentioned = set(re.findall(r"`((?:cuda:\d\d+|hip:\w+|cpu:[\w-]+))`", text_of(page)))
    made = {"cpu:x86-avx"}  # by a page's example
    assert mentioned <= {t.name for t in TARGETS} | set(other_targets()) | made
