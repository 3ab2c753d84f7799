"""What manifest.json says: the fields that the compiler writes and the runtime reads.

All of it is plain data, as JSON has it. Fields that are not required are missing in artifacts of
earlier versions of the same format, or where they mean nothing; a format that says something else
with the same fields has another number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, TypeVar, cast

#: The number of the format that is described here.
FORMAT = 1

#: A size: a number, or an expression of symbols (`expression.py`).
Size = int | str


class ValueEntry(TypedDict):
    """A parameter, state or result. `element` is what the model calls the type of numbers that the
    compiled code has as codes of `dtype`."""

    name: str
    dtype: str
    shape: list[Size]
    element: NotRequired[str]


class SlotEntry(TypedDict):
    """A part of the working memory, of `size` bytes, and how many values share it."""

    size: str
    values: int


class MemoryEntry(TypedDict):
    """The memory plan of a function, or of a body that it runs so many `times`."""

    function: str
    times: int
    slots: list[SlotEntry]


class FunctionEntry(TypedDict):
    """A function: `symbols` in the order of the native call's sizes, `constants` by name;
    `signature` where it is not called with its parameters alone (`call/signature.py`)."""

    name: str
    symbols: list[str]
    parameters: list[ValueEntry]
    states: list[ValueEntry]
    results: list[ValueEntry]
    constants: list[str]
    memory: NotRequired[list[MemoryEntry]]
    signature: NotRequired[dict[str, Any]]


class KernelEntry(TypedDict):
    """A kernel as the graph names it; `lines` are the first and last of `function`, which serves
    it, in the target's source."""

    name: str
    kind: str
    function: str
    lines: list[int] | None


class TargetEntry(TypedDict):
    """The kernels of one target; paths are files of the artifact. A target is one of the two below,
    which `targets.is_gpu` tells apart."""

    source: str
    requires: list[str]
    kernels: list[KernelEntry]


class CpuTargetEntry(TargetEntry):
    """A `library` of machine code (None where nothing is executed) for an `architecture`; it
    `requires` features of the processor."""

    library: str | None
    architecture: NotRequired[str]


class GpuTargetEntry(TargetEntry):
    """A `program` (`gpu/program.py`) for an architecture of a backend."""

    program: str
    backend: str
    arch: int | str


class PassEntry(TypedDict):
    """What a pass did."""

    name: str
    stage: str
    seconds: float
    nodes_before: int
    nodes_after: int


class FileEntry(TypedDict):
    """A file of weights: `path` from the artifact, or `absolute`, of `size` bytes."""

    path: str
    size: int
    fingerprint: str | None
    absolute: NotRequired[str]


class ConstantEntry(TypedDict):
    """Where a weight is. `dtype` is the element type in memory, `format` what the checkpoint calls
    it.

    The first `grid` axes of `shape` count pieces, each of which is `offset` bytes into one of
    the manifest's files and was called `tensor` there; all three are None without weights.
    `values` are those of a constant that no file holds, `splits` how ranks divide it; `part` says
    which indices of each dimension of a piece, whose shape is `stored`, are a rank's own
    (`mesh/shard.py`).
    """

    dtype: str
    format: str
    shape: list[int]
    grid: int
    file: list[int] | None
    offset: list[int] | None
    tensor: list[str] | None
    values: NotRequired[list[Any]]
    splits: NotRequired[list[dict[str, Any]]]
    part: NotRequired[list[list[int]]]
    stored: NotRequired[list[int]]


class LanguageModelEntry(TypedDict):
    """What making text needs to know. `sampling` is what the checkpoint suggests, `notes` are for
    the user."""

    architecture: str
    vocab_size: int
    page_size: int
    max_positions: int
    eos_token_ids: list[int]
    bos_token_id: int | None
    dtype: str
    parameters: int
    sampling: NotRequired[dict[str, float]]
    notes: NotRequired[list[str]]


class OptionsEntry(TypedDict):
    """What was compiled, and how."""

    source: str
    dtype: str | None
    max_seq: int | None
    config_only: bool


class Manifest(TypedDict):
    """The whole manifest.

    `hashes` are sha256 by file, of all but the weights. `mesh` has the sizes of its axes,
    `topology` and `experts` say how experts are placed on it; `coordinates` are a rank's own, and
    never on disk.
    """

    format: int
    dilu: str
    name: str
    functions: list[FunctionEntry]
    targets: dict[str, CpuTargetEntry | GpuTargetEntry]
    passes: list[PassEntry]
    files: list[FileEntry]
    constants: dict[str, ConstantEntry]
    language_model: LanguageModelEntry | None
    options: OptionsEntry
    mesh: NotRequired[dict[str, int] | None]
    topology: NotRequired[dict[str, Any]]
    experts: NotRequired[list[dict[str, Any]]]
    coordinates: NotRequired[dict[str, int]]
    hashes: NotRequired[dict[str, str]]
    manifest_hash: NotRequired[str]


E = TypeVar("E", bound=Mapping[str, Any])


def changed(entry: E, **fields: Any) -> E:
    """Return an entry with other values of some fields."""
    return cast(E, {**entry, **fields})


def located(constant: ConstantEntry) -> tuple[list[int], list[int], list[str]]:
    """Return the file, the offset and the tensor of each piece of a constant that is bound."""
    file, offset, tensor = constant["file"], constant["offset"], constant["tensor"]
    assert file is not None and offset is not None and tensor is not None
    return file, offset, tensor
