"""How torch's operators fare, sample by sample, as a table that a later run can be compared with.

    python tests/operator_sweep.py FILE.json [--samples N] [--dtype NAME] [NAME…]

Of every operator, or of those named, N samples (16 unless said) spread over all of them. Operators
that the file has are not looked at again, so that a run may be stopped; a name that is given is. An
operator that is not supported is left after a quarter of its samples. At the end stands which of
them fare otherwise than in `tests/operators_of_torch.json`, the verdicts of samples in float32.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import operators
import torch

#: Of an operator, in seconds of this process; what takes longer counts as an internal error.
_PATIENCE = 240
#: The worst of an operator's samples says how it fares.
_WORST_FIRST = ("wrong", "internal", "refused", "missing", "uncaptured", "right")

KNOWN = Path(__file__).with_name("operators_of_torch.json")

Row = dict[str, Any]


def verdict(counts: dict[str, int]) -> str:
    """Return how an operator fares: `right`, `partly` (some samples are refused), `refused`,
    `uncaptured` by torch, `none` (torch has no such samples), `internal` or `wrong`."""
    worst = next((k for k in _WORST_FIRST if counts.get(k)), "none")
    worst = "refused" if worst == "missing" else worst
    return "partly" if worst in ("refused", "uncaptured") and counts.get("right") else worst


def spread(parts: Sequence[operators.Sample], most: int) -> list[operators.Sample]:
    """Return at most so many of the samples, the first among them, evenly spread."""
    if len(parts) <= most:
        return list(parts)
    return [parts[i * len(parts) // most] for i in range(most)]


def row(operator: Any, most: int, dtype: torch.dtype) -> Row:
    """Return an operator's row: its verdict, the numbers of outcomes, what was said of each."""
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, _PATIENCE)
    try:
        parts = spread([p for p in operators.samples(operator, dtype) if p.is_valid], most)
        found = operators.outcomes(parts)
    except AssertionError as error:  # of torch's: it makes samples on GPUs alone
        return {"verdict": "none", "counts": {}, "said": [["none", str(error)]]}
    except _TooLong as error:
        return {
            "verdict": "internal",
            "counts": {"internal": 1},
            "said": [["internal", str(error)]],
        }
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    counts = dict(Counter(o.kind for o in found))
    said = dict.fromkeys((o.kind, o.text) for o in found if o.kind != "right")
    return {"verdict": verdict(counts), "counts": counts, "said": [list(pair) for pair in said]}


class _TooLong(BaseException):
    """An operator's samples take too long; no `except Exception` catches it."""


def _too_long(_: int, __: FrameType | None) -> None:
    raise _TooLong(f"not done after {_PATIENCE} s")


def changes(rows: dict[str, Row]) -> list[str]:
    """Return the operators that fare otherwise than they did, and how."""
    known: dict[str, str] = json.loads(KNOWN.read_text())
    return [
        f"{name}: {row['verdict']}, not {known.get(name)}"
        for name, row in rows.items()
        if row["verdict"] != known.get(name)
    ]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("names", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    rows: dict[str, Row] = json.loads(given.file.read_text()) if given.file.exists() else {}
    for name, operator in operators.operators().items():
        wanted = operator.name in given.names or name in given.names
        if wanted if given.names else name not in rows:
            rows[name] = row(operator, given.samples, getattr(torch, given.dtype))
            print(name, rows[name]["verdict"], rows[name]["counts"], flush=True)
            for kind, text in rows[name]["said"]:
                print("   ", kind, text)
            given.file.write_text(json.dumps(rows, indent=1))
    print(dict(Counter(r["verdict"] for r in rows.values())))
    print("\n".join(changes(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
