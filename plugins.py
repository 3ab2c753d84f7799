"""What other packages bring by entry points: doors, targets, devices."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

from .errors import DiluError


def load(point: EntryPoint, what: str) -> Any:
    """Return what an entry point names; `what` says in an error what it would have brought.

    Raises DiluError where its package cannot be imported or does not have it.
    """
    try:
        return point.load()
    except Exception as error:  # whatever another package does when it is imported
        raise _failure(point, what, error) from error


def make(point: EntryPoint, what: str) -> Any:
    """Return what the callable that an entry point names returns; raise DiluError as `load`."""
    maker = load(point, what)
    try:
        return maker()
    except Exception as error:
        raise _failure(point, what, error) from error


def _failure(point: EntryPoint, what: str, error: Exception) -> DiluError:
    """Return the error that a package does not bring what it says."""
    return DiluError(
        f"the package that brings {what} cannot be loaded: {error}", hint=f"it is {point.value}"
    )
