"""A kernel's function in C while it is emitted: parameters, scratch space, epilogues before it."""

from __future__ import annotations

import re

from ...ir.types import numel
from ..kernel_ir import Buffer, Experts, Kernel, LoopNest, Matmul
from .expressions import c_type, emit_index, pointer_type
from .writer import Writer


class Frame:
    """Collects what the parts of a kernel need at the head of its function.

    Scratch is laid out in order; the same expressions give its size to the plan.
    """

    def __init__(self, kernel: Kernel, name: str, symbols: tuple[str, ...]) -> None:
        self.kernel = kernel
        self.name = name
        self.symbols = symbols
        self.before = Writer()
        self.sizes: list[str] = []  # bytes of each scratch space
        self._heads: list[str] = []
        self._count = 0
        self._context = False
        self.context_fields: list[tuple[str, str]] = []
        self.instances: dict[str, str] = {}

    def fresh(self, base: str) -> str:
        self._count += 1
        return f"{base}{self._count}_"

    def instance(self, name: str, definition: str) -> str:
        """Ask for a micro-kernel with its constants filled in, once a module; return `name`."""
        self.instances[name] = definition
        return name

    def function(self, what: str) -> str:
        """Return the name of a function that stands before the kernel."""
        return f"{self.name}_{what}"

    # -- arguments

    def parameters(self) -> list[tuple[str, str]]:
        """Return type and name of what the function takes beside the pool, thread and scratch."""
        out = [("int64_t", s) for s in self.symbols]
        for b in self.kernel.inputs:
            if b.constant:
                out.append(("dilu_constant", self.constant(b)))
            else:
                out.append((f"{self._qualifier(b)}{c_type(b.dtype)}* restrict", b.name))
        for b in self.kernel.outputs:
            out.append((f"{c_type(b.dtype)}* restrict", b.name))
        return out

    def _qualifier(self, b: Buffer) -> str:
        return "" if self.kernel.kind == "cache_update" else "const "

    def constant(self, b: Buffer) -> str:
        """Return a buffer as a `dilu_constant`."""
        if not b.constant:
            return f"(dilu_constant){{(const void* const*)&{b.name}, 0}}"
        return b.name if b.pieces else f"constant_{b.name}"

    def pointers(self, w: Writer) -> None:
        """Write the addresses of constants that lie in one piece."""
        for b in self.kernel.inputs:
            if b.constant and not b.pieces:
                w.line(
                    f"const {pointer_type(b)}* const {b.name} ="
                    f" dilu_constant_data({self.constant(b)});"
                )

    # -- scratch

    def space(self, size: str) -> str:
        """Return the name of a shared space of `size` bytes."""
        name = f"space{len(self.sizes)}_"
        place = "scratch"
        if self.sizes:
            place = f"space{len(self.sizes) - 1}_ + dilu_align({self.sizes[-1]})"
        self._heads.append(f"char* const {name} = {place};")
        self.sizes.append(size)
        return name

    def per_thread(self, size: str) -> str:
        """Return C for the address of a space of `size` bytes of each thread's own."""
        return f"{self.space(f'threads * dilu_align({size})')} + thread * dilu_align({size})"

    def scratch_buffers(self) -> None:
        """Lay out the scratch buffers of the kernel, less rows that are packed as they are made."""
        packed = {
            s.a.name
            for s in self.kernel.steps
            if isinstance(s, Experts) or (isinstance(s, Matmul) and s.transpose_b)
            if s.prologue is not None
        }
        for b in self.kernel.scratch:
            if b.name not in packed:
                place = self.space(self._bytes(b))
                kind = c_type(b.dtype)
                self._heads.append(f"{kind}* const {b.name} = ({kind}*){place};")

    def _bytes(self, b: Buffer) -> str:
        return f"{emit_index(numel(b.shape), 2)} * {b.dtype.itemsize}"

    def row_buffers(self, w: Writer, nest: LoopNest) -> None:
        for b in nest.row_buffers:
            own, kind = self.per_thread(self._bytes(b)), c_type(b.dtype)
            w.line(f"{kind}* const {b.name} = ({kind}*)({own});")

    def barrier(self, w: Writer) -> None:
        w.line("dilu_barrier(pool, thread);")

    # -- context of epilogues

    def context(self) -> str:
        """Return C for the address of what an epilogue needs."""
        self._context = True
        return "&context"

    def _fields(self) -> list[tuple[str, str]]:
        """Return type and name of what an epilogue may read or write."""
        out = [("int64_t", s) for s in self.symbols]
        for b in self.kernel.inputs:
            if b.pieces:
                out.append(("dilu_constant", b.name))
            else:
                out.append((f"const {pointer_type(b)}*", b.name))
        for b in self.kernel.outputs:
            out.append((f"{c_type(b.dtype)}*", b.name))
        return out

    def _used(self, text: str) -> list[tuple[str, str]]:
        return [(kind, name) for kind, name in self._fields() if re.search(rf"\b{name}\b", text)]

    def unpack_context(self, w: Writer, body: Writer) -> None:
        """Write the context's type before, and what `body` uses of it as locals."""
        used = self._used(body.text())
        for kind, name in used:
            w.line(f"{kind} const {name} = ((const {self.name}_context*)ctx)->{name};")
        unused = [n for n in ("sums0", "sums1", "ctx") if not re.search(rf"\b{n}\b", body.text())]
        for name in unused:
            if name != "ctx" or not used:
                w.line(f"(void){name};")
        self.context_fields = used

    # -- the whole

    def assemble(self, body: Writer) -> str:
        """Return the text of the kernel: context, epilogues, function, scratch size."""
        w = Writer()
        if self._context:
            with w.block("typedef struct", f"}} {self.name}_context;"):
                for kind, name in self.context_fields or [("char", "nothing")]:
                    w.line(f"{kind} {name};")
            w.line()
            w.append(self.before)
        arguments = "".join(f", {kind} {name}" for kind, name in self.parameters())
        head = (
            f"DILU_NOINLINE void {self.name}(dilu_pool* pool, int thread, char* scratch{arguments})"
        )
        with w.block(head):
            w.line("const int threads = dilu_pool_threads(pool);")
            w.line("(void)threads; (void)scratch;")
            self.pointers(w)
            for line in self._heads:
                w.line(line)
            if self._context:
                fields = ", ".join(f".{n} = {n}" for _, n in self.context_fields) or "0"
                w.line(f"const {self.name}_context context = {{{fields}}};")
            w.append(body)
        if self.sizes:
            sizes = "".join(f", int64_t {s}" for s in self.symbols)
            w.line()
            with w.block(f"DILU_INLINE int64_t {self.name}_scratch(int threads{sizes})"):
                for name in ("threads", *self.symbols):
                    w.line(f"(void){name};")
                w.line(f"return {' + '.join(f'dilu_align({s})' for s in self.sizes)};")
        return w.text()
