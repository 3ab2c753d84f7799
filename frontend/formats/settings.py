"""Objects of a configuration, of which every key is accounted for.

A key is used, or irrelevant for a reason that is written down, or refused by name unless its value
says nothing; any other key is refused, since it may change what a weight means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import DiluError, Loc, UnsupportedError
from .form import NO_PATTERN, Pattern

#: Why settings of activations do not matter: the reason that most keys have.
WIDE = "activations are computed as wide as the model's own, not rounded as this says"
PAST = "says how the scales were found, which are in the files"
METADATA = "says nothing of how weights are stored"


@dataclass(frozen=True)
class Neutral:
    """A key that is refused, with what it does, unless its value is one of `values`."""

    does: str
    values: tuple[Any, ...] = (None, False, {}, [], "")


@dataclass(frozen=True)
class Keys:
    """All keys that an object may have."""

    used: frozenset[str]
    irrelevant: Mapping[str, str] = field(default_factory=dict)
    neutral: Mapping[str, Neutral] = field(default_factory=dict)

    @property
    def known(self) -> frozenset[str]:
        return self.used | self.irrelevant.keys() | self.neutral.keys()


@dataclass(frozen=True)
class Settings:
    """An object in a configuration file: `place` is the path to it in `file`."""

    values: Mapping[str, Any]
    place: str
    file: str

    def check(self, keys: Keys) -> None:
        """Raise UnsupportedError for a key that is not accounted for."""
        for key, value in self.values.items():
            neutral = keys.neutral.get(key)
            if neutral is not None:
                if not any(type(value) is type(v) and value == v for v in neutral.values):
                    raise self.refused(key, neutral.does)
            elif key not in keys.known:
                raise UnsupportedError(
                    f"unknown key in {self.place}: {key!r} ({_short(value)})",
                    Loc(self.file),
                    "it may change what the weights mean, so it is not passed over; remove it if "
                    "it does not",
                )

    def refused(self, key: str, does: str) -> UnsupportedError:
        """Return the error for a key whose value is not supported."""
        return UnsupportedError(
            f"{self.place}.{key} is not supported: {_short(self.values.get(key))} ({does})",
            Loc(self.file),
        )

    def wrong(self, key: str, what: str) -> DiluError:
        """Return the error for a value that is none of `what`."""
        value = _short(self.values.get(key))
        return DiluError(f"{self.place}.{key} {value} is not {what}", Loc(self.file))

    # ---------------------------------------------------------------- values

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, `default` where it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.get(key, default)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a name")
        return value

    def size(self, key: str) -> int | None:
        value = self.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self.wrong(key, "a size")
        return value

    def pair(self, key: str) -> tuple[int, int] | None:
        """Return two positive sizes, also where they are written `128x128`."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, str) and re.fullmatch(r"\d+x\d+", value):
            value = [int(part) for part in value.split("x")]
        ok = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
        if not ok or not all(type(v) is int and v > 0 for v in value):
            raise self.wrong(key, "a pair of sizes")
        rows, columns = (int(v) for v in value)
        return rows, columns

    def names(self, key: str) -> tuple[str, ...]:
        value = self.get(key, ())
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self.wrong(key, "a list of names")
        if not all(isinstance(v, str) for v in value):
            raise self.wrong(key, "a list of names")
        return tuple(value)

    def patterns(self, key: str, make: Callable[[str], tuple[Pattern, ...]]) -> tuple[Pattern, ...]:
        """Return what the names of a list mean."""
        try:
            return tuple(p for name in self.names(key) for p in make(name))
        except NO_PATTERN as error:
            raise self.wrong(key, f"a list of names and patterns ({error})") from None

    def child(self, key: str) -> Settings | None:
        """Return an object within this one."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return Settings(value, f"{self.place}.{key}", self.file)

    def children(self, key: str) -> dict[str, Settings]:
        """Return the objects of an object, by key."""
        inside = self.child(key)
        if inside is None:
            return {}
        made = {name: inside.child(name) for name in inside.values}
        return {
            name: child if child is not None else Settings({}, f"{inside.place}.{name}", self.file)
            for name, child in made.items()
        }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
