"""torch.export, as dilu uses it: in evaluation mode, functional, with errors in the user's words.

Invariant: a module is left as it was, also where exporting fails.
"""

from __future__ import annotations

import contextlib
import functools
import keyword
import logging
import types
import warnings
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch.export import ExportedProgram

from ...errors import DiluError, UnsupportedError
from .decompose import decomposed
from .examples import definition
from .export_error import export_error


def module_of(model: Any) -> torch.nn.Module:
    """Return a module to export: a compiled one's original, a function as one.

    Raises DiluError for scripts, and for modules whose parameters have no shapes yet.
    """
    model = getattr(model, "_orig_mod", model)
    scripts = (torch.jit.ScriptModule, torch.jit.ScriptFunction)
    inner = model.modules() if isinstance(model, torch.nn.Module) else (model,)
    if any(isinstance(each, scripts) for each in inner):
        raise UnsupportedError(
            "a TorchScript module cannot be captured", hint="give the module it was scripted from"
        )
    if not isinstance(model, torch.nn.Module):
        model = _as_module(model)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if torch.nn.parameter.is_lazy(parameter):
            raise DiluError(
                f"the parameter {name!r} has no shape yet: its module is lazy",
                hint="call the module once before compiling it",
            )
    return model


def _as_module(function: Callable[..., Any]) -> torch.nn.Module:
    """Return a module that calls a function, and owns the module whose method it is."""
    module = torch.nn.Module()
    owner = getattr(function, "__self__", None)
    if isinstance(owner, torch.nn.Module):
        module.add_module("owner", owner)
    module.forward = _renamed(function)
    return module


def _renamed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function under the name `forward`: torch notes the lines of those alone."""
    code, owner = getattr(function, "__code__", None), getattr(function, "__self__", None)
    if code is None:
        return function
    inner: Any = getattr(function, "__func__", function)
    made = types.FunctionType(
        code.replace(co_name="forward"),
        inner.__globals__,
        inner.__name__,
        inner.__defaults__,
        inner.__closure__,
    )
    made.__kwdefaults__ = inner.__kwdefaults__
    functools.update_wrapper(made, inner)
    return made if owner is None else types.MethodType(made, owner)


def export(module: torch.nn.Module, inputs: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    """Export a module in evaluation mode to a functional program; raise DiluError on failure."""
    return functional(exported_as_is(module, inputs, {}, shapes))


def exported_as_is(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> ExportedProgram:
    """Export a module in evaluation mode; raise DiluError on failure."""
    with _evaluating(module), torch.no_grad(), _quiet():
        try:
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
        except DiluError:
            raise
        except Exception as error:
            raise _failure(error, module) from error


def functional(program: ExportedProgram) -> ExportedProgram:
    """Return the program without in-place operators; composite ones with a lowering stay.

    Raises DiluError where torch cannot do that.
    """
    with warnings.catch_warnings(), _quiet():
        # torch copies its own deprecated objects, which is nothing a user could mend.
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        try:
            return decomposed(program.run_decompositions({}))
        except SyntaxError as error:  # torch writes names of parameters into Python as they are
            named = [n for n in program.state_dict if set(n.split(".")) & set(keyword.kwlist)]
            if not named:
                raise export_error(error) from error
            raise UnsupportedError(
                f"torch.export cannot rewrite a program whose parameter is named {named[0]!r}, "
                "which has a word of Python in it",
                hint="rename it in the module",
            ) from error
        except Exception as error:
            raise export_error(error) from error


def _failure(error: Exception, module: torch.nn.Module) -> DiluError:
    """Return why exporting failed; parameters without values are a cause that torch mistakes."""
    if type(error).__name__ == "FakeTensorDeviceMismatchError":
        for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
            if parameter.is_meta:
                return DiluError(
                    f"the parameter {name!r} has no values: it is on the device meta",
                    hint="load the module's weights before compiling it",
                )
    return export_error(error, definition(module.forward))


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Generator[None]:
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep torch's log from showing what becomes an error of ours, and how torch came to it."""

    def hide(_: logging.LogRecord) -> bool:
        return False

    handlers = list(logging.getLogger("torch").handlers)
    for handler in handlers:
        handler.addFilter(hide)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(hide)
