"""Ascend NPUs as a target of dilu, by the fork of Triton called triton-ascend.

    dilu compile model --target npu:Ascend910B3 -o model.dilu

Two entry points in pyproject.toml lead here. Without the vendor's toolkit (CANN) kernels are
compiled as far as its Triton goes by itself, to linalg, and nothing runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dilu.codegen.target import Gpu, Target
from dilu.errors import DiluError
from dilu.ir.dtypes import BF16, F16, F32
from dilu.runtime.gpu.device import Device

#: The fork replaces the package `triton`, hence a folder apart. It imports pybind11, unasked for.
PACKAGES = "triton-ascend==3.2.0 pybind11"
FOLDER = Path(sys.prefix) / "share" / "dilu" / "triton-ascend"


def target(folder: Path | None = None) -> Target:
    """Return the NPU of an Atlas 800T A2, compiled for by the Triton in a folder.

    `DILU_ASCEND_TRITON` names the folder where none is given.
    """
    chosen = folder or Path(os.environ.get("DILU_ASCEND_TRITON") or FOLDER)
    home = os.environ.get("ASCEND_HOME_PATH")  # which CANN's set_env.sh sets, often by a link
    toolkit = str(Path(home).resolve()) if home else ""
    return Target(
        "npu:Ascend910B3",
        language="triton",
        activations=(F32, BF16, F16),
        keeps_rows=False,
        copies_weights=True,
        gpu=Gpu(
            "npu",
            "Ascend910B3",
            warp=0,  # there are none; the fork calls it so
            shared=192 << 10,  # the unified buffer of a core
            dot=BF16,
            decode="portable",
            matrix=("linalg.matmul",),
            programs=40,
            triton=str(chosen.absolute()),
            packages=PACKAGES,
            code=("npubin",) if toolkit else ("ttadapter",),
            toolkit=toolkit,
        ),
    )


def open_device(index: int) -> Device:
    """Raise DiluError: a launcher takes CANN's runtime, which this example does not bind.

    One would load its library, `libascendcl.so`, and return a `Device` that allocates with
    `aclrtMalloc`, copies with `aclrtMemcpyAsync`, registers the npubin of a `KernelCode` and
    launches it with the arguments in order, among those that the fork's own launcher adds to them.
    """
    raise DiluError(
        f"npu:{index} cannot be opened: dilu-ascend has no launcher",
        hint="it compiles only; a launcher would return a Device on CANN's runtime",
    )
