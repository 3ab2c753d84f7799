"""What a door is by which models come in, and what comes in by any of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import DiluError
from ..ir.graph import Graph
from ..options import Options
from ..runtime.artifact.manifest import LanguageModelEntry
from ..runtime.progress import Progress


@dataclass(frozen=True)
class ExampleCall:
    """How a module is called, by an example: a tuple of inputs or a mapping of keyword inputs, more
    keyword inputs, and the `dynamic_shapes` of `torch.export`. Fields that are not given are None.
    """

    example_inputs: Any = None
    example_kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None


@dataclass(frozen=True)
class Captured:
    """A model that came in: its graph, and what the artifact is to say of it.

    `source` is the path or the name of what was compiled. `folder` is where the files are that
    pieces of weights are in. `language_model` describes what makes tokens, `signature` how `main`
    is called where that is not with its parameters alone; both are plain data for the manifest.
    `files` are the artifact's, such as a tokenizer. `expert_groups`: experts of a group are asked
    for together.
    """

    graph: Graph
    name: str
    source: str
    folder: Path | None = None
    language_model: LanguageModelEntry | None = None
    signature: dict[str, Any] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    expert_groups: int = 1


class Door(Protocol):
    """One kind of model. Importing a door imports no library that capturing needs."""

    def takes(self, model: Any) -> bool:
        """Return whether a model, or the Path of one that exists, is of this kind."""
        ...

    def capture(
        self, model: Any, call: ExampleCall, options: Options, progress: Progress
    ) -> Captured:
        """Return the captured model; raise DiluError where it cannot be captured."""
        ...


def refuse(what_for: str, what: str, **given: Any) -> None:
    """Raise DiluError for an argument that is given and means nothing for this model."""
    for name, value in given.items():
        if value is not None:
            raise DiluError(f"{name} is for {what_for}, and {what}")
