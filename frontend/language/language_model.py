"""Language models as one function over ragged token batches and a paged cache.

    main(tokens i64[T], positions i64[T], sequence i64[T], slots i64[T], pages i64[S,P],
         rows i64[R]) -> logits f32[R,V]

Each kind of decoder layer is captured once; a run of equal layers is one `call` whose constants and
caches are stacked, so that the graph does not grow with depth. No weight is loaded.

Sizes: T tokens, S sequences, P pages of a sequence, B pages in the cache, G slots of a page,
R rows of logits, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import DiluError, Loc, UnsupportedError
from ...ir.dtypes import BF16, DTYPES, I64, DType
from ...ir.graph import Graph, Value
from ...ir.ops.control import Call
from ...ir.types import TensorType, shape_of, symbol
from ...ir.weight_format import Storage, plain
from ...ir.weights import Weight
from ...runtime.artifact.manifest import LanguageModelEntry
from ..checkpoint.bind import Binder
from ..checkpoint.checkpoint import CONFIG, read_checkpoint, read_config, read_quantization
from ..operators.language import PAGING
from ..program.capture import weight_of
from ..program.importer import Imported, Importer, Source
from . import transformer
from .buffers import check_rotary, real_buffers
from .configuration import Configuration, decode_floats, read_configuration, text_settings
from .generation import read_generation
from .model import build_model, telling
from .runs import LayerCall, Run, signature
from .tokens_apart import require_tokens_apart

PAGE_SIZE = 64
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
TORCH = {DTYPES[name]: dtype for name, dtype in _DTYPES.items()}
_T, _S, _P, _B = (symbol(n) for n in "TSPB")
_PER_TOKEN = TensorType(I64, (_T,))
_PAGES = TensorType(I64, (_S, _P))


@dataclass(frozen=True)
class LanguageModelInfo:
    """What running a language model needs to know besides its graph; plain data.

    `sampling` (temperature, top_k, top_p) is what the checkpoint suggests, empty where it does not
    want tokens drawn at random; `notes` are what its user should be told.
    """

    architecture: str
    vocab_size: int
    page_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str = "f32"
    parameters: int = 0
    sampling: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> LanguageModelEntry:
        """Return the fields as JSON has them."""
        return json.loads(json.dumps(asdict(self)))


def capture_language_model(
    path: str | Path, *, dtype: str = "f32", config_only: bool = False
) -> tuple[Graph, LanguageModelInfo]:
    """Capture the model of a checkpoint directory, computing in `dtype` (f32 or bf16).

    With `config_only`, `path` may be a config.json: everything but the weights' places is made.
    Raises DiluError when the checkpoint is broken or does not fit its configuration, and
    UnsupportedError when the architecture is beyond what is supported.
    """
    path = Path(path)
    if dtype not in _DTYPES:
        raise DiluError(f"unknown element type {dtype!r}", hint=f"supported: {', '.join(_DTYPES)}")
    checkpoint = None if config_only else read_checkpoint(path)
    settings = decode_floats(checkpoint.config if checkpoint else read_config(path))
    file = str(path / CONFIG if path.is_dir() else path)
    found = read_configuration(settings, file)
    model, mode = build_model(found, _DTYPES[dtype])
    quantization = read_quantization({**text_settings(settings), **settings}, file)
    binder = Binder(model, checkpoint, quantization, _stored_dtype(settings))
    parameters = sum(p.numel() for p in model.parameters())  # before its layers become runs
    with telling(f"capture the model of model_type {found.kind!r}"):
        check_rotary(model)
        graph = _Capture(model, mode, binder, DTYPES[dtype]).graph()
    info = _info(model, found, settings, path)
    return graph, replace(info, dtype=dtype, parameters=parameters)


def _stored_dtype(settings: Mapping[str, Any]) -> DType:
    """Return the element type of unquantized weights as the configuration says it."""
    names = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
    text = text_settings(settings)
    said = next(
        (x[k] for x in (settings, text) for k in ("torch_dtype", "dtype") if x.get(k)), None
    )
    return DTYPES[names[said]] if said in names else BF16


def _info(
    model: Any, found: Configuration, settings: Mapping[str, Any], path: Path
) -> LanguageModelInfo:
    generation = read_generation(path if path.is_dir() else path.parent, settings, model.config)
    return LanguageModelInfo(
        architecture=type(model).__name__,
        vocab_size=_size(model, "vocab_size", path),
        page_size=PAGE_SIZE,
        max_positions=_size(model, "max_position_embeddings", path),
        eos_token_ids=generation.eos,
        bos_token_id=generation.bos,
        sampling=generation.sampling,
        notes=(*found.notes, *generation.notes),
    )


def _size(model: Any, name: str, path: Path) -> int:
    """Return a size that the configuration has to say."""
    size = getattr(model.config, name, None)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        said = "does not say" if size is None else f"says {size!r} for"
        file = path / CONFIG if path.is_dir() else path
        raise DiluError(f"the configuration {said} {name}", Loc(str(file)), f"add {name} to it")
    return size


@dataclass
class _Kind:
    """A captured decoder layer; `invariants` are the places of those that it uses."""

    imported: Imported
    invariants: tuple[int, ...]
    prefix: str  # of the layer that was captured, in the model's names


@dataclass
class _Capture:
    """The capture of one model: its runs of layers, their kinds, and the function around them."""

    model: Any
    mode: FakeTensorMode
    binder: Binder
    dtype: DType
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    kinds: list[tuple[Any, _Kind]] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    updates: list[Value] = field(default_factory=list)

    def graph(self) -> Graph:
        """Capture everything; return the graph."""
        self.buffers = real_buffers(self.model, TORCH[self.dtype])
        layers = transformer.find_layers(self.model).layers
        keys = [self.signature(i, layer) for i, layer in enumerate(layers)]
        runs = transformer.find_runs(self.model, keys, self.mode)
        program = transformer.export_outer(self.model, runs, self.mode)
        kinds = [self.kind(run) for run in runs]

        def called(index: int, operands: tuple[Value, ...]) -> Value:
            return self.call(importer, runs[index], kinds[index], operands)

        def names(name: str) -> str:
            return self.binder.canonical(name.removeprefix("model."))

        importer = Importer(program, self.storage, called, trust_indices=True, names=names)
        importer.name_sizes([["T"], ["T"], ["R"]])
        importer.take_inputs()
        tokens, positions, rows = importer.parameters
        more = {"sequence": _PER_TOKEN, "slots": _PER_TOKEN, "pages": _PAGES}
        importer.roles["positions"] = positions
        importer.roles |= {name: importer.parameter(name, t) for name, t in more.items()}
        importer.parameters = [tokens, *(importer.roles[r] for r in PAGING), rows]
        results = importer.run()
        imported = importer.finish("main", results, self.updates)
        require_tokens_apart(imported.function, rows)
        for name, source in imported.sources.items():
            if name not in self.weights:
                self.weights[name] = self.weight([source.parameter], source, stacked=False)
        used = {c.name for c in imported.function.constants}
        weights = {name: w for name, w in self.weights.items() if name in used}
        return Graph("captured", (imported.function,), weights)

    def storage(self, name: str, t: TensorType) -> Storage:
        """Return how a parameter is stored; a buffer that no checkpoint holds is as it is."""
        return plain(t) if name in self.buffers else self.binder.storage(name)

    def weight(self, names: list[str], source: Source, *, stacked: bool) -> Weight:
        """Return the binding of a parameter or buffer, of several layers if it is stacked."""
        if names[0] not in self.buffers:
            return self.binder.weight(names, scales=source.scales, stacked=stacked)
        values = [self.buffers[n] for n in names]
        return weight_of(torch.stack(values) if stacked else values[0])

    # -------------------------------------------------------------- layers

    def signature(self, index: int, layer: torch.nn.Module) -> Any:
        """Return what makes layers one kind: the same program, and weights stored alike."""
        forms = tuple(
            (name, self.binder.storage(self.layer_prefix(index) + name))
            for name in layer.state_dict(keep_vars=True)
        )
        return signature(layer), forms

    def layer_prefix(self, index: int) -> str:
        return f"{transformer.layers_name(self.model)}.{index}."

    def kind(self, run: Run) -> _Kind:
        """Capture the layer of a run, unless one like it has been."""
        known = next((kind for key, kind in self.kinds if key == run.key), None)
        if known is None:
            assert run.record.call is not None, "the model has called its layers in the trial"
            name = f"layer_{len(self.kinds)}"
            known = self.capture_layer(run.record.call, name, self.layer_prefix(run.first))
            self.kinds.append((run.key, known))
        return known

    def capture_layer(self, call: LayerCall, name: str, prefix: str) -> _Kind:
        program = transformer.export_layer(call, self.mode)

        def storage(parameter: str, t: TensorType) -> Storage:
            return self.storage(prefix + parameter, t)

        def names(parameter: str) -> str:
            return parameter.removeprefix("layer.")

        importer = Importer(program, storage, trust_indices=True, names=names)
        importer.name_sizes([["T"]] * (1 + len(call.invariants)))
        importer.take_inputs(["hidden", *call.names])
        taken = list(importer.parameters)
        importer.roles = {
            name: importer.parameter(name, _PAGES if name == "pages" else _PER_TOKEN)
            for name in PAGING
        }
        self.add_caches(importer, program)
        results = importer.run()
        updates = [importer.roles[f"new_{s.name}"] for s in importer.states]
        imported = importer.finish(name, results, updates)
        used = {v.name for n in imported.function.nodes for v in n.inputs}
        kept = tuple(i for i, v in enumerate(taken[1:]) if v.name in used)
        importer.parameters = [taken[0], *(taken[1 + i] for i in kept)]
        importer.parameters += [importer.roles[r] for r in PAGING]
        return _Kind(importer.finish(name, results, updates), kept, prefix)

    def add_caches(self, importer: Importer, program: torch.export.ExportedProgram) -> None:
        """Give the layer a state for the keys and one for the values of its attention."""
        operator = torch.ops.dilu.attention.default
        nodes = program.graph.find_nodes(op="call_function", target=operator)
        if len(nodes) != 1:
            raise UnsupportedError(f"a decoder layer with {len(nodes)} attentions, not 1")
        for name, argument in zip(("keys", "values"), nodes[0].args[1:3], strict=True):
            _, heads, _, width = argument.meta["val"].shape
            t = TensorType(self.dtype, shape_of((_B, PAGE_SIZE, int(heads), int(width))))
            importer.roles[name] = importer.state(name, t)

    def call(self, importer: Importer, run: Run, kind: _Kind, operands: tuple[Value, ...]) -> Value:
        """Emit the call of a run; its states and constants become the function's, stacked."""
        body = kind.imported.function
        op = Call(body, run.count)
        parameters = [operands[0], *(operands[1 + i] for i in kind.invariants)]
        parameters += [importer.roles[r] for r in PAGING]
        states = [importer.state(f"{s.name}_{run.index}", op.stack(s.type)) for s in body.states]
        constants = [self.stacked(importer, run, kind, c, op) for c in body.constants]
        hidden, *updates = importer.builder.add(op, *parameters, *states, *constants)
        self.updates += updates
        return hidden

    def stacked(
        self, importer: Importer, run: Run, kind: _Kind, constant: Value, op: Call
    ) -> Value:
        source = kind.imported.sources[constant.name]
        layers = range(run.first, run.first + run.count)
        names = [self.layer_prefix(i) + source.parameter for i in layers]
        value = importer.constant(
            f"layers_{run.index}.{constant.name}",
            op.stack(constant.type),
            Source(names[0], source.scales),
        )
        self.weights[value.name] = self.weight(names, source, stacked=True)
        return value
