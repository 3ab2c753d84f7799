"""What the user of a language model's artifact should know, as the compiler found it.

The manifest keeps the notes themselves, and the sampling that the checkpoint suggests: text is the
likeliest unless another temperature is asked for, so that it is said wherever none is.
"""

from __future__ import annotations

from .artifact.artifact import Artifact


def notes_of(artifact: Artifact, *, sampled: bool = False) -> list[str]:
    """Return the notes; `sampled` where the user chose a temperature."""
    model = artifact.manifest["language_model"] or {}
    found = list(model.get("notes", ()))
    sampling = model.get("sampling") or {}
    if sampling and not sampled:
        options = " ".join(f"--{k.replace('_', '-')} {v:g}" for k, v in sampling.items())
        found.append(
            "the checkpoint suggests tokens drawn at random, and here the likeliest are taken; "
            f"to follow it, run with {options}"
        )
    return found
