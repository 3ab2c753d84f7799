"""The real DeepSeek-V3, 671 billion parameters, without its weights: what compiling it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dilu.runtime.artifact.artifact import Artifact

CONFIG = Path(__file__).parent.parent / "frontend" / "configs" / "deepseek_v3.json"
GIGABYTE = 1 << 30

pytestmark = pytest.mark.slow


def compile_config(config: Path, out: Path) -> tuple[Artifact, int]:
    """Compile a configuration in a process of its own; return the artifact and peak memory."""
    script = (
        "import sys, resource, dilu\n"
        "dilu.compile(sys.argv[1], config_only=True, target='null').save(sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(config), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Artifact.open(out), int(done.stdout.split()[-1])


def test_671b_parameters_compile_on_a_laptop_and_code_is_flat_in_depth(tmp_path: Path):
    whole, peak = compile_config(CONFIG, tmp_path / "whole.dilu")
    assert peak < 4 * GIGABYTE
    assert whole.manifest["language_model"]["parameters"] == 671_026_404_352

    shallow = tmp_path / "config.json"
    shallow.write_text(json.dumps(json.loads(CONFIG.read_text()) | {"num_hidden_layers": 8}))
    few, _ = compile_config(shallow, tmp_path / "few.dilu")
    (deep_target,), (few_target,) = whole.targets.values(), few.targets.values()
    deep_source = whole.read(deep_target["source"])
    few_source = few.read(few_target["source"])
    assert abs(len(deep_source) - len(few_source)) < 100  # numbers of one digit more
    assert len(deep_target["kernels"]) == len(few_target["kernels"])
