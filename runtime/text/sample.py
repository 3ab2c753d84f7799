"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import DiluError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest at temperature 0, else at random by `seed`.

    `top_k` keeps the k likeliest tokens, `top_p` the fewest whose probabilities reach p.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < np.inf, "temperature", self.temperature, "0 or more")
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "1 or more")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, to 1")
        _require(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")

    def generator(self, sequence: int = 0) -> np.random.Generator | None:
        """Return the source of randomness of the n-th sequence of a run; none is needed at
        temperature 0, and numpy's random part is not even imported."""
        if self.temperature == 0:
            return None
        seed = None if self.seed is None else [self.seed, sequence]
        return np.random.default_rng(seed)


def sample(logits: np.ndarray, how: Sampling, random: np.random.Generator | None) -> int:
    """Return a token for `logits[V]`; `random` is what `how.generator()` returned."""
    if not np.isfinite(logits.max()):
        raise DiluError(
            "the model returned logits that are not finite",
            hint="the checkpoint may be damaged; dilu inspect shows its weights",
        )
    if random is None:
        return int(logits.argmax())
    ids, chances = distribution(logits, how)
    totals = chances.cumsum()
    chosen = np.searchsorted(totals, random.random() * totals[-1], "right")
    return int(ids[min(int(chosen), len(ids) - 1)])


def distribution(logits: np.ndarray, how: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that may be chosen and their probabilities, likeliest first."""
    ids = np.arange(len(logits))
    if how.top_k is not None and how.top_k < len(logits):
        ids = np.argpartition(logits, -how.top_k)[-how.top_k :]
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    scaled = (logits[ids].astype(np.float64) - logits.max()) / how.temperature
    chances = np.exp(scaled)
    chances /= chances.sum()
    if how.top_p is not None:
        kept = int(np.searchsorted(chances.cumsum(), how.top_p)) + 1
        ids, chances = ids[:kept], chances[:kept]
        chances /= chances.sum()
    return ids, chances


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise DiluError(f"{name} is {value}", hint=f"{name} is {allowed}")
