"""Plans → C: a function of every plan, run by all threads alike, with barriers between kernels.

A plan's function takes the sizes, the addresses of what its caller hands over, and an arena: its
slots first, then a region for the functions it calls. Kernels and plans whose text is the same
are emitted once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ...ir.dtypes import BF16
from ...ir.mesh import AXES
from ...ir.types import Dim, symbols
from ..kernel_ir import CallPlan, CollectivePlan, Kernel, Launch, Place, Plan, RoutedPlan, Stacked
from ..names import kernel_name, plan_name
from .emit_kernel import emit_kernel
from .expressions import emit_index
from .frame import Frame
from .writer import Writer

_ARRAYS = {"parameter": "parameters", "state": "states", "result": "results"}


@dataclass(frozen=True)
class EmittedKernel:
    """A kernel as the graph names it, and the function that serves it."""

    name: str
    kind: str
    function: str
    source: str


@dataclass(frozen=True)
class EmittedPlan:
    """`host`: whether it takes the host that speaks with other ranks."""

    name: str
    symbols: tuple[str, ...]
    host: bool = False

    def arguments(self) -> str:
        return "".join(f", {s}" for s in self.symbols)

    def host_argument(self) -> str:
        return ", host" if self.host else ""


@dataclass
class ModuleText:
    """The functions of a module so far, and who has which text already."""

    parts: list[str] = field(default_factory=list)
    kernels: list[EmittedKernel] = field(default_factory=list)
    _frames: dict[str, Frame] = field(default_factory=dict)
    _texts: dict[str, str] = field(default_factory=dict)
    _serving: dict[str, str] = field(default_factory=dict)  # the text of each function
    _plans: dict[str, EmittedPlan] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    def fresh(self, name: str) -> str:
        base, count = name, 1
        while name in self._names:
            name, count = f"{base}_{count}", count + 1
        self._names.add(name)
        return name

    def once(self, text: str, name: str) -> str:
        """Add a text that defines `name`, unless it is there under another name; return that."""
        form = re.sub(rf"\b{name}(?=_scratch\b|_context\b|_epilogue\b|_activation\b|\b)", "@", text)
        if form not in self._texts:
            self._texts[form] = name
            self.parts.append(text)
        return self._texts[form]

    # -- kernels

    def kernel(self, kernel: Kernel) -> Frame:
        wanted = self.fresh(kernel_name(kernel.name))
        text, frame = emit_kernel(kernel, wanted)
        for instance, definition in frame.instances.items():
            if instance not in self._names:
                self._names.add(instance)
                self.parts.append(definition)
        name = self.once(f"/* {kernel.kind} */\n{text}", wanted)
        if name == wanted:
            self._frames[name], self._serving[name] = frame, text
        else:
            self._names.discard(wanted)
        self.kernels.append(EmittedKernel(kernel.name, kernel.kind, name, self._serving[name]))
        return self._frames[name]

    # -- plans

    def plan(self, plan: Plan) -> EmittedPlan:
        """Emit the function of a plan, with everything it needs before it."""
        steps: _Steps = []
        for step in plan.steps:
            if isinstance(step, Launch):
                steps.append((step, self.kernel(step.kernel)))
            elif isinstance(step, CollectivePlan):
                steps.append((step, None))
            else:
                steps.append((step, self.plan(step.plan)))
        wanted = self.fresh(plan_name(plan.name))
        known = _plan_symbols(plan, steps)
        text = "\n".join(
            [_run_text(wanted, plan, steps, known), _bytes_text(wanted, plan, steps, known)]
        )
        name = self.once(f"{text}\n{_scratch_text(wanted, steps, known)}", wanted)
        if name == wanted:
            self._plans[name] = EmittedPlan(name, known, _has_host(steps))
        return self._plans[name]


_Steps = list[
    tuple[Launch, Frame] | tuple[CallPlan | RoutedPlan, EmittedPlan] | tuple[CollectivePlan, None]
]


def _has_host(steps: _Steps) -> bool:
    return any(
        isinstance(step, (RoutedPlan, CollectivePlan))
        or (isinstance(emitted, EmittedPlan) and emitted.host)
        for step, emitted in steps
    )


def _plan_symbols(plan: Plan, steps: _Steps) -> tuple[str, ...]:
    found = set(symbols(plan.slots))
    for step, emitted in steps:
        if isinstance(step, CollectivePlan):
            found.update(symbols([step.rows, step.width]))
        if emitted is not None:
            own = {step.symbol} if isinstance(step, RoutedPlan) else set[str]()
            found.update(set(emitted.symbols) - own)
        if isinstance(step, RoutedPlan):
            found.update(symbols([step.tokens]))
        if isinstance(step, CallPlan):
            found.update(symbols(step.result_sizes))
            found.update(symbols(s.stride for s in (*step.states, *step.constants)))
    return tuple(sorted(found))


def _sizes(known: tuple[str, ...]) -> str:
    return "".join(f", int64_t {s}" for s in known)


# ----------------------------------------------------------------------------- running


def _run_text(name: str, plan: Plan, steps: _Steps, known: tuple[str, ...]) -> str:
    w = Writer()
    with w.block(
        f"DILU_NOINLINE void {name}(dilu_pool* pool, int thread, char* scratch{_sizes(known)},"
        " void* const* parameters, char* const* states, const dilu_constant* constants,"
        f" void* const* results, char* arena{', dilu_host* host' if _has_host(steps) else ''})"
    ):
        w.line("(void)scratch; (void)parameters; (void)states; (void)constants; (void)results;")
        place = "arena"
        for i, size in enumerate(plan.slots):
            w.line(f"char* const slot{i} = {place};")
            place = f"slot{i} + dilu_align({emit_index(size)})"
        w.line(f"char* const rest = {place};")
        w.line("(void)rest;")
        pending = _Pending()
        for step, emitted in steps:
            if isinstance(step, Launch):
                assert isinstance(emitted, Frame)
                pending.before(w, step, emitted)
                w.line(_launch_text(step, emitted))
            elif isinstance(step, CollectivePlan):
                pending.barrier(w)
                _emit_collective(w, step)
            else:
                assert isinstance(emitted, EmittedPlan)
                pending.barrier(w)
                if isinstance(step, CallPlan):
                    _emit_call(w, step, emitted)
                else:
                    _emit_routed(w, step, emitted)
        pending.barrier(w)
    return w.text()


@dataclass
class _Pending:
    """What kernels since the last barrier have read and written."""

    reads: set[Place] = field(default_factory=set)
    writes: set[Place] = field(default_factory=set)
    scratch: bool = False

    def before(self, w: Writer, step: Launch, frame: Frame) -> None:
        """Write a barrier where `step` must wait for a kernel before it, and note `step`."""
        count = len(step.kernel.inputs)
        reads, writes = set(step.arguments[:count]), set(step.arguments[count:])
        if step.kernel.kind == "cache_update":
            writes |= {p for p in reads if p.kind == "state"}
        waits = reads & self.writes or writes & (self.reads | self.writes)
        if waits or (self.scratch and frame.sizes):
            self.barrier(w)
        self.reads |= reads
        self.writes |= writes
        self.scratch |= bool(frame.sizes)

    def barrier(self, w: Writer) -> None:
        if self.writes:
            w.line("dilu_barrier(pool, thread);")
        self.reads, self.writes, self.scratch = set(), set(), False


def _address(place: Place) -> str:
    if place.kind == "slot":
        return f"slot{place.number}"
    return f"{_ARRAYS[place.kind]}[{place.number}]"


def _launch_text(step: Launch, frame: Frame) -> str:
    kernel = frame.kernel
    arguments = list(kernel.symbols)
    buffers = (*kernel.inputs, *kernel.outputs)
    for place, buffer in zip(step.arguments, buffers, strict=True):
        if place.kind == "constant":
            assert buffer.constant
            arguments.append(f"constants[{place.number}]")
        else:
            arguments.append(f"(void*){_address(place)}")
    return f"{frame.name}(pool, thread, scratch{''.join(f', {a}' for a in arguments)});"


# ------------------------------------------------------------------------------- calls


def _emit_call(w: Writer, step: CallPlan, emitted: EmittedPlan) -> None:
    """Emit the runs of a call. Results go to and fro between the call's own buffers and spares,
    so that the last run writes the former."""
    with w.block():
        spare = "rest"
        fed_back = step.times > 1
        for i, size in enumerate(step.result_sizes if fed_back else ()):
            w.line(f"char* const spare{i} = {spare};")
            spare = f"spare{i} + dilu_align({emit_index(size)})"
        w.line(f"char* const inner = {spare};")
        passed = ", ".join(f"(void*){_address(p)}" for p in step.parameters)
        w.line(f"void* passed[] = {{{passed or '0'}}};")
        with w.block(f"for (int64_t run = 0; run < {step.times}; run++)"):
            w.line(f"const int last = ({step.times - 1} - run) % 2 == 0;")
            w.line("(void)last;")
            made = [
                f"last ? (void*){_address(p)} : (void*)spare{i}" if fed_back else _address(p)
                for i, p in enumerate(step.results)
            ]
            w.line(f"void* const made[] = {{{', '.join(made) or '0'}}};")
            states = [_state(s) for s in step.states]
            w.line(f"char* const parts[] = {{{', '.join(states) or '0'}}};")
            constants = [_constant(s) for s in step.constants]
            with w.block("const dilu_constant weights[] =", "};"):
                for constant in constants or ["{0, 0}"]:
                    w.line(f"{constant},")
            w.line(
                f"{emitted.name}(pool, thread, scratch{emitted.arguments()}, passed, parts,"
                f" weights, made, inner{emitted.host_argument()});"
            )
            for i in range(len(step.results)):
                if fed_back:
                    w.line(f"passed[{i}] = made[{i}];")


def _emit_routed(w: Writer, step: RoutedPlan, emitted: EmittedPlan) -> None:
    """Emit the loop over the rows that come from all ranks. The host lends the memory for them."""
    with w.block():
        fields = (
            emit_index(step.tokens), step.choices, step.width, step.dtype.itemsize,
            step.made.itemsize, step.ranks, step.slots, step.capacity, _address(step.x),
            _address(step.indices),
        )  # fmt: skip
        placement = f"dilu_constant_data({_constant(Stacked(step.placement))})"
        w.line(
            f"dilu_routed routed = {{{', '.join(map(str, fields))}, {placement},"
            f" {_address(step.result)}, 0, 0, 0}};"
        )
        constants = [_constant(Stacked(c)) for c in step.constants] or ["{0, 0}"]
        w.line(f"const dilu_constant weights[] = {{{', '.join(constants)}}};")
        rows = step.symbol
        with w.block("for (;;)"):
            w.line(f"const int64_t {rows} = dilu_host_next(host, pool, thread, &routed);")
            w.line(f"if ({rows} < 0) break;")
            w.line("void* passed[] = {host->lent.rows, host->lent.slots};")
            w.line("void* const made[] = {host->lent.made};")
            w.line(
                f"if ({rows} > 0) {emitted.name}(pool, thread, scratch{emitted.arguments()},"
                " passed, 0, weights, made, rest);"
            )


def _emit_collective(w: Writer, step: CollectivePlan) -> None:
    fields = (
        int(step.kind == "all_gather"), AXES.index(step.axis), step.dtype.itemsize,
        int(step.dtype == BF16), emit_index(step.rows), emit_index(step.width),
        _address(step.x), _address(step.result),
    )  # fmt: skip
    with w.block():
        text = ", ".join(map(str, fields))
        w.line(f"const dilu_collective collective = {{{text}}};")
        w.line("dilu_host_collect(host, pool, thread, &collective);")


def _state(s: Stacked) -> str:
    base = f"(char*){_address(s.place)}"
    return base if s.stride == 0 else f"{base} + run * {emit_index(s.stride, 2)}"


def _constant(s: Stacked) -> str:
    base = f"constants[{s.place.number}]"
    if s.stride == 0 and s.pieces == 0:
        return base
    return f"{{{base}.pieces + run * {s.pieces}, {base}.offset + run * {emit_index(s.stride, 2)}}}"


# ------------------------------------------------------------------------------- sizes


def _bytes_text(name: str, plan: Plan, steps: _Steps, known: tuple[str, ...]) -> str:
    """Return the function that computes the bytes of a plan's arena, without scratch."""
    w = Writer()
    with w.block(f"DILU_NOINLINE int64_t {name}_bytes(int unused{_sizes(known)})"):
        w.line(f"(void)unused;{''.join(f' (void){s};' for s in known)}")
        w.line("int64_t slots = 0, rest = 0;")
        for size in plan.slots:
            w.line(f"slots += dilu_align({emit_index(size)});")
        for step, emitted in steps:
            if isinstance(step, RoutedPlan):
                assert isinstance(emitted, EmittedPlan)
                w.line(f"rest = dilu_larger(rest, {emitted.name}_bytes(0{_most(step, emitted)}));")
            elif isinstance(step, CallPlan):
                assert isinstance(emitted, EmittedPlan)
                spares: tuple[Dim, ...] = step.result_sizes if step.times > 1 else ()
                parts = [f"dilu_align({emit_index(s)})" for s in spares]
                parts.append(f"{emitted.name}_bytes(0{emitted.arguments()})")
                w.line(f"rest = dilu_larger(rest, {' + '.join(parts)});")
        w.line("return slots + rest;")
    return w.text()


def _most(step: RoutedPlan, emitted: EmittedPlan) -> str:
    """Return the sizes of a routed plan's largest run."""
    known = {step.symbol: str(step.capacity)}
    return "".join(f", {known.get(s, s)}" for s in emitted.symbols)


def _scratch_text(name: str, steps: _Steps, known: tuple[str, ...]) -> str:
    """Return the function that computes the bytes of scratch that any kernel of a plan needs."""
    w = Writer()
    with w.block(f"DILU_NOINLINE int64_t {name}_scratch(int threads{_sizes(known)})"):
        w.line(f"(void)threads;{''.join(f' (void){s};' for s in known)}")
        w.line("int64_t most = 0;")
        calls: dict[str, None] = {}
        for step, emitted in steps:
            if isinstance(emitted, EmittedPlan) or (emitted is not None and emitted.sizes):
                sizes = "".join(f", {s}" for s in emitted.symbols)
                if isinstance(step, RoutedPlan):
                    assert isinstance(emitted, EmittedPlan)
                    sizes = _most(step, emitted)
                calls[f"{emitted.name}_scratch(threads{sizes})"] = None
        for call in calls:
            w.line(f"most = dilu_larger(most, {call});")
        w.line("return most;")
    return w.text()
