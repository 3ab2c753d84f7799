"""The command line: parse, call the API, print.

Invariants: results go to standard output, everything else to standard error; an error is one
message and an exit code (1, or 2 for a wrong command line), with a traceback only for those who
set DILU_DEBUG; what a command does not need is not imported.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import knobs
from .errors import DiluError
from .version import __version__

if TYPE_CHECKING:
    from .runtime.artifact.artifact import Artifact
    from .runtime.progress import Progress
    from .runtime.session import Session
    from .runtime.text.language import TextStream

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE
TERMINATED = 128 + signal.SIGTERM
_SECONDS_WITHOUT_BAR = 0.3

#: Options of a command, in the groups that its help shows, and those that several commands have.
_Processes = partial(typer.Option, rich_help_panel="Several processes")
_Sampling = partial(typer.Option, rich_help_panel="Sampling")
_Place = partial(typer.Option, rich_help_panel="Where it runs")
_Cluster = partial(typer.Option, rich_help_panel="The cluster")
_Work = partial(typer.Option, rich_help_panel="The work")

Verbose = Annotated[bool, typer.Option("-v", help="Say what is done and how long.")]
Replicas = Annotated[
    int, _Processes(help="How many more experts all processes hold, copies of hot ones.")
]
ExpertLoad = Annotated[
    Path | None, _Processes(help="Place experts by this file of dilu run --record-load.")
]
Wire = Annotated[
    str, _Processes(help="How rows travel to experts elsewhere: exact, bf16 or f8e4m3.")
]

app = typer.Typer(
    help="Compile FP8 models and run them at FP8 memory on hardware without FP8.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        app(arguments, prog_name="dilu")
        code = 0
    except SystemExit as stop:
        raise stop from None
    except KeyboardInterrupt:
        code = INTERRUPTED
        _say("interrupted")
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    except Exception as error:
        if knobs.DEBUG.get():
            raise
        code = 1
        _say(error.format() if isinstance(error, DiluError) else _unexpected(error))
    sys.exit(code)


def _unexpected(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return (
        f"error: {type(error).__name__}: {text}\n"
        f"  hint: this is a bug in dilu; set {knobs.DEBUG.name}=1 to see where"
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"dilu {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command("compile")
def compile_command(
    model: Annotated[
        Path, typer.Argument(help="A checkpoint's directory, a config.json or a .pt2 file.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The artifact.", show_default="NAME.dilu")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="What to compile for; may be repeated.", show_default="this machine's cpu"
        ),
    ] = None,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="Copy the weights into the artifact.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="What to compute in: f32 or bf16.")] = None,
    max_seq: Annotated[
        int | None,
        typer.Option(help="The longest sequence, in tokens.", show_default="the model's"),
    ] = None,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Compile without weights.")
    ] = False,
    mesh: Annotated[
        str | None,
        _Processes(help="Divide the model: experts (ep=8), heads and columns (ep=4,tp=2)."),
    ] = None,
    replicas: Replicas = 0,
    expert_load: ExpertLoad = None,
    cluster: Annotated[
        Path | None, _Processes(help="Keep groups of experts on a machine of this cluster (YAML).")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Compile a model into an artifact."""
    import time
    import warnings

    from .compiler import compile_model
    from .options import Options

    if not knobs.DEBUG.get():  # what libraries say of each other is not for the user
        warnings.simplefilter("ignore")
    started = time.perf_counter()
    options = Options(
        targets=tuple(target or ("cpu",)),
        dtype=dtype,
        max_seq=max_seq,
        config_only=config_only,
        bundle=bundle,
        mesh=mesh,
        replicas=replicas,
        expert_load=expert_load,
        cluster=cluster,
    )
    with _progress(verbose) as progress:
        artifact = compile_model(model, options, progress=progress)
        place = artifact.save(output or Path(f"{artifact.name}.dilu"), progress=progress)
    _say_notes(artifact)
    kernels = {name: len(table["kernels"]) for name, table in artifact.targets.items()}
    made = ", ".join(f"{n} kernels for {name}" for name, n in kernels.items())
    print(f"{_shown(place)}: {made}, in {time.perf_counter() - started:.1f} s")


@app.command()
def run(
    artifact: Annotated[Path, typer.Argument(help="The artifact of a language model.")],
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads standard input.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message in a conversation.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="How many tokens to make at most.")] = 256,
    temperature: Annotated[
        float, _Sampling(help="0 takes the likeliest token, more is more varied.")
    ] = 0.0,
    top_k: Annotated[int | None, _Sampling(help="Choose among the k likeliest.")] = None,
    top_p: Annotated[
        float | None, _Sampling(help="Choose among the likeliest that make up p.")
    ] = None,
    seed: Annotated[int | None, _Sampling(help="Makes the choices repeatable.")] = None,
    threads: Annotated[int | None, _Place(show_default="the number of cores")] = None,
    target: Annotated[str | None, _Place(show_default="the best for here")] = None,
    device: Annotated[
        str | None,
        _Place(help="cpu, cuda, cuda:1, hip …", show_default="a GPU that a target fits, else cpu"),
    ] = None,
    wire: Wire = "exact",
    record_load: Annotated[
        Path | None,
        _Processes(help="Write how often tokens chose each expert to this file."),
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", help="Say what is loaded and how.")] = False,
) -> None:
    """Generate text: it goes to standard output, the statistics follow on standard error.

    An artifact compiled with --mesh is run by as many processes:
    torchrun --nproc-per-node 8 -m dilu run m.dilu --prompt "…"
    """
    from .runtime.session import load

    with _progress(verbose) as progress:
        session = load(
            artifact, threads=threads, target=target, device=device, wire=wire, progress=progress
        )
    with session:
        if verbose:
            _say(f"{session.target}, {session.place}: {session.target_reason}")
        if session.ranks is None or session.ranks.rank == 0:
            _say_notes(session.artifact, sampled=temperature > 0)
        text = sys.stdin.read() if prompt == "-" else prompt
        stream = session.language.stream(
            text,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            chat=chat,
        )
        first = session.ranks is None or session.ranks.rank == 0
        code = _print_stream(stream, session) if first else _follow(stream)
        if record_load is not None:
            loads = session.expert_load()
            if first:
                from .planner.expert_load import load_text
                from .runtime.artifact.replace import write_file

                write_file(record_load, load_text(loads).encode())
        raise typer.Exit(code)


def _say_notes(artifact: Artifact, *, sampled: bool = False) -> None:
    """Say what the user of an artifact should know."""
    from .runtime.notes import notes_of

    for note in notes_of(artifact, sampled=sampled):
        _say(f"note: {note}")


def _follow(stream: TextStream) -> int:
    """Take part in a run whose text another process prints."""
    for _ in stream:
        pass
    return 0


def _print_stream(stream: TextStream, session: Session) -> int:
    """Print the pieces as they come, then the statistics; return the exit code."""
    code = 0
    try:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    stream.close()
    print(flush=True)
    from .runtime.describe import describe_run

    note = "interrupted; " if code else ""
    _say(note + describe_run(stream.statistics, session))
    return code


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="A checkpoint's directory or a config.json.")],
    cluster: Annotated[
        Path | None, _Cluster(help="A cluster as YAML.", show_default="this machine, measured")
    ] = None,
    measure: Annotated[
        Path | None, _Cluster(help="Measure this machine first, and write it to this YAML file.")
    ] = None,
    processes: Annotated[
        int, _Cluster(help="How many ranks share this machine, when it is measured.")
    ] = 1,
    batch: Annotated[int, _Work(help="How many sequences are worked on at once.")] = 32,
    context: Annotated[int, _Work(help="Tokens of a sequence.")] = 4096,
    prompt: Annotated[
        int | None, _Work(help="Tokens of a prompt.", show_default="1024, or the context")
    ] = None,
    dtype: Annotated[
        str | None, _Work(help="f32 or bf16.", show_default="bf16 where the device has it")
    ] = None,
    mesh: Annotated[
        str | None, _Processes(help="Simulate this mesh alone.", show_default="all meshes")
    ] = None,
    replicas: Replicas = 0,
    expert_load: ExpertLoad = None,
    wire: Wire = "exact",
    picture: Annotated[
        Path | None, typer.Option(help="Draw it to this file (.svg, .png or .pdf).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    verbose: Verbose = False,
) -> None:
    """Say whether a model fits a cluster, on which mesh, how fast, and what limits it.

    Ends with 1 where it does not fit.
    """
    import warnings

    from .planner.picture import check_picture, draw
    from .planner.report import plan_data, plan_text
    from .planner.simulate import Demand
    from .planning import plan as make_plan
    from .runtime.artifact.replace import write_file

    if not knobs.DEBUG.get():
        warnings.simplefilter("ignore")
    if picture is not None:
        check_picture(picture)
    given = min(1024, max(context, 1)) if prompt is None else prompt
    demand = Demand(batch, context, given, wire)
    if measure is not None and cluster is not None:
        raise DiluError(
            "--measure is of this machine, and --cluster names another", hint="give one of them"
        )
    with _progress(verbose) as progress:
        place: Any = cluster
        if cluster is None:
            from .calibrate import measure_machine
            from .planner.cluster import cluster_text

            place = measure_machine(processes=processes, dtype=dtype or "f32", progress=progress)
            if measure is not None:
                write_file(measure, cluster_text(place).encode())
        found = make_plan(
            model,
            place,
            mesh=mesh,
            dtype=dtype,
            demand=demand,
            replicas=replicas,
            expert_load=expert_load,
            progress=progress,
        )
    if as_json:
        import json

        print(json.dumps(plan_data(found), indent=1))
    else:
        print(plan_text(found))
    if picture is not None:
        draw(found, picture)
    raise typer.Exit(0 if found.best is not None else 1)


@app.command()
def rebalance(
    artifact: Annotated[Path, typer.Argument(help="An artifact compiled with --mesh.")],
    expert_load: Annotated[
        Path, typer.Option(help="What dilu run --record-load wrote: tokens of every expert.")
    ],
) -> None:
    """Place experts anew by the load that was measured; no weights are written."""
    from .planner.rebalance import rebalance as place_anew

    found = place_anew(artifact, expert_load)
    print(
        f"{_shown(artifact)}: the busiest rank had {found['before']:.3f} times the mean load, "
        f"and has {found['after']:.3f} now"
    )


@app.command()
def inspect(
    artifact: Annotated[Path, typer.Argument(help="An artifact.")],
    stage: Annotated[str | None, typer.Option(help="Print the IR of this stage.")] = None,
    kernel: Annotated[str | None, typer.Option(help="Print the source of this kernel.")] = None,
    ir: Annotated[bool, typer.Option("--ir", help="Print that kernel's IR instead.")] = False,
    target: Annotated[str | None, typer.Option(help="The target that --kernel is for.")] = None,
) -> None:
    """Show what an artifact holds."""
    from .runtime import describe
    from .runtime.artifact.artifact import Artifact

    opened = Artifact.open(artifact)
    if ir and kernel is None:
        raise DiluError("--ir prints the IR of a kernel", hint="name it with --kernel")
    if stage is None and kernel is None:
        print(describe.describe_artifact(opened))
    if stage is not None:
        sys.stdout.write(describe.stage_text(opened, stage))
    if kernel is not None and not ir:
        sys.stdout.write(describe.kernel_text(opened, kernel, target))
    elif kernel is not None:
        from .codegen.kernels_again import kernel_ir

        chosen, found = describe.find_kernel(opened, kernel, target)
        grids = {name: entry["grid"] for name, entry in opened.manifest["constants"].items()}
        planned = describe.stage_text(opened, "planned")
        sys.stdout.write(kernel_ir(planned, grids, chosen, found["name"]))


@app.command()
def tune(
    artifact: Annotated[Path, typer.Argument(help="An artifact with a target for a GPU.")],
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, hip …", show_default="one that a target fits")
    ] = None,
    target: Annotated[str | None, typer.Option(show_default="the best for the device")] = None,
    verbose: Verbose = False,
) -> None:
    """Measure the variants of kernels on a device; the fastest are used from then on."""
    from .runtime.session import load
    from .runtime.tune import describe_tuning, tune

    with _progress(verbose) as progress:
        session = load(artifact, device=device, target=target, progress=progress)
        with session:
            timings, file = tune(session, progress=progress)
    print(describe_tuning(timings))
    _say(f"kept in {_shown(file)}")


@app.command()
def targets() -> None:
    """List the targets that can be compiled for, and the devices that are here."""
    from .codegen.targets import TARGETS, host_target, other_targets
    from .codegen.triton.installations import describe_installation
    from .runtime.describe import describe_devices

    here = host_target()
    print("targets that can be compiled for")
    for known in TARGETS:
        note = f"needs {', '.join(known.requires)}" if known.requires else ""
        if known.gpu is not None:
            note = describe_installation(known)
        print(f"  {known.name:<18}{'this machine: cpu' if known == here else note}".rstrip())
    for name in other_targets():
        print(f"  {name:<18}from another package")
    print(f"\n{describe_devices()}")


def _say(text: str) -> None:
    """Write a line to standard error."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def _shown(path: Path) -> str:
    """Return a path as short as it can be written here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


@contextmanager
def _progress(verbose: bool) -> Generator[Progress]:
    """Yield a progress function: a bar on a terminal, lines with -v, else nothing."""
    if verbose:
        with _lines() as progress:
            yield progress
    elif not sys.stderr.isatty():
        from .runtime.progress import silent

        yield silent
    else:
        with _bar() as progress:
            yield progress


@contextmanager
def _lines() -> Generator[Progress]:
    """Yield a progress function that prints every step when it is over, with its time."""
    import time

    step: list[Any] = ["", time.perf_counter()]

    def report(text: str, done: int = 0, total: int = 0) -> None:
        now = time.perf_counter()
        if text != step[0]:
            if step[0]:
                _say(f"{now - step[1]:8.2f} s  {step[0]}")
            step[:] = [text, now]

    try:
        yield report
    finally:
        report("")


@contextmanager
def _bar() -> Generator[Progress]:
    """Yield a progress function that draws on the terminal and leaves nothing behind.

    The library that draws is only loaded once something takes long enough to be worth a bar.
    """
    import time

    started, bars = time.perf_counter(), []

    def report(text: str, done: int = 0, total: int = 0) -> None:
        if not bars:
            if time.perf_counter() - started < _SECONDS_WITHOUT_BAR and text != "load the compiler":
                return
            bars.append(_make_bar())
            bars[0].start()
            bars[0].add_task(text)
        bars[0].update(bars[0].task_ids[0], description=text, completed=done, total=total or None)

    try:
        yield report
    finally:
        if bars:
            bars[0].stop()


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
