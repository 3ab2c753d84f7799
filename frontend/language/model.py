"""Models of transformers, built without weights, and what their code raises told as it is.

A model is built on fake tensors, so that its size costs nothing.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import DiluError, Loc, UnsupportedError
from .configuration import Configuration, one_line
from .interfaces import NAME, register

_OURS = tuple(str(Path(__file__).parent.parent.parent / room) for room in ("frontend", "ir"))


def build_model(found: Configuration, dtype: torch.dtype) -> tuple[Any, FakeTensorMode]:
    """Return the model of a configuration on fake tensors; raise DiluError when there is none."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    register()
    alone = found.architecture
    made = AutoModelForCausalLM.from_config if alone is None else alone._from_config
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _own_attention(found.kind), telling(f"build the model of model_type {found.kind!r}"):
        with mode, no_init_weights():
            model = made(found.config, dtype=dtype, attn_implementation=NAME)
            model.set_experts_implementation(NAME)
            model.tie_weights()
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if any(p in name for p in model._keep_in_fp32_modules_strict or ()):
                    tensor.data = tensor.data.float()
    return model.eval(), mode


@contextlib.contextmanager
def _own_attention(kind: str) -> Generator[None]:
    """Say so where a model chooses its attention from a table of its own."""
    try:
        yield
    except DiluError as error:
        if isinstance(error.__cause__, KeyError) and error.__cause__.args == (NAME,):
            raise UnsupportedError(
                f"model_type {kind!r} has an attention of its own, which is not reached through "
                "transformers' attention interface",
                error.loc,
            ) from error
        raise


@contextlib.contextmanager
def telling(what: str) -> Generator[None]:
    """Turn what a library's code raises inside into a DiluError with its line.

    An error of dilu's own code stays what it is: whose it is says the innermost of its frames that
    is dilu's or transformers'.
    """
    try:
        yield
    except DiluError:
        raise
    except Exception as error:
        import transformers

        theirs = str(Path(str(transformers.__file__)).parent)
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename.startswith((theirs, *_OURS)) and frame.filename != __file__
        ]
        if not frames or not frames[-1].filename.startswith(theirs):
            raise
        raise DiluError(
            f"cannot {what}: {one_line(error)}", Loc(frames[-1].filename, frames[-1].lineno)
        ) from error
