"""The one declaration of how a module's weight is stored, and which module is stored how.

A reader of a quantization method makes a `Scheme` from its configuration; nothing behind it knows
methods. What a file's header says decides: a scheme says how codes are to be read where there are
codes, and what to expect where only a configuration was given.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.dtypes import DTYPES, F8E4M3, DType

#: What Python raises for a pattern that is none, or too large a one.
NO_PATTERN = (re.error, OverflowError, RecursionError)

#: Rows and columns of a weight that share a scale; None: all that there are.
Block = tuple[int | None, int | None]

TENSOR: Block = (None, None)
ROW: Block = (1, None)
#: DeepSeek's block, which is also what transformers assumes where a configuration says none.
DEFAULT_BLOCK: Block = (128, 128)
MX_BLOCK: Block = (1, 32)

#: What a scale is called beside `X.weight` (`X.weight_scale`), and behind the name of a parameter
#: that is no `weight` (`gate_up_proj_scale`). All are multiplied: `scale_inv` is the inverse of
#: what the weight was divided by.
SUFFIXES = ("weight_scale", "weight_scale_inv", "scale", "scale_inv", "qscale_weight")


@dataclass(frozen=True)
class Form:
    """How a weight is stored: codes of one of the types `codes`, and scales that are multiplied.

    `blocks` are the shapes of what shares a scale, of which the scales' shape tells one.
    `exponents` says that scales stored as U8 are codes of e8m0, 2^(byte - 127). `suffixes` are the
    names that scales may have. `said` names what in the configuration says all this.
    """

    blocks: tuple[Block, ...]
    said: str
    codes: tuple[DType, ...] = (F8E4M3,)
    exponents: bool = False
    suffixes: tuple[str, ...] = SUFFIXES


@dataclass(frozen=True)
class Unread:
    """A form that the configuration describes and nothing here reads, in words."""

    said: str


@dataclass(frozen=True)
class Module:
    """What patterns of configurations are matched against: names of a module in the files and in
    the model, and the names of its classes."""

    names: tuple[str, ...]
    classes: tuple[str, ...] = ("Linear",)


@dataclass(frozen=True)
class Pattern:
    """A name in a configuration's list of modules.

    `rank` orders patterns that match one module: the smaller, the more specific.
    """

    text: str
    regex: re.Pattern[str]
    rank: int = 0
    classes: bool = False

    def matches(self, module: Module) -> bool:
        names = module.classes if self.classes else module.names
        return any(self.regex.search(name) for name in names)


def exact_or_class(text: str) -> tuple[Pattern, ...]:
    """Return what compressed-tensors means by a target: a name, `re:` and the beginning of one, or
    a class. Raises one of NO_PATTERN for a pattern that is none."""
    if text.startswith("re:"):
        return (Pattern(text, re.compile(rf"\A(?:{text[3:]})"), 1),)
    whole = re.compile(rf"\A{re.escape(text)}\Z")
    return (Pattern(text, whole, 0), Pattern(text, whole, 2, classes=True))


def glob(text: str, *, within: bool = False) -> tuple[Pattern, ...]:
    """Return what ModelOpt and Quark mean: a name with wildcards, or `re:` as above; of the module,
    or, `within`, of one that it is in."""
    if text.startswith("re:"):
        return exact_or_class(text)
    whole = fnmatch.translate(text).removesuffix(r"\Z").removesuffix(r"\z")
    end = r"(?=\.|\Z)" if within else r"\Z"
    return (Pattern(text, re.compile(rf"\A{whole}{end}"), int("*" in text)),)


def glob_within(text: str) -> tuple[Pattern, ...]:
    """Return `glob(text)` that also means what is in the modules that it names."""
    return glob(text, within=True)


def listed(text: str) -> tuple[Pattern, ...]:
    """Return what transformers means in its lists of modules: the beginning of a name as a regular
    expression, or the end of one, at a boundary; or a module within it."""
    plain = re.escape(text)
    try:
        re.compile(text)
        start = text
    except NO_PATTERN:
        start = plain
    regex = rf"\A(?:{start})(?:(?<=\.)|(?=\.|\Z))|{plain}\Z|(?:\A|\.){plain}(?=\.|\Z)"
    return (Pattern(text, re.compile(regex)),)


@dataclass(frozen=True)
class Rule:
    """Modules that `patterns` match are stored in `form`, plain where that is None."""

    patterns: tuple[Pattern, ...]
    form: Form | Unread | None

    def rank(self, module: Module) -> int | None:
        """Return how specifically the rule means a module, None where it does not."""
        return min((p.rank for p in self.patterns if p.matches(module)), default=None)


class Ambiguous(Exception):
    """Rules of equal rank that say different things of a module, in words."""


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's weights are stored: by `rules`, by `default` where none matches, plain
    where `excluded` does. `said` is the place in the configuration, for messages."""

    method: str
    said: str
    rules: tuple[Rule, ...] = ()
    default: Form | Unread | None = None
    excluded: tuple[Pattern, ...] = ()

    def expected(self, module: Module) -> Form | Unread | None:
        """Return the form that the configuration says a module has; None: it is not quantized."""
        if any(p.matches(module) for p in self.excluded):
            return None
        return self.stated(module)

    def stated(self, module: Module) -> Form | Unread | None:
        """Return the form of a module that is quantized, whatever lists of exclusions say.

        Such lists name modules that do not exist and miss ones that do (seen in released files).
        Raises Ambiguous where the configuration says two things.
        """
        ranked = [(rank, r.form) for r in self.rules if (rank := r.rank(module)) is not None]
        best = min((rank for rank, _ in ranked), default=None)
        forms = _distinct([form for rank, form in ranked if rank == best])
        if len(forms) > 1:
            raise Ambiguous(" and ".join(form.said if form else "plain" for form in forms))
        return forms[0] if forms else self.default

    def read(self, module: Module) -> Form | Unread | None:
        """Return how to read codes that a module is found to have; None where nothing says it."""
        form = self.stated(module)
        if form is not None:
            return form
        forms = _distinct([r.form for r in self.rules if r.form is not None])
        return forms[0] if len(forms) == 1 else None


def _distinct(forms: Sequence[Form | Unread | None]) -> list[Form | Unread | None]:
    """Return the forms that say different things, by any name."""
    found: dict[object, Form | Unread | None] = {}
    for form in forms:
        same = (form.blocks, form.codes, form.exponents) if isinstance(form, Form) else form
        found.setdefault(same, form)
    return list(found.values())


#: The types that weights have as codes of 8 bits.
FLOAT8 = tuple(t for t in DTYPES.values() if t.is_code and t.bits == 8 and t.special != "scale")


def _names(t: DType) -> tuple[str, ...]:
    """Return the names that configurations have for a type of codes."""
    short = t.name.removeprefix("f8")
    return (short, str(t.torch), f"float8_{short}", f"fp8_{short}")


#: Those types by these names.
ELEMENTS = {name: t for t in FLOAT8 for name in _names(t)}
