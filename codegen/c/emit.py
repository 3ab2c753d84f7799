"""Program → one self-contained C file: the micro-kernels, the kernels, the plans, the entries."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

from ..kernel_ir import Entry, Program
from ..target import Target
from .emit_plan import EmittedKernel, EmittedPlan, ModuleText
from .expressions import emit_index
from .writer import Writer

#: Where the library ends and what was made for the graph begins.
MARK = "/* ---- generated from the graph "

_EXPORT = '__attribute__((visibility("default")))'
_HEADERS = ("kernels.h", "program.h")
#: The pool's functions are the library's own; the module exports them under the same names.
_EXPORTED = ("dilu_pool_create", "dilu_pool_destroy")


def emit_module(program: Program, target: Target) -> tuple[str, tuple[EmittedKernel, ...]]:
    """Return the text of a module, and its kernels."""
    module = ModuleText()
    plans = [module.plan(entry.plan) for entry in program.entries]
    parts = [
        f"/* Made by dilu for {target.name}. */",
        *(f"#define {name} {name}_" for name in _EXPORTED),
        library_text(target),
        *(f"#undef {name}" for name in _EXPORTED),
        f"{MARK}{'-' * 40} */\n",
        *module.parts,
        _entries(program, plans),
    ]
    return "\n".join(parts), tuple(module.kernels)


def generated_part(source: str) -> str:
    """Return a module's text without the library."""
    return source[source.index(MARK) :]


# ----------------------------------------------------------------------------- library


@cache
def library_text(target: Target) -> str:
    """Return the headers, each once, in the order in which they include each other."""
    seen: set[str] = set()
    return "\n".join(_inlined(name, target, seen) for name in _HEADERS)


def _inlined(name: str, target: Target, seen: set[str]) -> str:
    """Return a header's text with its own includes put in place."""
    if name in seen:
        return ""
    seen.add(name)
    if name.startswith("isa_") and name != target.header:
        return ""
    text = resources.files(__name__.rpartition(".")[0]).joinpath("lib", name).read_text("utf-8")
    return re.sub(
        r'^#include "([\w.]+)"\n', lambda m: _inlined(m[1], target, seen), text, flags=re.MULTILINE
    )


# ----------------------------------------------------------------------------- entries


def _entries(program: Program, plans: list[EmittedPlan]) -> str:
    w = Writer()
    for number, (entry, plan) in enumerate(zip(program.entries, plans, strict=True)):
        _emit_entry(w, number, entry, plan)
    with w.block(
        f"{_EXPORT} int64_t dilu_arena_bytes(int function, const int64_t* sizes, int threads)"
    ):
        w.line("(void)sizes;")
        for number, plan in enumerate(plans):
            sizes = _known(program.entries[number], plan)
            w.line(
                f"if (function == {number}) return dilu_align({plan.name}_bytes(0{sizes})) +"
                f" {plan.name}_scratch(threads{sizes});"
            )
        w.line("return -1;")
    w.line()
    with w.block(f"{_EXPORT} int dilu_run(dilu_pool* pool, int function, const dilu_call* call)"):
        w.line("const int64_t* const sizes = call->sizes;")
        w.line("(void)sizes;")
        w.line("pool->counts = call->counts;")
        for number, entry in enumerate(program.entries):
            work = _with_sizes(emit_index(entry.work, 2), entry)
            with w.block(f"if (function == {number})"):
                run = f"dilu_pool_run(pool, entry_{number}, &(dilu_entry){{call, pool}});"
                w.line(f"if ({work} != 0) {run}")
                w.line("return 0;")
        w.line("return 1;")
    w.line()
    w.line(f"{_EXPORT} dilu_pool* dilu_pool_create(int threads) {{")
    w.line("  return dilu_pool_create_(threads);\n}")
    w.line(f"{_EXPORT} void dilu_pool_destroy(dilu_pool* pool) {{")
    w.line("  dilu_pool_destroy_(pool);\n}")
    return _ENTRY + w.text()


_ENTRY = "typedef struct {\n  const dilu_call* call;\n  dilu_pool* pool;\n} dilu_entry;\n\n"


def _with_sizes(text: str, entry: Entry) -> str:
    for i, symbol in enumerate(entry.symbols):
        text = re.sub(rf"\b{symbol}\b", f"sizes[{i}]", text)
    return text


def _known(entry: Entry, plan: EmittedPlan) -> str:
    return "".join(f", sizes[{entry.symbols.index(s)}]" for s in plan.symbols)


def _emit_entry(w: Writer, number: int, entry: Entry, plan: EmittedPlan) -> None:
    """Emit what every thread does in a run."""
    with w.block(f"static void entry_{number}(void* arg, int thread, int threads)"):
        w.line("const dilu_call* const call = ((dilu_entry*)arg)->call;")
        w.line("dilu_pool* const pool = ((dilu_entry*)arg)->pool;")
        w.line("const int64_t* const sizes = call->sizes;")
        w.line("(void)threads; (void)sizes;")
        count = max(entry.plan.constants, 1)
        w.line(f"dilu_constant constants[{count}];")
        w.line(
            f"for (int i = 0; i < {entry.plan.constants}; i++)"
            " constants[i] = (dilu_constant){call->constants[i], 0};"
        )
        sizes = _known(entry, plan)
        w.line(f"char* const scratch = call->arena + dilu_align({plan.name}_bytes(0{sizes}));")
        w.line(
            f"{plan.name}(pool, thread, scratch{sizes}, call->parameters,"
            " (char* const*)call->states, constants, call->results, call->arena"
            f"{', call->host' if plan.host else ''});"
        )
    w.line()
