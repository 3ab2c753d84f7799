"""A checkpoint is captured once for all tests of a module: what they compile it for comes after.

pytestmark = pytest.mark.usefixtures("captured_once")
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def captured_once() -> Iterator[None]:
    """Keep what capturing a folder made, as long as its files stay as they are."""
    from dilu.frontend.language import language_model

    capture = language_model.capture_language_model
    known: dict[Any, Any] = {}

    def remembered(path: Path, **options: Any) -> Any:
        files = [path] if path.is_file() else sorted(path.iterdir())
        states = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        key = (tuple(states), tuple(sorted(options.items())))
        if key not in known:
            known[key] = capture(path, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "capture_language_model", remembered)
        yield
