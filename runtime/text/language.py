"""A session's language model: text in, text out.

Invariant: a text is what its tokens say however it is asked for, whole, streamed or in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ...errors import DiluError
from .generate import Model, Statistics, TokenLoop
from .sample import Sampling
from .tokenizer import Detokenizer, Tokenizer

#: A text, tokens, or the messages of a conversation.
Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


class LanguageModel:
    """Tokenizer, token loop and cache of a session."""

    def __init__(self, session: Model) -> None:
        if session.artifact.manifest["language_model"] is None:
            raise DiluError(
                f"{session.artifact.name} is not a language model",
                hint="call the session with arrays; dilu inspect shows its functions",
            )
        self._artifact = session.artifact
        self._tokenizer: Tokenizer | None = None
        self.loop = TokenLoop(session)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._artifact)
        return self._tokenizer

    def generate(
        self,
        prompt: Any,
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        chat: bool = False,
    ) -> Any:
        """Return the text that continues `prompt`, or a list of texts for a list of prompts.

        A prompt is a text, a list of tokens, or a list of messages (`{"role", "content"}`), which
        the chat template renders; with `chat`, a text is the message of a user. Several prompts
        run as one batch. The text ends before the first of the texts in `stop`.
        """
        many = _is_many(prompt)
        prompts = [self.encode(p, chat=chat) for p in (prompt if many else [prompt])]
        sampling = Sampling(temperature, top_k, top_p, seed)
        texts = [_Text(self.tokenizer.stream(p), stop) for p in prompts]
        run = self.loop.generate(prompts, max_tokens=max_tokens, sampling=sampling)
        for index, token in run:
            texts[index].add(token)
            if all(text.ended for text in texts):
                break
        whole = [text.finish() for text in texts]
        return whole if many else whole[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        chat: bool = False,
    ) -> TextStream:
        """Return an iterator over the pieces of the text that continues `prompt`."""
        tokens = self.encode(prompt, chat=chat)
        statistics = Statistics()
        sampling = Sampling(temperature, top_k, top_p, seed)
        run = self.loop.generate(
            [tokens], max_tokens=max_tokens, sampling=sampling, statistics=statistics
        )
        return TextStream(run, _Text(self.tokenizer.stream(tokens), stop), statistics)

    def logits(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Return f32[tokens, V] for each prompt: the logits after each of its tokens."""
        return self.loop.logits([self.encode(p) for p in prompts])

    def encode(self, prompt: Prompt, *, chat: bool = False) -> list[int]:
        """Return the tokens of a prompt in any of its forms."""
        if isinstance(prompt, str):
            if chat:
                return self.tokenizer.encode_chat([{"role": "user", "content": prompt}])
            return self.tokenizer.encode(prompt)
        if len(prompt) and isinstance(prompt[0], dict):
            return self.tokenizer.encode_chat(prompt)  # type: ignore[arg-type]
        return [int(token) for token in prompt]  # type: ignore[arg-type]


class TextStream(Iterator[str]):
    """The pieces of a text as they are made; `statistics` says how it went so far."""

    def __init__(self, run: Iterator[tuple[int, int]], text: _Text, statistics: Statistics) -> None:
        self.statistics = statistics
        self._pieces = self._made(run, text)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the run and free its part of the cache."""
        self._pieces.close()

    @staticmethod
    def _made(run: Iterator[tuple[int, int]], text: _Text) -> Any:
        try:
            for _, token in run:
                piece = text.add(token)
                if piece:
                    yield piece
                if text.ended:
                    break
            rest = text.rest()
            if rest:
                yield rest
        finally:
            getattr(run, "close", lambda: None)()


class _Text:
    """A text that grows by tokens and ends before a stop text."""

    def __init__(self, detokenizer: Detokenizer, stop: str | Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = [s for s in ([stop] if isinstance(stop, str) else stop) if s]
        self._given: list[str] = []
        self._held = ""  # may turn out to be the beginning of a stop text
        self.ended = False

    def add(self, token: int) -> str:
        """Return the text that can be given away now that `token` came."""
        if self.ended:
            return ""
        self._held += self._detokenizer.step(token)
        places = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if places:
            self._held = self._held[: min(places)]
            self.ended = True
        return self._give(len(self._held) - (0 if self.ended else self._uncertain()))

    def rest(self) -> str:
        """Return the text that was held back, at the end of the run."""
        return self._give(len(self._held))

    def finish(self) -> str:
        """Return the whole text."""
        self.rest()
        return "".join(self._given)

    def _give(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        self._given.append(piece)
        return piece

    def _uncertain(self) -> int:
        """Return how much of the end of the held text may begin a stop text."""
        lengths = [n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])]
        return max(lengths, default=0)


def _is_many(prompt: Any) -> bool:
    """Return whether a list holds prompts, rather than tokens or messages."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], (str, list))
