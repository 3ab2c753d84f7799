"""A loaded artifact: its functions as Python callables, its weights, its states.

    session = load("m.dilu")
    y = session(x)

Invariants: nothing is loaded that does not fit, was changed or cannot run here; calls of one
session run one at a time; states (caches) are the session's and outlive a call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import DiluError
from . import machine
from .artifact.artifact import Artifact
from .artifact.manifest import LanguageModelEntry
from .artifact.weights import require_bound, require_memory
from .call.batch import PREFILL_TOKENS, pages_for
from .call.function import Function
from .choice import Choice
from .engine import Engine
from .progress import Progress, silent
from .targets import choose_target

#: Tokens that a cache must have room for, or a language model is not loaded.
NOMINAL_TOKENS = 2048

T = TypeVar("T")

if TYPE_CHECKING:
    import numpy as np

    from .gpu.device import Device
    from .mesh.host import Host
    from .mesh.ranks import Ranks
    from .text.language import LanguageModel


def load(
    path: str | os.PathLike[str] | Artifact,
    *,
    threads: int | None = None,
    target: str | None = None,
    device: str | Device | None = None,
    wire: str = "exact",
    progress: Progress = silent,
) -> Session:
    """Open an artifact, check it, map its weights and return it ready to run.

    `threads` is the number of cores unless it or DILU_THREADS says otherwise; `target` is the
    best of the artifact's that this machine can run, on a GPU where one of them fits it. `device`
    says where to run: `cpu`, `cuda`, `cuda:1`, `hip`, or an open device. `wire` says how rows
    travel to the experts of other processes: `exact`; `bf16`; or `f8e4m3`, with a scale for each
    row, and back in bf16. Raises DiluError for an artifact or weights that were changed, a
    machine that cannot run it, or too little memory (before loading).
    """
    if threads is not None and threads < 1:
        raise DiluError(f"cannot run with {threads} threads", hint="threads is at least 1")
    artifact = path if isinstance(path, Artifact) else Artifact.open(path)
    return Session(
        artifact, threads=threads, target=target, device=device, wire=wire, progress=progress
    )


class Session:
    """The functions of an artifact. Calling the session calls its first function."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        target: str | None = None,
        device: str | Device | None = None,
        wire: str = "exact",
        progress: Progress = silent,
    ) -> None:
        _check_wire(artifact, wire)
        self.ranks = _connected(artifact, wire)
        bound: str | None = None
        if self.ranks is not None:
            from .mesh.shard import local_part

            bound = machine.take_share()
            artifact = local_part(artifact, self.ranks.coordinates)
        self.artifact = artifact
        self.threads = threads or machine.default_threads()
        choice = choose_target(artifact, target, device)
        self.target = choice.target
        self.lock = threading.RLock()
        self._language: LanguageModel | None = None
        self._closed = True  # until all is loaded
        try:
            require_bound(artifact)
            self.functions: dict[str, Function] = {
                entry["name"]: Function(self, index, entry)
                for index, entry in enumerate(artifact.manifest["functions"])
            }
            self.host = _host(self.ranks, wire)
            groups, how = _meeting(self.host, choice)
            self._engine = _engine(artifact, choice, self.threads, self.host, groups)
        except BaseException:
            if choice.device is not None:
                choice.device.close()
            raise
        self._closed = False
        try:
            self.together(lambda: self._load(progress))
        except BaseException:
            self.close()
            raise
        self.target_reason = "; ".join(
            text for text in (choice.reason, *self._engine.notes, bound, how) if text
        )

    def _load(self, progress: Progress) -> None:
        self.require_memory(self._needed_memory())
        self._engine.load(progress)

    def together(self, call: Callable[[], T]) -> T:
        """Return what `call` returns; of several ranks, all raise the DiluError of one."""
        return call() if self.ranks is None else self.ranks.agreed(call)

    def expert_load(self) -> dict[str, np.ndarray]:
        """Return how often tokens chose each expert so far, i64[layers, experts] by the name of
        the layers, on all ranks together; every rank has to call it."""
        import numpy as np

        blocks, own = self.together(self._own_load)
        everyones = [own]
        if self.ranks is not None:
            # Neighbours along tp, the innermost axis, count the same tokens.
            everyones = self.ranks.gather([load.tolist() for load in own])
            everyones = everyones[:: self.ranks.mesh["tp"]]
        layers: dict[str, list[np.ndarray]] = {}
        for block, loads in zip(blocks, zip(*everyones, strict=True), strict=False):
            layers.setdefault(block["placement"], []).append(np.array(loads, np.int64).sum(0))
        return {name: np.stack(rows) for name, rows in layers.items()}

    def _own_load(self) -> tuple[Sequence[dict[str, Any]], list[np.ndarray]]:
        """Return the blocks of experts as they run, and how often each expert of them was chosen by
        this rank's tokens."""
        counts, blocks = self._engine.expert_counts, self.artifact.manifest.get("experts", ())
        if self.host is not None and any(block["routed"] for block in blocks):
            return blocks, self.host.exchange.load
        if not blocks:
            raise DiluError(
                f"{self.artifact.name} has no experts whose load could be counted",
                hint="record the load of a mixture-of-experts model, compiled by this dilu",
            )
        if counts is None:
            raise DiluError(
                f"the load of experts is not counted on {self.target}",
                hint="record it on a CPU, with --device cpu and a target for it",
            )
        import numpy as np

        return blocks, np.split(counts, np.cumsum([b["experts"] for b in blocks])[:-1])

    def function(self, name: str) -> Function:
        """Return a function of the artifact by its name."""
        if name not in self.functions:
            hint = f"the artifact has: {', '.join(self.functions)}"
            raise DiluError(f"there is no function {name!r}", hint=hint)
        return self.functions[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the artifact's first function as the model itself is called."""
        return next(iter(self.functions.values()))(*args, **kwargs)

    @property
    def engine(self) -> Engine:
        """What runs the functions; raises DiluError where the session is closed."""
        if self._closed:
            raise DiluError("the session is closed")
        return self._engine

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights that the functions read."""
        return self._engine.weight_bytes

    @property
    def place(self) -> str:
        """What runs the functions, for people: so many threads, or a device."""
        return self._engine.text

    def require_memory(self, needed: dict[str, int]) -> None:
        """Raise DiluError where `needed` (what for → bytes) is more than the device has free.

        Weights and working memory are to be counted, whether they are loaded or not.
        """
        require_memory(needed, self._engine.available_memory(), self._engine.where)

    @property
    def language(self) -> LanguageModel:
        """The token loop; raises DiluError where the artifact is not a language model."""
        from .text.language import LanguageModel  # only here: other modules need no tokenizer

        with self.lock:
            if self._language is None:
                self._language = LanguageModel(self)
            return self._language

    def generate(self, prompt: Any, **options: Any) -> Any:
        """Return the text that continues a prompt, or a list of texts for a list of prompts.

        Options are those of `LanguageModel.generate`: `max_tokens=64`, `temperature=0.0`,
        `top_k`, `top_p`, `seed`, `stop`, `chat=False`.
        """
        return self.language.generate(prompt, **options)

    def stream(self, prompt: Any, **options: Any) -> Iterator[str]:
        """Yield the text that continues a prompt piece by piece; options as for `generate`."""
        return self.language.stream(prompt, **options)

    def _needed_memory(self) -> dict[str, int]:
        """Return the bytes that the smallest useful call needs, what for → how many."""
        nominal = nominal_sizes(self.artifact.manifest["language_model"])
        needed = {"weights": self.weight_bytes, "cache": 0, "working memory": 0}
        for function in self.functions.values():
            sizes = {name: nominal.get(name, 1) for name in function.all_symbols}
            needed["cache"] += function.state_bytes(sizes)
            needed["working memory"] += function.arena_bytes(sizes)
        return needed

    def close(self) -> None:
        """Stop the threads or free the device, unmap the weights and free the states."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            for function in self.functions.values():
                function.release()
            self._engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()


def nominal_sizes(language_model: LanguageModelEntry | None) -> dict[str, int]:
    """Return the sizes that a language model must at least have memory for: a prefill chunk and a
    cache for `NOMINAL_TOKENS`."""
    if language_model is None:
        return {}
    tokens = min(NOMINAL_TOKENS, language_model["max_positions"])
    pages = pages_for(tokens, language_model["page_size"])
    return {"T": min(PREFILL_TOKENS, tokens), "S": 1, "R": 1, "P": pages, "B": pages}


def _check_wire(artifact: Artifact, wire: str) -> None:
    from .mesh.wire import check_format

    check_format(wire)
    if wire != "exact" and (artifact.manifest.get("mesh") or {}).get("ep", 1) == 1:
        raise DiluError(
            f"{artifact.name} sends no rows that could travel as {wire}",
            hint="compile it with --mesh ep=2 or more, or run it without --wire",
        )


def _connected(artifact: Artifact, wire: str) -> Ranks | None:
    """Return this process among those that the artifact is for; None where it runs alone."""
    mesh = artifact.manifest.get("mesh")
    if mesh is None or all(size == 1 for size in mesh.values()):
        return None
    from .mesh.ranks import Ranks

    ranks = Ranks(mesh)
    same = "give every machine the same artifact, compiled once and copied"
    ranks.require_equal(artifact.manifest.get("manifest_hash", ""), "artifact", same)
    ranks.require_equal(wire, "format on the wire", "start all of them with the same --wire")
    return ranks


def _host(ranks: Ranks | None, wire: str) -> Host | None:
    """Return what native code asks of other ranks; None where it has nothing to ask."""
    if ranks is None or ranks.mesh["ep"] == ranks.mesh["tp"] == 1:
        return None
    from .mesh.host import Host

    return Host(ranks, wire)


def _meeting(host: Host | None, choice: Choice) -> tuple[Mapping[str, Any], str]:
    """Return what the devices of ranks meet by, and in words how they meet."""
    if host is None:
        return {}, ""
    if choice.device is None:
        return host.ranks.on_devices(None)[0], ""
    from .gpu.meet_on_device import meeting_place

    return host.ranks.on_devices(meeting_place(choice.device))


def _engine(
    artifact: Artifact,
    choice: Choice,
    threads: int,
    host: Host | None,
    groups: Mapping[str, Any],
) -> Engine:
    if choice.device is None:
        from .cpu.engine import CpuEngine

        return CpuEngine(artifact, choice.target, threads, host)
    from .gpu.engine import GpuEngine
    from .gpu.meet_on_device import meetings

    met = meetings(choice.device, host, groups) if host is not None else None
    return GpuEngine(artifact, choice.target, choice.device, text=choice.text, meetings=met)
