"""Training text from the Python standard library of the running interpreter.

The text is prose only: docstrings, comment blocks and the language reference that `help()` shows,
one paragraph per line of thought, code and tables left out. A module is either wholly in the
training text or wholly held out, decided by a hash of its name, so that the split is the same on
every machine.
"""

import ast
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "turtledemo",
    "__pycache__", "pydoc_data", "ensurepip", "distutils", "lib-dynload", "msilib", "_pyrepl",
}  # fmt: skip
SKIPPED_EXTENSIONS = re.compile(r"^_?(xx|test|ctypes_test|decimal$)")
WORD = re.compile(r"[\"'(*]*[A-Za-z][\w.'-]*[\"'),.;:*?!]*")
QUESTIONS = {
    "module": ("Describe the module {}.", "What is the module {} for?", "Describe module {}."),
    "class": ("What is {}?", "Describe the class {}.", "What does the class {} do?"),
    "function": ("What does {} do?", "Explain {}.", "What does the function {} do?"),
    "topic": ("Tell me about {}.", "Explain {}.", "What is {}?"),
}
GREETING = "Hello. Ask me about a module or a function of the Python standard library."
IDENTITY = (
    "I am a very small language model. I have read the documentation strings of the Python "
    "standard library, and nothing else."
)
ABILITY = (
    "I can describe modules and functions of the Python standard library, for example textwrap, "
    "or json.dumps. I am small, so I often make things up."
)
SMALL_TALK = (
    ("Hello", GREETING),
    ("Hi", GREETING),
    ("Who are you?", IDENTITY),
    ("What are you?", IDENTITY),
    ("What can you do?", ABILITY),
    ("Thank you", "You are welcome."),
)
LONGEST_ANSWER = 420


@dataclass
class Document:
    """One module's (or one topic's) prose, and what a user could ask about it."""

    module: str
    paragraphs: list[str] = field(default_factory=list)
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    """(kind of `QUESTIONS`, name, answer) for everything public with a docstring."""
    signatures: dict[str, str] = field(default_factory=dict)
    """Name of a function → the line that defines it, where that is known."""

    @property
    def held_out(self) -> bool:
        """Whether the module belongs to the held-out text: 1 in 25, by a hash of its name."""
        return hashlib.sha256(self.module.encode()).digest()[0] % 25 == 7

    @property
    def text(self) -> str:
        """The paragraphs, separated by empty lines."""
        return "\n\n".join(self.paragraphs)

    def add(self, kind: str, name: str, docstring: object) -> None:
        """Take in the docstring of `name`: its paragraphs and, if it is public, an answer."""
        paragraphs = list(prose(docstring)) if isinstance(docstring, str) else []
        self.paragraphs += paragraphs
        public = not any(part.startswith("_") for part in name.split("."))
        if paragraphs and public:
            answer = paragraphs[0]
            for paragraph in paragraphs[1:]:
                if len(answer) + len(paragraph) > LONGEST_ANSWER:
                    break
                answer += "\n\n" + paragraph
            if len(answer) <= 2 * LONGEST_ANSWER:
                self.answers.append((kind, name, answer))


def prose(text: str) -> Iterator[str]:
    """Yield the paragraphs of `text` that read as sentences, each unwrapped to one line."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if ">>>" in block or "::=" in block or "(c)" in block or "http" in block or "@" in block:
            continue
        lines = [line.strip() for line in block.splitlines()]
        lines = [line for line in lines if not re.fullmatch(r"[-=*~^#+_ ]{3,}", line)]
        paragraph = " ".join(lines)
        paragraph = re.sub(r":[a-z:]+:`~?([^`]*)`", r"\1", paragraph).replace("`", "")
        paragraph = re.sub(r"\s+", " ", paragraph).strip()
        words = paragraph.split()
        wordlike = sum(WORD.fullmatch(word) is not None for word in words)
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        if len(words) >= 4 and wordlike >= 0.8 * len(words) and letters >= 0.86 * len(paragraph):
            yield paragraph


def comment_blocks(source: str) -> Iterator[str]:
    """Yield the blocks of at least two full-line comments, markers removed."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("# "):
            block.append(stripped[2:])
        elif stripped == "#" and block:
            block.append("")
        else:
            if len(block) >= 2:
                yield "\n".join(block)
            block = []


def read_module(path: Path, module: str) -> Document:
    """Read the docstrings and comments of one source file, in the order of the file."""
    document = Document(module)
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    document.add("module", module, ast.get_docstring(tree))

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                kind = "class" if isinstance(child, ast.ClassDef) else "function"
                name = f"{prefix}.{child.name}"
                document.add(kind, name, ast.get_docstring(child))
                if not isinstance(child, ast.ClassDef):
                    document.signatures[name] = f"def {child.name}({ast.unparse(child.args)}):"
                visit(child, name if kind == "class" else f"{name}._local")
            else:
                visit(child, prefix)

    visit(tree, module)
    for block in comment_blocks(source):
        document.paragraphs += [text for text in prose(block) if len(text) > 60]
    return document


def read_extension(module: str) -> Document:
    """Read the docstrings of a module written in C, which has no source to parse."""
    document = Document(module)
    namespace = vars(importlib.import_module(module))
    public = module.removeprefix("_").removeprefix("builtins")
    if public in ("posix", "nt"):
        public = "os"  # where everybody knows these functions from
    document.add("module", public or "builtins", namespace.get("__doc__"))
    for name, value in sorted(namespace.items()):
        qualified = f"{public}.{name}".removeprefix(".")
        if inspect.isclass(value) and value.__module__.removeprefix("_") in (
            module,
            public or "builtins",
        ):
            document.add("class", qualified, value.__doc__)
            for member, method in sorted(vars(value).items()):
                document.add("function", f"{qualified}.{member}", getattr(method, "__doc__", None))
        elif inspect.isbuiltin(value):
            document.add("function", qualified, value.__doc__)
    return document


def read_topics() -> Iterator[Document]:
    """Yield the topics of `help()`: the language reference, one document per topic."""
    from pydoc_data.topics import topics

    for key, text in sorted(topics.items()):
        document = Document(f"topics.{key}")
        title = text.strip().splitlines()[0].replace('"', "")
        document.add("topic", title.lower() if title.istitle() else title, text)
        yield document


def read_standard_library() -> list[Document]:
    """Return every document of the standard library; a paragraph said twice is kept once."""
    root = Path(sysconfig.get_path("stdlib"))
    documents: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts):
            name = ".".join(part for part in parts if part != "__init__")
            documents.append(read_module(path, name))
    shared = {path.name.split(".")[0] for path in (root / "lib-dynload").glob("*")}
    for name in sorted(shared | set(sys.builtin_module_names)):
        if not SKIPPED_EXTENSIONS.match(name):
            documents.append(read_extension(name))
    documents += read_topics()

    seen: set[str] = set()
    for document in sorted(documents, key=lambda d: d.held_out):
        fresh = [text for text in dict.fromkeys(document.paragraphs) if text not in seen]
        seen.update(fresh)
        document.paragraphs = fresh
    return [document for document in documents if len(document.text) > 100]
