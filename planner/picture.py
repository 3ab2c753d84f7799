"""A plan as a picture: where a step's time goes, layer by layer, and how it scales."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DiluError, Loc
from .simulate import PARTS

if TYPE_CHECKING:
    from .plan import Plan

_FORMATS = (".svg", ".png", ".pdf")
# Told apart by those who see few colours too (Okabe and Ito's palette).
_COLOURS = ("#0072B2", "#009E73", "#56B4E9", "#999999", "#E69F00", "#D55E00")


def check_picture(path: Path) -> None:
    """Raise DiluError where no picture can be drawn to a file."""
    if path.suffix not in _FORMATS:
        raise DiluError(
            f"no picture of kind {path.suffix!r}", Loc(str(path)), hint="; ".join(_FORMATS)
        )
    if find_spec("matplotlib") is None:
        raise DiluError(
            "drawing needs matplotlib", Loc(str(path)), hint="pip install 'dilu[picture]'"
        )


def draw(plan: Plan, path: Path) -> None:
    """Draw a plan; the file is written at once or not at all."""
    import io

    from matplotlib.figure import Figure

    from ..runtime.artifact.replace import write_file

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _layers(plan, left)
    _scaling(plan, right)
    figure.suptitle(f"{plan.name} on {plan.cluster.name}")
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=150)
    write_file(path, content.getvalue())


def _layers(plan: Plan, axes: Any) -> None:
    """Bars: the milliseconds of every kind of layer, all of its layers together."""
    if not plan.estimates:
        return
    shown = plan.estimates[0]
    names = [f"{n}\n×{times}" if times > 1 else n for n, times, _ in shown.decode.layers]
    heights = [0.0] * len(names)
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        values = [1e3 * times * parts[part] for _, times, parts in shown.decode.layers]
        axes.bar(names, values, bottom=heights, color=colour, label=part, width=0.6)
        heights = [h + v for h, v in zip(heights, values, strict=True)]
    axes.set_ylabel("ms of a decode step")
    fits = "" if shown.fits else ", which does not fit"
    axes.set_title(f"{shown.mesh}{fits}: {shown.demand.batch:,} sequences", fontsize=10)
    axes.legend(fontsize=8)


def _scaling(plan: Plan, axes: Any) -> None:
    """Tokens per second by devices, with what so many times the fewest would make."""
    points = [(devices, e) for devices, e in plan.scaling if e is not None]
    if len(points) < 2:
        batches = [(e.demand.batch, e.decode_rate) for e in plan.batches]
        axes.plot([b for b, _ in batches], [r for _, r in batches], "o-", color=_COLOURS[0])
        axes.set_xlabel("sequences at once")
    else:
        devices = [d for d, _ in points]
        rates = [e.decode_rate for _, e in points]
        axes.plot(devices, rates, "o-", color=_COLOURS[0], label="the best mesh")
        ideal = [rates[0] * d / devices[0] for d in devices]
        axes.plot(devices, ideal, "--", color=_COLOURS[3], label="in proportion")
        for d, e in points:
            axes.annotate(str(e.mesh), (d, e.decode_rate), fontsize=6, rotation=20)
        axes.set_xlabel("devices")
        axes.legend(fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylabel("tokens/s of all sequences")
    axes.set_title("scaling", fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
