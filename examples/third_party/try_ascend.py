"""Compile the kernels of small models for an Ascend NPU, and say how far each one gets.

    python examples/third_party/try_ascend.py [FOLDER]

FOLDER is where triton-ascend lies or is installed to, a temporary one by default. No NPU and no
toolkit is needed, nor that dilu-ascend is installed. Of every kernel the first variant is compiled.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from dilu_ascend import PACKAGES, target

from dilu.codegen.lower import lower
from dilu.codegen.target import Target
from dilu.codegen.triton.build import jobs_of
from dilu.codegen.triton.driver import Failure, Job, compile_jobs
from dilu.codegen.triton.emit_plan import Plans
from dilu.codegen.triton.installations import describe_installation, version_in
from dilu.frontend.language.language_model import capture_language_model
from dilu.passes.pipeline import compile_graph

#: The bundled DeepSeek-V3, and an ordinary Llama.
BUNDLED = Path(__file__).parents[1] / "stdlib-moe" / "config.json"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="where triton-ascend is, or goes to")
    chosen: Path | None = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen or Path(temporary, "triton-ascend")).absolute()
        if version_in(folder) is None:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--target", str(folder), *shlex.split(PACKAGES)], check=True)
        ascend = target(folder)
        print(f"{ascend.name}: {describe_installation(ascend)}")
        config = Path(temporary, "config.json")
        config.write_text(json.dumps(LLAMA))
        report({"deepseek": BUNDLED, "llama": config}, ascend)


def report(configs: dict[str, Path], ascend: Target) -> None:
    """Compile the kernels of models and print what comes of them."""
    labels, jobs = zip(
        *((name, job) for name, path in configs.items() for job in kernels(path, ascend)),
        strict=True,
    )
    assert ascend.gpu is not None
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for label, job, outcome in zip(labels, jobs, compile_jobs(jobs, ascend), strict=True):
        if isinstance(outcome, Failure):
            where = f"failed in {outcome.stage or 'the front end'}"
            reasons[why(outcome)] += 1
            text = f"{where}: {why(outcome)}"
        else:
            text = where = f"reached {ascend.gpu.kept[0]}"
            if outcome.instructions:
                text += f" ({', '.join(f'{n} {name}' for name, n in outcome.instructions.items())})"
        counts[where] += 1
        print(f"{label:9} {job.what:52.52} {text}")
    print(
        f"\n{len(jobs)} kernels: {', '.join(f'{n} {where}' for where, n in counts.most_common())}"
    )
    for reason, count in reasons.most_common():
        print(f"{count:4}  {reason}")


def kernels(config: Path, ascend: Target) -> list[Job]:
    """Return what there is to compile of a model, each kernel by its first variant."""
    graph, _ = capture_language_model(config, config_only=True)
    planned, _ = compile_graph(graph, ascend)
    assert ascend.gpu is not None
    plans = Plans(ascend.gpu)
    plans.entries(lower(planned, ascend))
    return [jobs_of(run)[0] for run in plans.runs]


def why(failure: Failure) -> str:
    """Return what says what is wrong in a reason, without places."""
    found = re.search(r"\w*[Ee]rror: \S.*|Assertion .*", failure.reason)
    return (found[0] if found else failure.reason.strip().partition("\n")[0])[:160]


if __name__ == "__main__":
    main()
