"""Weights that are stored as codes: which tensors are their scales, and what they mean.

The header says that a tensor holds codes; the configuration says how they are to be read, and is
checked against what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DiluError, Loc, UnsupportedError
from ...ir.dtypes import F8E8M0, U8, DType
from ...ir.weight_format import scale_shape
from ..formats import Form, Module, Scheme, Unread, unsaid
from ..formats.form import SUFFIXES, Ambiguous
from ..formats.scales import Shared, described, scale_names, shared
from .checkpoint import CONFIG, Checkpoint
from .headers import TensorHeader

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Scales:
    """The scales of one tensor: which tensor they are, of what type, and what shares one."""

    header: TensorHeader
    dtype: DType
    shared: Shared


class Said:
    """What the configuration, read into `scheme`, says of the parameters of `model`."""

    def __init__(self, model: Any, scheme: Scheme | None) -> None:
        self.scheme = scheme
        self.classes = {
            name: tuple(c.__name__ for c in type(module).__mro__)
            for name, module in model.named_modules()
        }

    def expected(self, name: str) -> Form | Unread | None:
        """Return the form that a parameter is to have; None where it is to be plain."""
        return self._of(name, name, Scheme.expected)

    def stated(self, name: str, tensor: str) -> Form | Unread | None:
        """Return the form that is said of a tensor of a parameter, None where none is."""
        return self._of(name, tensor, Scheme.stated)

    def read(self, name: str, tensor: str) -> Form | Unread | None:
        """Return how to read codes in a tensor of a parameter, None where nothing says it."""
        if self.scheme is None:
            return unsaid(CONFIG).default
        return self._of(name, tensor, Scheme.read)

    def _of(
        self, name: str, tensor: str, ask: Callable[[Scheme, Module], Form | Unread | None]
    ) -> Form | Unread | None:
        if self.scheme is None:
            return None
        path, _, last = name.rpartition(".")
        classes = self.classes.get(path, ())
        if last != "weight":  # experts, which are linear layers to who quantized them
            classes = (*classes, "Linear")
        names = (tensor.rpartition(".")[0], path, tensor, name)
        try:
            return ask(self.scheme, Module(names, classes))
        except Ambiguous as error:
            raise UnsupportedError(
                f"the configuration says two things of {tensor!r}: {error}",
                Loc(self.scheme.said, tensor=tensor),
            ) from None


class Codes:
    """Finds the scales of tensors of `checkpoint`; `parameters` are those that are none."""

    def __init__(self, checkpoint: Checkpoint, said: Said, parameters: Container[str]) -> None:
        self.checkpoint = checkpoint
        self.said = said
        self.parameters = parameters
        self._found: dict[str, Scales] = {}

    def scales(self, name: str, header: TensorHeader, shape: Shape, *, halves: bool) -> Scales:
        """Return the scales of codes of `shape`, a tensor of the parameter `name`.

        Raises DiluError where there are none, or where they are not what the configuration says.
        """
        if header.name not in self._found:
            self._found[header.name] = self._scales(name, header, shape, halves)
        return self._found[header.name]

    def _scales(self, name: str, header: TensorHeader, shape: Shape, halves: bool) -> Scales:
        tensor, loc = header.name, self.loc(header.name)
        form = self.said.read(name, tensor)
        if form is None or isinstance(form, Unread):
            said = form.said if form else "nothing in the configuration is about its module"
            raise UnsupportedError(f"{tensor!r} holds {header.dtype} codes, and {said}", loc)
        if header.dtype not in form.codes:
            kinds = " or ".join(str(t) for t in form.codes)
            raise DiluError(
                f"{tensor!r} holds {header.dtype} codes, where {form.said} says {kinds}", loc
            )
        if len(shape) < 2:
            raise UnsupportedError(f"{tensor!r} holds codes and is no matrix", loc)
        scales = self.checkpoint.header(self._name(tensor, form))
        found = shared(form, shape, scales.shape, halves=halves)
        if found is None:
            raise self._wrong(form, shape, scales)
        return Scales(scales, self._dtype(form, scales), found)

    def names(self, tensor: str) -> list[str]:
        """Return the tensors that may be the scales of `tensor`, whatever is said of them."""
        return self._candidates(tensor, SUFFIXES)

    def _candidates(self, tensor: str, suffixes: Sequence[str]) -> list[str]:
        there = self.checkpoint.tensors
        names = scale_names(tensor, suffixes)
        return [n for n in names if n in there and n not in self.parameters]

    def _name(self, tensor: str, form: Form) -> str:
        names = self._candidates(tensor, form.suffixes)
        if len(names) == 1:
            return names[0]
        if names:
            raise DiluError(
                f"{tensor!r} has two tensors that may be its scales: {', '.join(names)}",
                self.loc(tensor),
            )
        tried = list(scale_names(tensor, form.suffixes))
        for name in tried:
            if name in self.checkpoint.absent:
                raise self.checkpoint.missing(name, "")
        said = f", but {CONFIG} has no quantization_config" if self.said.scheme is None else ""
        raise DiluError(
            f"{tensor!r} holds 8-bit codes{said}, and the checkpoint has no tensor {tried[0]!r} "
            "nor other scales that say what they mean",
            self.loc(tensor),
            f"tried: {', '.join(tried)}",
        )

    def _dtype(self, form: Form, scales: TensorHeader) -> DType:
        """Return the type of scales; bytes are exponents only where the configuration says so."""
        dtype = scales.dtype
        if dtype == U8 and form.exponents:
            return F8E8M0
        if not dtype.is_float or (dtype.is_code and dtype != F8E8M0):
            raise UnsupportedError(
                f"scales of type {dtype} in {scales.name!r}, which {form.said} does not say how to "
                "read",
                self.loc(scales.name),
            )
        return dtype

    def _wrong(self, form: Form, shape: Shape, scales: TensorHeader) -> DiluError:
        n, k = shape[-2:]
        wanted = [scale_shape(shape, (rows or n, columns or k)) for rows, columns in form.blocks]
        want = " or ".join(dict.fromkeys(str(list(w)) for w in wanted))
        said = " or ".join(described(block) for block in form.blocks)
        return DiluError(
            f"wrong shape: the model wants {want} scales ({form.said}: {said}), the file has "
            f"{list(scales.shape)}",
            self.loc(scales.name),
            "the configuration is not of these weights, or scales are shared in a way that is not "
            "read",
        )

    def loc(self, tensor: str) -> Loc:
        """Return the place of a tensor."""
        header = self.checkpoint.tensors[tensor]
        return Loc(str(self.checkpoint.path / header.file), tensor=tensor)
