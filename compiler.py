"""`dilu.compile`: a model in, an artifact out.

    model → frontend/ → captured graph → passes/ → planned graph → codegen/ → modules → packing.py

Invariant: a checkpoint's weights are neither read (beyond headers and fingerprints) nor converted;
nothing is written before the caller saves the artifact.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import DiluError
from .options import Options
from .runtime.artifact.artifact import Artifact
from .runtime.progress import Progress, silent

if TYPE_CHECKING:
    from .codegen.target import Target
    from .frontend.door import ExampleCall
    from .passes.pipeline import ExtraPass


def compile(
    model: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    target: str | Sequence[str] = "cpu",
    passes: Sequence[ExtraPass] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    config_only: bool = False,
    bundle: bool = False,
    max_seq: int | None = None,
    dynamic_shapes: Any = None,
    mesh: str | None = None,
    replicas: int = 0,
    expert_load: str | os.PathLike[str] | None = None,
    cluster: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a model and return the artifact, not saved yet.

    `model` is a `torch.nn.Module` or a function of tensors, an `ExportedProgram` or a .pt2 file of
    one, the directory of a checkpoint, or with `config_only` a config.json. A module needs
    `example_inputs`, a tuple (or a dictionary of keyword inputs), may have `example_kwargs`, and
    for symbolic sizes the `dynamic_shapes` of `torch.export`; the session is called as the module
    is, and plain values among the examples are part of the program. `target` is a name or several,
    `cpu` being the best for this machine. `passes` are added to the pipeline. `dtype` is what a
    language model computes in (f32 unless said), `max_seq` the longest sequence it takes, `bundle`
    copies the weights into the artifact when it is saved. `mesh`, such as `ep=8`, is for as many
    processes, which share out experts (with `replicas` more of the hottest, by `expert_load`, a
    file that `dilu run --record-load` wrote) and sequences; with `cluster`, a YAML file, groups of
    experts that are asked for together stay on a machine. Raises DiluError for whatever cannot be
    compiled.
    """
    options = Options(
        targets=(target,) if isinstance(target, str) else tuple(target),
        passes=tuple(passes or ()),
        dtype=dtype,
        max_seq=max_seq,
        config_only=config_only,
        bundle=bundle,
        mesh=mesh,
        replicas=replicas,
        expert_load=expert_load,
        cluster=cluster,
    )
    from .frontend.door import ExampleCall

    call = ExampleCall(example_inputs, example_kwargs, dynamic_shapes)
    return compile_model(model, options, call, progress=progress or silent)


def compile_model(
    model: Any,
    options: Options,
    call: ExampleCall | None = None,
    *,
    progress: Progress = silent,
) -> Artifact:
    """Compile a model, called as in the example `call`, and return the artifact, not saved yet;
    raise DiluError where that cannot be. This is what `compile` and the command do."""
    progress("look up targets")
    from .frontend import doors
    from .frontend.door import ExampleCall
    from .planner.placing import read_placing

    targets = _targets(options.targets)
    found = doors.find_model(model)
    placing = read_placing(options)
    captured = doors.capture(found, call or ExampleCall(), options, progress)
    from .codegen.generate import generate  # after the errors that take no time
    from .packing import Compiled, pack
    from .passes.pipeline import Sharding, compile_graph

    sharding = None
    if placing is not None:
        placing = placing.for_groups(captured.expert_groups)
        sharding = Sharding(placing.mesh, placing)
    planned, records = compile_graph(
        captured.graph, targets[0], passes=options.passes, sharding=sharding, on_pass=progress
    )
    modules = [generate(planned, target, progress=progress) for target in targets]
    progress("describe weights")
    topology = placing.topology if placing is not None else {}
    return pack(Compiled(captured, planned, records, modules, topology), options)


def _targets(names: Sequence[str]) -> list[Target]:
    """Return the targets, each once; raise DiluError early for one that cannot be compiled for."""
    from .codegen.targets import find_target

    targets = list(dict.fromkeys(find_target(name) for name in names))
    if len({t.native for t in targets}) > 1:
        raise DiluError(
            "these targets compute with different element types and cannot share an artifact: "
            + ", ".join(t.name for t in targets),
            hint="compile an artifact for each",
        )
    if any(t.executable and t.language == "c" for t in targets):
        from .codegen.c.driver import find_compiler

        find_compiler()
    return targets
