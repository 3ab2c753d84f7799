"""The token loop of a language model: prompts in ragged chunks, then a token of each at a time.

Invariants: the logits of a sequence are the same alone and in any batch; pages are given back
however a run ends; nothing starts that the cache or the memory has no room for.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from ...errors import DiluError
from ..call.batch import PREFILL_TOKENS, pages_for
from .sample import Sampling, sample
from .sequences import PagePool, Sequence, Step, batch

if TYPE_CHECKING:
    from ..artifact.artifact import Artifact
    from ..call.function import Function
    from ..mesh.ranks import Ranks

T = TypeVar("T")


class Model(Protocol):
    """What makes tokens: a session, as far as text is concerned. `ranks`: the processes that it is
    one of; `lock` is held while its functions run; `weight_bytes`: those that they read."""

    @property
    def artifact(self) -> Artifact: ...
    @property
    def ranks(self) -> Ranks | None: ...
    @property
    def lock(self) -> AbstractContextManager[object]: ...
    @property
    def weight_bytes(self) -> int: ...
    def function(self, name: str) -> Function: ...
    def together(self, call: Callable[[], T]) -> T:
        """Return what `call` returns; of several ranks, all raise the DiluError of one."""
        ...

    def require_memory(self, needed: dict[str, int]) -> None:
        """Raise DiluError where `needed`, what for → bytes, is more than there is."""
        ...


@dataclass
class Statistics:
    """What a run did. Times are in seconds; the first token's counts from the start of the run."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prompt_seconds: float = 0.0
    first_token_seconds: float | None = None
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second, the first of each sequence not counted: the prompt makes it."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class TokenLoop:
    """The cache of a session's language model, and runs over it."""

    def __init__(self, session: Model) -> None:
        info = session.artifact.manifest["language_model"]
        assert info is not None  # whoever asks for text has looked
        self._session = session
        self._function = session.function("main")
        self._pool = PagePool()
        self.page_size: int = info["page_size"]
        self.vocab_size: int = info["vocab_size"]
        self.max_tokens: int = info["max_positions"]
        self.end_tokens = frozenset(info["eos_token_ids"])
        self._ranks = session.ranks
        self._owners = 1 if self._ranks is None else self._ranks.owners
        self._owner = 0 if self._ranks is None else self._ranks.owner

    def generate(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        statistics: Statistics | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Yield (index of the prompt, token) as tokens are made, until each run is at its end.

        A run ends with an end token, which is yielded, after `max_tokens`, or at the model's
        maximum. Raises DiluError for a prompt that is empty or longer than the maximum.
        """
        how = sampling or Sampling()
        stats = statistics or Statistics()
        for prompt in prompts:
            self._check(prompt)
        if max_tokens < 0:
            raise DiluError(f"max_tokens is {max_tokens}", hint="max_tokens is 0 or more")
        if not max_tokens:
            return iter(())
        return self._run(self._sequences(prompts), max_tokens, how, stats)

    def logits(self, prompts: SequenceOf[SequenceOf[int]]) -> list[np.ndarray]:
        """Return f32[tokens, V] for each prompt: the logits after each of its tokens."""
        for prompt in prompts:
            self._check(prompt)
        sequences = self._sequences(prompts)
        found: list[list[np.ndarray]] = [[] for _ in prompts]
        try:
            self._reserve(sequences, [len(s.tokens) for s in sequences])
            for steps, rows in self._prefill(sequences, every=True):
                for step, own in zip(steps, _split(steps, rows), strict=True):
                    found[_index(sequences, step.sequence)].append(own)
        finally:
            self._release(sequences)
        return [np.concatenate(parts) for parts in found]

    def release(self) -> None:
        """Forget the cache's content; pages in use stay."""
        if not self._pool.used:
            self._pool = PagePool()
            self._function.allocate(self._cache_size(0))

    def _sequences(self, prompts: SequenceOf[SequenceOf[int]]) -> list[Sequence]:
        """Return new sequences, divided evenly among those who own them."""
        return [Sequence(list(p), owner=i % self._owners) for i, p in enumerate(prompts)]

    def _run(
        self, sequences: list[Sequence], max_tokens: int, how: Sampling, stats: Statistics
    ) -> Iterator[tuple[int, int]]:
        if self._ranks is not None and how.seed is None:  # all ranks make the same choices
            how = replace(how, seed=self._ranks.gather(secrets.randbits(32))[0])
        stats.started = time.perf_counter()
        limits = [min(len(s.tokens) + max_tokens, self.max_tokens + 1) for s in sequences]
        random = [how.generator(index) for index in range(len(sequences))]
        try:
            self._reserve(sequences, [limit - 1 for limit in limits])
            live: list[int] = []
            for steps, rows in self._prefill(sequences, every=False, stats=stats):
                finished = [s for s in steps if s.wanted]
                for step, row in zip(finished, rows, strict=True):
                    index = _index(sequences, step.sequence)
                    stats.prompt_tokens += len(step.sequence.tokens)
                    token = sample(row, how, random[index])
                    if self._accept(sequences[index], token, limits[index]):
                        live.append(index)
                    yield self._counted(stats, index, token)
            while live:
                begun = time.perf_counter()
                steps = [Step(s, len(s.tokens), (len(s.tokens) - 1,)) for s in _at(sequences, live)]
                rows = self._step(steps)
                tokens = [sample(rows[at], how, random[index]) for at, index in enumerate(live)]
                stats.decode_seconds += time.perf_counter() - begun
                stats.decode_tokens += len(live)
                pairs = list(zip(live, tokens, strict=True))
                live = [i for i, t in pairs if self._accept(sequences[i], t, limits[i])]
                for index, token in pairs:
                    yield self._counted(stats, index, token)
        finally:
            self._release(sequences)

    def _accept(self, sequence: Sequence, token: int, limit: int) -> bool:
        """Append a token; return whether the run goes on. A run at its end frees its pages."""
        sequence.tokens.append(token)
        if token not in self.end_tokens and len(sequence.tokens) < limit:
            return True
        self._release([sequence])
        return False

    @staticmethod
    def _counted(stats: Statistics, index: int, token: int) -> tuple[int, int]:
        if stats.first_token_seconds is None:
            stats.first_token_seconds = time.perf_counter() - stats.started
        stats.new_tokens += 1
        return index, token

    def _prefill(
        self, sequences: list[Sequence], *, every: bool, stats: Statistics | None = None
    ) -> Iterator[tuple[list[Step], np.ndarray]]:
        """Run all tokens in chunks; yield each chunk's steps and the logits of its wanted rows.

        Wanted is `every` row, or the last of each sequence.
        """
        queues = [[s for s in sequences if s.owner == owner] for owner in range(self._owners)]
        while any(queues):
            steps = [step for queue in queues for step in _chunk(queue, every)]
            begun = time.perf_counter()
            logits = self._step(steps)
            if stats is not None:
                stats.prompt_seconds += time.perf_counter() - begun
            yield steps, logits

    def _step(self, steps: list[Step]) -> np.ndarray:
        own = [step for step in steps if step.sequence.owner == self._owner]
        (logits,) = self._function.run(*batch(own, self.page_size))
        for step in steps:
            step.sequence.done = step.stop
        if self._ranks is None or self._owners == 1:  # all ranks have the same logits
            return logits
        return self._everyones(steps, logits, self._ranks)

    def _everyones(self, steps: list[Step], logits: np.ndarray, ranks: Ranks) -> np.ndarray:
        """Return the logits of all steps, in their order, on every rank."""
        counts = [0] * self._owners
        for step in steps:
            counts[step.sequence.owner] += len(step.wanted)
        parts = ranks.gather_rows(logits, counts, "the gathering of logits")
        taken = [0] * self._owners
        rows: list[np.ndarray] = []
        for step in steps:
            owner, count = step.sequence.owner, len(step.wanted)
            rows.append(parts[owner][taken[owner] : taken[owner] + count])
            taken[owner] += count
        return np.concatenate(rows)

    def _reserve(self, sequences: list[Sequence], lengths: list[int]) -> None:
        """Give every sequence of this rank pages for as many tokens as it may come to."""
        self._session.together(lambda: self._reserve_own(sequences, lengths))

    def _reserve_own(self, sequences: list[Sequence], lengths: list[int]) -> None:
        pairs = zip(sequences, lengths, strict=True)
        own = [(s, length) for s, length in pairs if s.owner == self._owner]
        sequences, lengths = [s for s, _ in own], [length for _, length in own]
        counts = [pages_for(length, self.page_size) for length in lengths]
        with self._session.lock:
            wanted = max(self._pool.used + sum(counts), 1)  # whoever has none takes part, too
            if wanted > self._pool.size:
                self._grow(wanted, max(counts, default=1))
            for sequence, count in zip(sequences, counts, strict=True):
                sequence.pages = self._pool.take(count)

    def _grow(self, pages: int, longest: int) -> None:
        sizes = {"T": PREFILL_TOKENS, "S": 1, "R": 1, "P": longest, **self._cache_size(pages)}
        needed = {
            "weights": self._session.weight_bytes,
            "cache": self._function.state_bytes(sizes),
            "working memory": self._function.arena_bytes(sizes),
        }
        if not self._pool.used:  # the old cache first, so that both never stand side by side
            self.release()
        self._session.require_memory(needed)
        self._function.allocate(self._cache_size(pages), keep=self._pool.used > 0)
        self._pool.grow(pages)

    def _cache_size(self, pages: int) -> dict[str, int]:
        return dict.fromkeys(self._function.state_symbols, pages)

    def _release(self, sequences: list[Sequence]) -> None:
        with self._session.lock:
            for sequence in sequences:
                pages, sequence.pages = sequence.pages, []
                self._pool.give_back(pages)

    def _check(self, prompt: SequenceOf[int]) -> None:
        if not prompt:
            raise DiluError("the prompt is empty", hint="it needs at least one token")
        if len(prompt) > self.max_tokens:
            raise DiluError(
                f"the prompt is longer than the maximum: {len(prompt)} tokens, and the model "
                f"was compiled for {self.max_tokens}",
                hint="shorten it, or compile with a larger --max-seq if the model allows it",
            )
        wrong = next((t for t in prompt if not 0 <= t < self.vocab_size), None)
        if wrong is not None:
            raise DiluError(f"token {wrong} is not in the vocabulary of {self.vocab_size}")


def _chunk(queue: list[Sequence], every: bool) -> list[Step]:
    """Return the next steps of the sequences of one owner, which leave the queue at their end."""
    steps: list[Step] = []
    room = PREFILL_TOKENS
    while queue and room:
        sequence = queue[0]
        stop = min(len(sequence.tokens), sequence.done + room)
        room -= stop - sequence.done
        last = stop == len(sequence.tokens)
        rows = range(sequence.done if every else stop - 1, stop) if every or last else ()
        steps.append(Step(sequence, stop, tuple(rows)))
        if not last:
            break
        queue.pop(0)
    return steps


def _at(sequences: list[Sequence], indices: list[int]) -> list[Sequence]:
    return [sequences[i] for i in indices]


def _index(sequences: list[Sequence], sequence: Sequence) -> int:
    """Return where this very sequence is (equal ones may stand beside it)."""
    return next(i for i, s in enumerate(sequences) if s is sequence)


def _split(steps: list[Step], rows: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, np.cumsum([len(step.wanted) for step in steps])[:-1])
