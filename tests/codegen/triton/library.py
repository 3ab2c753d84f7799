"""The kernel library as one module, the way generated modules contain it. For worker scripts."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

LIB = Path(__file__).parents[3] / "codegen" / "triton" / "lib"


def load_library(folder: Path, *names: str) -> ModuleType:
    """Write the files `names` of the library into one module in `folder`, and import it."""
    text = "".join((LIB / f"{name}.py").read_text("utf-8") for name in names)
    text = re.sub(r"^import triton.*\n", "", text, flags=re.MULTILINE)
    path = folder / f"{'_'.join(names)}.py"
    path.write_text("import triton\nimport triton.language as tl\n\n" + text, "utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
