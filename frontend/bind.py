"""Checkpoint names → constants: how each parameter of a model is stored, and where its pieces are.

The renaming and merging of a checkpoint's tensors is transformers' own data
(`get_model_conversion_mapping`); scales follow their weights. A parameter merged from tensors (the
experts of a layer) is a grid of pieces, each its own tensor in the files; blocks of scales start
anew with every piece.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import DiluError, Loc, UnsupportedError
from ..ir.dtypes import BF16, F8E4M3, F32, DType
from ..ir.types import TensorType
from ..ir.weights import Piece, Weight
from .checkpoint import Checkpoint, Quantization, TensorHeader
from .importer import Storage


@dataclass(frozen=True)
class _Merge:
    """How a parameter is made of tensors: `experts` of them (or no such axis) times `parts` along
    its rows; `pattern` finds the expert's number in a tensor's name."""

    stacked: bool
    parts: tuple[re.Pattern[str], ...]

    def grid(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the grid and the shape of a piece of a parameter of `shape`."""
        lead, rest = (tuple(shape[:1]), shape[1:]) if self.stacked else ((), shape)
        count = len(self.parts)
        if count == 1:
            return lead, tuple(rest)
        return (*lead, count), (rest[0] // count, *rest[1:])

    def place(self, name: str) -> tuple[int, int]:
        """Return the expert and the part that the tensor `name` is."""
        for part, pattern in enumerate(self.parts):
            match = pattern.search(name)
            if match:
                return int(match[1]) if self.stacked else 0, part
        raise AssertionError(f"{name} is none of {self.parts}")


_WHOLE = _Merge(False, (re.compile(""),))


@dataclass
class Binder:
    """Says how the parameters of `model` are stored and where.

    Without a checkpoint (only a configuration) forms are what checkpoints of this `quantization`
    have: projections and experts in FP8, all else in `plain`.
    """

    model: Any
    checkpoint: Checkpoint | None
    quantization: Quantization | None
    plain: DType = BF16
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    _projections: set[str] = field(default_factory=set)
    _merges: dict[str, _Merge] = field(default_factory=dict)
    _tensors: dict[str, dict[tuple[int, int], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first: dict[int, str] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            self.aliases[name] = first.setdefault(id(tensor), name)
            self.shapes[name] = tuple(tensor.shape)
        head = self.model.get_output_embeddings()
        self._projections = {
            f"{name}.weight"
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
        self._read_mapping()

    def canonical(self, name: str) -> str:
        """Return the first name of a parameter that has several (tied weights)."""
        return self.aliases.get(name, name)

    def storage(self, name: str) -> Storage:
        """Return how a parameter is stored; raise DiluError where the checkpoint is wrong."""
        grid, shape = self._grid(name)
        if self.checkpoint is None:
            return self._expected(name, grid, shape)
        headers = [self.checkpoint.header(t) for t in self._names(name)]
        for tensor, header in zip(self._names(name), headers, strict=True):
            self._check_shape(tensor, header, shape)
        dtype = self._common(name, {h.dtype for h in headers})
        t = TensorType(dtype, (*grid, *shape))
        if not dtype.is_code:
            return Storage(t)
        scales = [self._scale(tensor, shape) for tensor in self._names(name)]
        scale_dtype = self._common(name, {h.dtype for h in scales})
        block = self._block(scales[0], shape)
        count = _scale_shape(shape, block)
        return Storage(t, TensorType(scale_dtype, (*grid, *count)), block)

    def weight(self, names: Sequence[str], *, scales: bool, stacked: bool) -> Weight:
        """Return the binding of a parameter, or of its scales; of several layers when `stacked`."""
        storage = self.storage(names[0])
        t = storage.scales if scales else storage.type
        assert t is not None
        grid, _ = self._grid(names[0])
        if stacked:
            grid, t = (len(names), *grid), t.with_shape((len(names), *t.shape))
        if self.checkpoint is None:
            return Weight(t, len(grid))
        tensors = [tensor for name in names for tensor in self._names(name)]
        suffix = self.quantization.suffix if scales and self.quantization else ""
        return Weight(t, len(grid), tuple(self._piece(tensor + suffix) for tensor in tensors))

    # -------------------------------------------------------------- names

    def _read_mapping(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        transforms: list[Any] = list(get_model_conversion_mapping(self.model))
        merging = [t for t in transforms if hasattr(t, "operations")]
        renaming = [t for t in transforms if not hasattr(t, "operations")]
        merges = {id(t): _merge(t) for t in merging}
        if self.checkpoint is None:
            self._expect_merges(merging, merges)
            return
        scale = self.quantization.suffix if self.quantization else None
        prefix = getattr(self.model, "base_model_prefix", "")
        for tensor in self.checkpoint.tensors:
            if scale and tensor.endswith(scale):
                continue
            name, merge = _renamed(tensor, renaming, merging, merges)
            if name not in self.shapes and f"{prefix}.{name}" in self.shapes:
                name = f"{prefix}.{name}"
            if name not in self.shapes:
                continue  # more than the model has, such as layers for speculative decoding
            if merge is None:
                raise UnsupportedError(
                    f"{name} is stored in a form that is not supported",
                    Loc(str(self.checkpoint.path), tensor=tensor),
                )
            self._merges[name] = merge
            self._tensors.setdefault(name, {})[merge.place(tensor)] = tensor

    def _expect_merges(self, merging: list[Any], merges: Mapping[int, _Merge | None]) -> None:
        for name in self.shapes:
            for transform in merging:
                merge = merges[id(transform)]
                if merge and any(name.endswith(t) for t in transform.target_patterns):
                    self._merges[name] = merge

    def _names(self, name: str) -> list[str]:
        """Return the checkpoint's tensors that a parameter is made of, in the order of the grid."""
        assert self.checkpoint is not None
        found = self._tensors.get(name)
        if not found:
            raise DiluError(
                f"the checkpoint has no tensor for {name!r}",
                Loc(str(self.checkpoint.path), tensor=name),
                "the files do not belong to this config.json, or the download is incomplete",
            )
        grid, _ = self._grid(name)
        merge = self._merges.get(name, _WHOLE)
        experts = range(grid[0] if merge.stacked else 1)
        places = [(e, p) for e in experts for p in range(len(merge.parts))]
        for e, p in places:
            if (e, p) not in found:
                raise DiluError(
                    f"the checkpoint has no tensor for expert {e}, part {p} of {name!r}",
                    Loc(str(self.checkpoint.path), tensor=name),
                    "the files do not belong to this config.json, or the download is incomplete",
                )
        return [found[place] for place in places]

    def _grid(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._merges.get(name, _WHOLE).grid(self.shapes[name])

    # -------------------------------------------------------------- forms

    def _expected(self, name: str, grid: tuple[int, ...], shape: tuple[int, ...]) -> Storage:
        t = TensorType(self.plain, (*grid, *shape))
        if any(part in name for part in _kept_wide(self.model)):
            t = t.with_dtype(F32)
        if self.quantization is None or not self._is_quantized(name):
            return Storage(t)
        block = self.quantization.block or (1, shape[1])
        scales = TensorType(F32, (*grid, *_scale_shape(shape, block)))
        return Storage(t.with_dtype(F8E4M3), scales, block)

    def _is_quantized(self, name: str) -> bool:
        """Whether checkpoints store a parameter in FP8: projections and experts, not the head."""
        assert self.quantization is not None
        module = name.rpartition(".")[0]
        if any(_matches(pattern, module) for pattern in self.quantization.excluded):
            return False
        return name in self._merges or name in self._projections

    def _scale(self, tensor: str, shape: tuple[int, ...]) -> TensorHeader:
        assert self.checkpoint is not None
        loc = Loc(str(self.checkpoint.path), tensor=tensor)
        if self.quantization is None:
            raise DiluError(
                f"{tensor!r} holds 8-bit codes, but config.json has no quantization_config", loc
            )
        header = self.checkpoint.header(tensor + self.quantization.suffix)
        want = _scale_shape(shape, self._block(header, shape))
        if _padded(header.shape) != want:
            raise self._wrong_shape(tensor + self.quantization.suffix, header, want)
        return header

    def _block(self, scales: TensorHeader, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the block of a scale: the scheme's, a row of the weight, or all of it."""
        assert self.quantization is not None
        if self.quantization.block is not None:
            return self.quantization.block
        return (shape[0], shape[1]) if _padded(scales.shape) == (1, 1) else (1, shape[1])

    def _check_shape(self, tensor: str, header: TensorHeader, want: tuple[int, ...]) -> None:
        if header.shape != want:
            raise self._wrong_shape(tensor, header, want)

    def _wrong_shape(self, tensor: str, header: TensorHeader, want: Sequence[int]) -> DiluError:
        assert self.checkpoint is not None
        return DiluError(
            f"wrong shape: the model wants {list(want)}, the file has {list(header.shape)}",
            Loc(str(self.checkpoint.path / header.file), tensor=tensor),
            "the files do not belong to this config.json",
        )

    def _common(self, name: str, dtypes: set[DType]) -> DType:
        if len(dtypes) > 1:
            kinds = ", ".join(sorted(t.name for t in dtypes))
            raise UnsupportedError(f"the tensors of {name!r} have different types: {kinds}")
        return next(iter(dtypes))

    def _piece(self, tensor: str) -> Piece:
        assert self.checkpoint is not None
        header = self.checkpoint.header(tensor)
        return Piece(header.file, tensor, header.offset, header.nbytes)


def _kept_wide(model: Any) -> tuple[str, ...]:
    """Return what must stay in f32 whatever the model's element type, as parts of names."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return tuple(kept)


def _merge(transform: Any) -> _Merge | None:
    """Return what a transform of transformers does to tensors; None for what is not supported."""
    operations = [type(o).__name__ for o in transform.operations]
    dims = [getattr(o, "dim", None) for o in transform.operations]
    patterns = tuple(_pattern(p) for p in transform.source_patterns)
    if len(transform.target_patterns) != 1:
        return None
    if operations == ["MergeModulelist"] and dims == [0] and len(patterns) == 1:
        return _Merge(True, patterns)
    if operations == ["MergeModulelist", "Concatenate"] and dims == [0, 1]:
        return _Merge(True, patterns)
    if operations == ["Concatenate"] and dims == [0]:
        return _Merge(False, patterns)
    return None


def _pattern(source: str) -> re.Pattern[str]:
    return re.compile(re.escape(source.lstrip("^")).replace(r"\*", r"(\d+)") + r"(?!\w)")


def _renamed(
    tensor: str, renaming: list[Any], merging: list[Any], merges: Mapping[int, _Merge | None]
) -> tuple[str, _Merge | None]:
    """Return the parameter that a tensor belongs to, and how it does."""
    for transform in renaming:
        tensor = transform.rename_source_key(tensor)[0]
    for transform in merging:
        name, pattern = transform.rename_source_key(tensor)
        if pattern is not None:
            return name, merges[id(transform)]
    return tensor, _WHOLE


def _scale_shape(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, ...]:
    *lead, n, k = shape
    return (*lead, -(-n // block[0]), -(-k // block[1]))


def _padded(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a scale's shape with two axes: `[]`, `[1]` and `[N]` count as `[1,1]` and `[N,1]`."""
    return tuple(shape) if len(shape) >= 2 else (*(shape or (1,)), 1)


def _matches(pattern: str, module: str) -> bool:
    """Whether a list of unquantized modules means `module`: by name, by its end, or a parent's."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return f".{pattern}." in f".{module}."
