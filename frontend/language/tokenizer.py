"""A checkpoint's tokenizer, in whatever files, as the one file that running an artifact reads.

transformers reads it, with the tokens that only `tokenizer_config.json`, `added_tokens.json` or
`special_tokens_map.json` know, and with its own precedence among them; what is kept is its state in
the format of the `tokenizers` library. Invariant: what is kept makes the tokens of a text that
transformers makes, or nothing is kept and a note says why: tokens in, tokens out needs none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.text.tokenizer import CONFIG, TEMPLATE, TOKENIZER
from .configuration import one_line

#: Files, by the ends of their names, that a tokenizer can be made of.
_SOURCES = (".model", ".tiktoken", "vocab.json", "vocab.txt", "tekken.json", "merges.txt")
_LEGACY_TEMPLATE = "chat_template.json"  # of processors; holds {"chat_template": …}
#: Texts that show the ways in which tokenizers differ: spaces, case, digits, accents, scripts.
_PROBES = (
    "", " ", "a", " a", "a ", "Hello world", "  two  spaces\n\nand\tlines ", "It's 12345.678 km!",
    "Ünïcödé naïve ﬁ ① İ", "日本語 текст العربية 😀‍🔥", "def f(x):\n    return x != 0  # <tag>",
)  # fmt: skip


@dataclass(frozen=True)
class TokenizerFiles:
    """Files of an artifact by name, and notes for its user."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()


def read_tokenizer(folder: Path, vocab_size: int) -> TokenizerFiles:
    """Return the tokenizer and the chat template of a checkpoint, as an artifact keeps them.

    `vocab_size` is the model's. A missing or unreadable tokenizer is no error, but a note.
    """
    template = _legacy_template(folder)
    if not _has_tokenizer(folder):
        return _without("the checkpoint has no tokenizer", template)
    try:
        with _quiet():
            made = _load(folder)
    except Exception as error:  # each tokenizer class raises what it likes
        return _without(f"the tokenizer cannot be read ({_why(error)})", template)
    library = getattr(made, "backend_tokenizer", None)
    if library is None:
        return _without(f"a {type(made).__name__} has no fast form", template)
    kept = _plain(library.to_str())
    notes = tuple(_differences(made, kept, vocab_size, folder))
    if any("other tokens" in note for note in notes):
        return _without(notes[0], template)
    own = made.chat_template
    template = own if own is not None else template
    files = {TOKENIZER: kept.to_str().encode(), CONFIG: _config(made, template)}
    if isinstance(template, str):
        files[TEMPLATE] = template.encode()
    return TokenizerFiles(files, notes)


def _without(reason: str, template: str | None) -> TokenizerFiles:
    note = f"{reason}: the artifact takes and returns tokens, not text"
    return TokenizerFiles({} if template is None else {TEMPLATE: template.encode()}, (note,))


def _has_tokenizer(folder: Path) -> bool:
    names = [f.name for f in folder.iterdir() if f.is_file()]
    return any(n == TOKENIZER or n.endswith(_SOURCES) for n in names)


def _load(folder: Path) -> Any:
    """Return the tokenizer as transformers reads it from local files, without running their code.

    A class or a model_type that transformers does not know leaves its general class, for
    tokenizer.json alone.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception:
        if not (folder / TOKENIZER).is_file():
            raise
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Let transformers keep to itself what it would print."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _why(error: Exception) -> str:
    text = one_line(error)
    return text if len(text) <= 200 else text[:199] + "…"


def _plain(text: str) -> Any:
    """Return a tokenizer that neither cuts texts off nor pads them, whatever its file says."""
    from tokenizers import Tokenizer

    kept = Tokenizer.from_str(text)
    kept.no_truncation()
    kept.no_padding()
    return kept


def _config(made: Any, template: Any) -> bytes:
    """Return what the tokenizer's own file does not hold."""
    config: dict[str, Any] = dict(made.special_tokens_map)
    if getattr(made, "split_special_tokens", False):
        config["split_special_tokens"] = True
    if isinstance(template, dict):
        config["chat_template"] = [{"name": n, "template": t} for n, t in template.items()]
    return json.dumps(config, indent=1, ensure_ascii=False).encode()


def _legacy_template(folder: Path) -> str | None:
    try:
        said = json.loads((folder / _LEGACY_TEMPLATE).read_text("utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return said if isinstance(said, str) else None


# ----------------------------------------------------------------------- what differs


def _differences(made: Any, kept: Any, vocab_size: int, folder: Path) -> Iterator[str]:
    """Yield what a user should know; first of all where `kept` makes other tokens."""
    kept.encode_special_tokens = bool(getattr(made, "split_special_tokens", False))
    added = [str(t) for t in made.added_tokens_decoder.values()]
    texts = [*_PROBES, *(f"{t} a{t}b {t}" for t in added[:64])]
    with _quiet():
        for text in texts:
            want = made(text)["input_ids"]
            if list(kept.encode(text).ids) != list(want):
                yield f"{type(made).__name__} makes other tokens than its file (of {text!r})"
                return
            if kept.decode(want) != made.decode(want, skip_special_tokens=True):
                yield (
                    "clean_up_tokenization_spaces is not applied: spaces before punctuation stay"
                    if made.clean_up_tokenization_spaces
                    else f"{type(made).__name__} makes another text of the same tokens"
                )
                break
    beyond = sorted(i for i in kept.get_vocab(with_added_tokens=True).values() if i >= vocab_size)
    if beyond:
        yield (
            f"the tokenizer has {len(beyond)} tokens, from {beyond[0]} on, that the model's "
            f"vocabulary of {vocab_size} has not: a prompt with them is refused"
        )
    yield from _misplaced(kept, folder)


def _misplaced(kept: Any, folder: Path) -> Iterator[str]:
    """Yield tokens that are not where the checkpoint's other files say."""
    said: dict[str, tuple[int, str]] = {}
    for token, number in _read(folder / "added_tokens.json").items():
        said[str(token)] = (number, "added_tokens.json")
    for number, token in (_read(folder / CONFIG).get("added_tokens_decoder") or {}).items():
        content = token.get("content") if isinstance(token, dict) else None
        if content is not None and str(number).isdigit():
            said[content] = (int(number), CONFIG)
    for token, (number, file) in said.items():
        found = kept.token_to_id(token)
        if found != number:
            place = "no token" if found is None else f"token {found}"
            said_by = f"{file} says that {token!r} is token {number}"
            yield f"{said_by}; as transformers reads it, it is {place}"


def _read(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
