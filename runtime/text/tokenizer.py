"""Text to tokens and back, by the checkpoint's own tokenizer and chat template.

Invariant: what is printed never contains half a character, and a template runs in a sandbox, since
it comes from the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ...errors import DiluError
from ..artifact.artifact import Artifact

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer as Library
    from tokenizers.decoders import DecodeStream

Message = Mapping[str, Any]

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"  # of older checkpoints
TEMPLATE = "chat_template.jinja"
#: Special tokens by the names that chat templates use.
_SPECIAL = tuple(f"{n}_token" for n in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
#: Tokens of the prompt that the detokenizer sees, so that the first new one is joined rightly.
_CONTEXT = 6


class Tokenizer:
    """The tokenizer of an artifact."""

    def __init__(self, artifact: Artifact) -> None:
        from tokenizers import Tokenizer as Library  # only here: tokens in, tokens out needs none

        if TOKENIZER not in artifact.files:
            notes = (artifact.manifest["language_model"] or {}).get("notes", ())
            why = next((n for n in notes if "takes and returns tokens" in n), None)
            raise DiluError(
                f"{artifact.name} has no tokenizer: {why or f'the checkpoint had no {TOKENIZER}'}",
                hint="give lists of tokens, or add the file to the checkpoint and compile again",
            )
        try:
            self._library: Library = Library.from_str(artifact.read(TOKENIZER).decode())
        except Exception as error:  # the library raises Exception itself
            raise DiluError(f"the checkpoint's {TOKENIZER} cannot be read: {error}") from error
        self._config: dict[str, Any] = {}
        for name in (SPECIAL_TOKENS, CONFIG):
            if name in artifact.files:
                self._config |= json.loads(artifact.read(name))
        self._library.no_truncation()  # a file may ask for either
        self._library.no_padding()
        self._library.encode_special_tokens = self._config.get("split_special_tokens") is True
        file = artifact.read(TEMPLATE).decode() if TEMPLATE in artifact.files else None
        self._template = _chat_template(file, self._config.get("chat_template"))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, with the special tokens that the checkpoint adds."""
        encoded = self._library.encode(text)
        ids = list(encoded.ids)
        bos = self._library.token_to_id(self.special("bos_token") or "")
        if bos is None:
            return ids
        begins = ids[:1] == [bos]
        if self._config.get("add_bos_token") is True and not begins:
            return [bos, *ids]
        added = begins and encoded.special_tokens_mask[0] == 1
        if self._config.get("add_bos_token") is False and added:
            return ids[1:]
        return ids

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Return the tokens of a conversation, up to where the model answers."""
        text = self.render_chat(messages, **variables)
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def render_chat(self, messages: Sequence[Message], **variables: Any) -> str:
        """Return a conversation as text, by the checkpoint's chat template."""
        from jinja2.exceptions import TemplateError

        if self._template is None:
            raise DiluError(
                "the checkpoint has no chat template", hint="leave --chat out to continue a text"
            )
        # A key without a value is left out, and so is a special token that there is not: templates
        # ask for what is defined. Tools and documents are defined, and none.
        stated = [{k: v for k, v in m.items() if v is not None} for m in messages]
        given = {name: token for name in _SPECIAL if (token := self.special(name)) is not None}
        context = {
            "messages": stated,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **given,
            **variables,
        }
        try:
            return environment().from_string(self._template).render(context)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DiluError(f"the chat template refused the messages: {error}") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        return self._library.decode(list(tokens))

    def stream(self, prompt: Sequence[int] = ()) -> Detokenizer:
        """Return what turns the tokens that follow `prompt` into text one at a time."""
        return Detokenizer(self._library, prompt)

    def special(self, name: str) -> str | None:
        """Return the text of a special token such as `bos_token`."""
        value = self._config.get(name)
        return value.get("content") if isinstance(value, dict) else value


class Detokenizer:
    """Tokens to text, one at a time."""

    def __init__(self, library: Library, prompt: Sequence[int]) -> None:
        self._library = library
        self._stream = _decode_stream()
        for token in prompt[-_CONTEXT:]:
            self.step(token)

    def step(self, token: int) -> str:
        """Return the text that a token completes; "" where a character is not complete yet."""
        try:
            return self._stream.step(self._library, token) or ""
        except Exception:  # the library's own, where a token changes the text before it
            self._stream = _decode_stream()
            return self._stream.step(self._library, token) or ""


def _decode_stream() -> DecodeStream:
    from tokenizers.decoders import DecodeStream

    return DecodeStream(skip_special_tokens=True)


def environment() -> ImmutableSandboxedEnvironment:
    """Return the environment in which chat templates are written, as transformers defines it."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks what a model said; here it has no effect."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(text: str) -> str:
        return datetime.now().strftime(text)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = to_json
    offered: dict[str, Any] = made.globals  # pyright: ignore[reportAssignmentType]
    offered.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return made


def _chat_template(file: str | None, configured: Any) -> str | None:
    """Return the template: its own file first, then the configuration's, of several `default`."""
    if file is not None:
        return file
    if isinstance(configured, list):
        named = {entry["name"]: entry["template"] for entry in configured}
        return named.get("default") or next(iter(named.values()), None)
    return configured
