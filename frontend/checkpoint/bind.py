"""Checkpoint names → constants: how each parameter of a model is stored, and where its pieces are.

A parameter merged from tensors (the experts of a layer) is a grid of pieces, each its own tensor in
the files; blocks of scales start anew with every piece. Scales follow their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import DiluError, UnsupportedError
from ...ir.dtypes import BF16, F8E8M0, F32, DType
from ...ir.types import TensorType
from ...ir.weight_format import Storage, WeightFormat, plain
from ...ir.weights import Piece, Weight
from ..formats import Scheme, Unread
from ..formats.form import MX_BLOCK
from .checkpoint import Checkpoint
from .codes import Codes, Said, Scales
from .headers import TensorHeader
from .heads import untie
from .leftover import Leftovers
from .names import WHOLE, Names
from .places import Places

Shape = tuple[int, ...]


@dataclass
class Binder:
    """Says how the parameters of `model` are stored and where.

    Without a checkpoint (only a configuration) forms are what checkpoints of this `quantization`
    have: projections and experts as codes, all else in `plain`.

    Tied parameters that the checkpoint stores with different values are untied in `model`. Raises
    DiluError for tensors of the model's modules that nobody reads.
    """

    model: Any
    checkpoint: Checkpoint | None
    quantization: Scheme | None
    plain: DType = BF16
    shapes: dict[str, Shape] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        state = self.model.state_dict(keep_vars=True)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self._integers = {n for n, tensor in state.items() if not tensor.is_floating_point()}
        self._said = Said(self.model, self.quantization)
        self._names = Names(self.model, self.shapes)
        self._places: Places | None = None
        if self.checkpoint is not None:
            self._places = Places(self.model, self.checkpoint, self._names, self._said)
            untie(self.model, self.checkpoint, self._places.stored)
        first: dict[int, str] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            self.aliases[name] = first.setdefault(id(tensor), name)
        if self._places is not None:
            self._places.share_tied(self.aliases)
            self._codes = self._account(self._places)

    def _account(self, places: Places) -> Codes:
        """Return what finds scales; raise where a tensor is no parameter's and not its scales."""
        checkpoint = places.checkpoint
        ways = (way for ways in places.stored.values() for way in ways)
        owners = {tensor for way in ways for tensor in way.tensors()}
        codes = Codes(checkpoint, self._said, owners)
        holding = (t for t in owners if checkpoint.tensors[t].element.startswith("F8"))
        scales = {scale for t in holding for scale in codes.names(t)}
        rest = (t for t in checkpoint.tensors if t not in owners and t not in scales)
        unread = Leftovers(self.model, checkpoint, self._names).find(rest)
        if unread is not None:
            module, error = unread
            raise places.missing_in(module) or error
        return codes

    def canonical(self, name: str) -> str:
        """Return the first name of a parameter that has several (tied weights)."""
        return self.aliases.get(name, name)

    def storage(self, name: str) -> Storage:
        """Return how a parameter is stored; raise DiluError where the checkpoint is wrong."""
        name = self.canonical(name)
        grid, shape = self._grid(name)
        if self.checkpoint is None:
            return self._expected(name, grid, shape)
        headers = self._headers(name)
        dtype = _common(name, {h.dtype for h in headers})
        if not dtype.is_float and name not in self._integers:
            raise self._packed(name, headers[0])
        for header in headers:
            self._check_shape(name, header, shape)
        t = TensorType(dtype, (*grid, *shape))
        if not dtype.is_code:
            return plain(t)
        scales = self._scales(name)
        if len({s.shared for s in scales}) > 1:
            raise UnsupportedError(f"the tensors of {name!r} have scales of different blocks")
        scale_dtype = _common(name, {s.dtype for s in scales})
        return Storage(t, WeightFormat(dtype, scale_dtype, scales[0].shared.block))

    def weight(self, names: Sequence[str], *, scales: bool, stacked: bool) -> Weight:
        """Return the binding of a parameter, or of its scales; of several layers when `stacked`."""
        names = [self.canonical(name) for name in names]
        storage = self.storage(names[0])
        t = storage.scales if scales else storage.type
        assert t is not None
        lead = len(self._grid(names[0])[0])
        if scales and self.checkpoint is not None:
            lead += self._scales(names[0])[0].shared.everything
        if stacked:
            lead, t = lead + 1, t.with_shape((len(names), *t.shape))
        if self.checkpoint is None:
            return Weight(t, lead)
        find = self._scale_pieces if scales else self._pieces
        return Weight(t, lead, tuple(piece for name in names for piece in find(name)))

    # -------------------------------------------------------------- places

    def _grid(self, name: str) -> tuple[Shape, Shape]:
        """Return the grid of a parameter and the shape of a piece."""
        merge = self._places.merge(name) if self._places else self._names.expected(name)
        return merge.grid(self.shapes[name])

    def _headers(self, name: str) -> list[TensorHeader]:
        assert self.checkpoint is not None
        assert self._places is not None
        return [self.checkpoint.header(t) for t in self._places.tensors(name)]

    def _scales(self, name: str) -> list[Scales]:
        _, shape = self._grid(name)
        halves = (
            name.removesuffix(".weight").endswith("gate_up_proj") and shape == self.shapes[name]
        )
        return [self._codes.scales(name, h, shape, halves=halves) for h in self._headers(name)]

    def _pieces(self, name: str) -> list[Piece]:
        return [_piece(header) for header in self._headers(name)]

    def _scale_pieces(self, name: str) -> list[Piece]:
        """Return the pieces of scales: one that serves a whole stack is there for each of it."""
        found = self._scales(name)
        times = int(self._grid(name)[1][0]) if found[0].shared.everything else 1
        return [_piece(s.header) for s in found for _ in range(times)]

    # -------------------------------------------------------------- forms

    def _expected(self, name: str, grid: Shape, shape: Shape) -> Storage:
        t = TensorType(self.plain, (*grid, *shape))
        kept_wide: Sequence[str] = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        if any(part in name for part in kept_wide):
            t = t.with_dtype(F32)
        form = self._said.expected(name) if self._is_projection(name) else None
        if form is None:
            return plain(t)
        if isinstance(form, Unread):
            raise UnsupportedError(f"{form.said} is a form of weights that is not read")
        rows, columns = form.blocks[0]
        block = (rows or shape[-2], columns or shape[-1])
        scale = F8E8M0 if form.exponents and form.blocks[0] == MX_BLOCK else F32
        element = form.codes[0]
        return Storage(t.with_dtype(element), WeightFormat(element, scale, block))

    def _is_projection(self, name: str) -> bool:
        """Whether checkpoints store a parameter as codes: projections and experts, not the head."""
        if self._names.expected(name) != WHOLE:
            return True
        path, _, last = name.rpartition(".")
        module = self.model.get_submodule(path)
        head = self.model.get_output_embeddings()
        return last == "weight" and isinstance(module, torch.nn.Linear) and module is not head

    # -------------------------------------------------------------- errors

    def _check_shape(self, name: str, header: TensorHeader, want: Shape) -> None:
        if header.shape != want:
            raise DiluError(
                f"wrong shape: the model wants {list(want)}, the file has {list(header.shape)}",
                self._codes.loc(header.name),
                f"config.json describes a model in which {name} is {list(self.shapes[name])}: it "
                "is of another model, or the weight is stored in a form that is not read",
            )

    def _packed(self, name: str, header: TensorHeader) -> DiluError:
        form = self._said.stated(name, header.name)
        said = f": {form.said}" if isinstance(form, Unread) else ""
        return UnsupportedError(
            f"{header.name!r} holds integers ({header.dtype}), where the model has numbers{said}",
            self._codes.loc(header.name),
            "a form of weights that is not read",
        )


def _common(name: str, dtypes: set[DType]) -> DType:
    if len(dtypes) > 1:
        kinds = ", ".join(sorted(t.name for t in dtypes))
        raise UnsupportedError(f"the tensors of {name!r} have different types: {kinds}")
    return next(iter(dtypes))


def _piece(header: TensorHeader) -> Piece:
    return Piece(header.file, header.name, header.offset, header.nbytes)
