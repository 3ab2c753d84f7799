"""Draw the pictures of the documentation, from the list of passes and from a plan of memory.

    python docs/pictures/draw.py [--folder docs/pictures]

stages.svg       the stages a graph goes through: its passes, and what is true after each
memory_plan.svg  the arena of a layer of the bundled model: which value lies where, and when

The same code draws the same bytes.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from dilu.codegen.targets import BASELINE
from dilu.frontend.language.language_model import capture_language_model
from dilu.ir.graph import Function, Graph
from dilu.ir.mesh import parse_mesh
from dilu.ir.stages import STAGES
from dilu.ir.types import evaluate
from dilu.passes.manager import pass_name
from dilu.passes.pipeline import Sharding, compile_graph, pipeline
from dilu.passes.plan_memory import lives, storage

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "examples" / "stdlib-moe"
# Told apart by those who see few colours too (Okabe and Ito's palette).
COLOURS = ("#0072B2", "#009E73", "#56B4E9", "#999999", "#E69F00", "#D55E00", "#CC79A7", "#F0E442")
TOKENS = 512  # the sizes of the picture are those of a prompt of so many
#: Texts stay texts, names of ids are the same every time, and so is the date: there is none.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "dilu", "font.size": 9}

TRUE: dict[str, str] = {
    "captured": "one op per captured call; weights are bound to places in files",
    "normalized": "dilu's own ops alone; identities, constants and repetitions are folded",
    "legalized": "no float is narrower than the target has: FP8 is u8 codes, decoded by ops",
    "sharded": "only with a mesh: every weight is placed, collectives are explicit",
    "fused": "every node is a kernel region, a call, a collective or a view",
    "planned": "every value has a place: an arena slot, a result, a state, or another's",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=HERE)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        _save(stages(), folder / "stages.svg")
        _save(memory_plan(planned_layer()), folder / "memory_plan.svg")


def _save(figure: Figure, path: Path) -> None:
    new = path.with_suffix(".new.svg")
    figure.savefig(new, format="svg", metadata={"Date": None, "Creator": None})
    text = "".join(f"{line.rstrip()}\n" for line in new.read_text("utf-8").splitlines())
    new.write_text(text, "utf-8")
    new.replace(path)


# ------------------------------------------------------------------------------ stages


def passes_by_stage() -> dict[str, list[str]]:
    """Return the names of the passes of every stage, from the list itself."""
    sharding = Sharding(parse_mesh("ep=2"), lambda *_: None)  # type: ignore[arg-type,return-value]
    listed = pipeline(BASELINE, sharding)
    return {stage: [pass_name(p) for p in listed.get(stage, [])] for stage in STAGES}


def stages() -> Figure:
    """Draw a box for every stage: its name, the passes that lead to it, and what is true then."""
    figure = Figure(figsize=(9.6, 6.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    found = passes_by_stage()
    axes.set_xlim(0, 100)
    axes.set_ylim(-len(found), 0)
    for number, (stage, names) in enumerate(found.items()):
        top = -number
        box = FancyBboxPatch(
            (27, top - 0.82), 71, 0.64, boxstyle="round,pad=0,rounding_size=0.08",
            mutation_aspect=0.06, facecolor="white", edgecolor=COLOURS[0],
            linestyle="--" if stage == "sharded" else "-",
        )  # fmt: skip
        axes.add_patch(box)
        axes.text(28.2, top - 0.5, stage, va="center", weight="bold", color=COLOURS[0], size=11)
        axes.text(43, top - 0.5, textwrap.fill(TRUE[stage], 78), va="center")
        if names:
            text = textwrap.fill(", ".join(_counted(names)), 32)
            axes.text(25, top - 0.5, text, va="center", ha="right", size=7.5, color="#444444")
        if number:
            start, end = (35, top + 0.18), (35, top - 0.18)
            style = "-|>,head_length=4,head_width=3"
            axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, color=COLOURS[0]))
        else:
            axes.text(
                25, top - 0.5, "torch.export", va="center", ha="right", size=7.5, color="#444444"
            )
    return figure


def _counted(names: list[str]) -> list[str]:
    """Return each name once, with how often it is there."""
    return [f"{n} ×{names.count(n)}" if names.count(n) > 1 else n for n in dict.fromkeys(names)]


# -------------------------------------------------------------------------- memory plan


def planned_layer() -> Function:
    """Return the planned first layer of the bundled model."""
    captured, _ = capture_language_model(MODEL)
    graph: Graph = compile_graph(captured, BASELINE)[0]
    calls = [node for node in graph.function("main").nodes if node.op.name == "call"]
    body: Any = calls[0].op
    return body.body


def memory_plan(function: Function) -> Figure:
    """Draw the arena over time: a row for every slot, a bar for every value in it."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes = figure.subplots()
    sizes = {"T": TOKENS}
    span = {life.value.name: life for life in lives(function)}
    home = storage(function)
    types = {v.name: v.type for node in function.nodes for v in node.outputs}
    base, ticks = 0.0, []
    for number, slot in enumerate(function.arena):
        height = evaluate(slot.size, sizes) / 1000
        axes.axhspan(base, base + height, facecolor=COLOURS[number % 2 * 3], alpha=0.08)
        ticks.append((base + height / 2, f"slot {number}\n{slot.size} bytes"))
        for name in slot.values:
            life = span[home[name].name]
            used = evaluate(types[name].nbytes, sizes) / 1000
            begin, length = life.first - 0.5, life.last - life.first + 1
            colour = COLOURS[life.first % len(COLOURS)]
            axes.barh(
                base, length, used, begin, align="edge", color=colour, alpha=0.75, edgecolor="white"
            )
            axes.text(begin + length / 2, base + used / 2, name, ha="center", va="center", size=7)
        base += height
    kernels = [_label(node) for node in function.nodes]
    axes.set_xticks(range(len(kernels)), kernels, rotation=40, ha="right", size=7)
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
    axes.set_ylim(0, base)
    axes.set_xlim(-0.6, len(kernels) - 0.4)
    total = sum(evaluate(types[name].nbytes, sizes) for s in function.arena for name in s.values)
    axes.set_title(
        f"@{function.name}, T = {TOKENS}: an arena of {base:,.0f} kB, where all values together"
        f" have {total / 1000:,.0f} kB",
        size=9,
    )
    return figure


def _label(node: Any) -> str:
    """Return what a node does: the name of its kernel without the function's."""
    if node.op.name != "kernel":
        return node.op.name
    return node.op.body.name.split("_", 3)[-1]


if __name__ == "__main__":
    main()
