"""An artifact made by hand: a module in C with the interface of compiled ones, and its manifest."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dilu
from dilu.runtime.artifact.artifact import Artifact
from dilu.runtime.artifact.fingerprint import fingerprint
from dilu.runtime.artifact.tensor_file import Entry, chunks, layout
from dilu.runtime.cpu.features import architecture

V, PAGE, MAXIMUM = 260, 4, 64
BOS, END, USER = 256, 257, 258


@pytest.fixture(scope="session")
def toy_library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C compiler")
    out = tmp_path_factory.mktemp("toy") / "toy.so"
    source = Path(__file__).with_name("toy.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", out, source], check=True)
    return out.read_bytes()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with the weights of the toy: `bias`, `w.0` and `w.1`."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tensors = {
        "w.0": np.array([1, 2, 3], np.float32),
        "bias": np.linspace(0, 1, V, dtype=np.float32),
        "w.1": np.array([10, 20, 30], np.float32),
    }
    entries = [Entry(n, "f32", a.shape, a.nbytes) for n, a in tensors.items()]
    plan = layout(entries)
    contents = ([a.tobytes()] for a in tensors.values())
    (folder / "model.safetensors").write_bytes(b"".join(chunks(plan, contents)))
    return folder


@pytest.fixture
def toy(toy_library: bytes, checkpoint: Path) -> Artifact:
    """The toy in memory, as the compiler returns it."""
    weights = checkpoint / "model.safetensors"
    w0, bias, w1 = offsets(weights, "w.0", "bias", "w.1")
    manifest: dict[str, Any] = {
        "format": 1,
        "dilu": dilu.__version__,
        "name": "toy",
        "functions": [
            {
                "name": "main",
                "symbols": ["T", "S", "P", "R", "B"],
                "parameters": [
                    *(value(n, "i64", "T") for n in ("tokens", "positions", "sequence", "slots")),
                    value("pages", "i64", "S", "P"),
                    value("rows", "i64", "R"),
                ],
                "states": [value("keys_0", "f32", 2, "B", 1, PAGE, 1)],
                "results": [value("logits", "f32", "R", V)],
                "constants": ["bias"],
            },
            {
                "name": "scale",
                "symbols": ["N"],
                "parameters": [value("x", "f32", "N", 3)],
                "states": [],
                "results": [value("y", "f32", "N", 3), value("count", "i64")],
                "constants": ["w"],
            },
            {
                "name": "bits",
                "symbols": ["N"],
                "parameters": [value("x", "bf16", "N")],
                "states": [value("memory", "f32", "N")],
                "results": [value("y", "bf16", "N"), value("sum", "f32")],
                "constants": [],
            },
            {
                "name": "broken",
                "symbols": [],
                "parameters": [],
                "states": [],
                "results": [],
                "constants": [],
            },
        ],
        "targets": {
            "cpu:baseline": {
                "library": "kernels/cpu-baseline/module.so",
                "source": "kernels/cpu-baseline/module.c",
                "requires": [],
                "architecture": architecture(),
                "kernels": [{"name": "run_main", "kind": "loops", "function": "main"}],
            }
        },
        "files": [
            {
                "path": str(weights),
                "size": weights.stat().st_size,
                "fingerprint": fingerprint(weights),
            }
        ],
        "constants": {
            "bias": constant([V], 0, [bias], ["bias"]),
            "w": constant([2, 3], 1, [w0, w1], ["w.0", "w.1"]),
        },
        "language_model": {
            "architecture": "ToyForCausalLM",
            "vocab_size": V,
            "page_size": PAGE,
            "max_positions": MAXIMUM,
            "eos_token_ids": [END],
            "bos_token_id": BOS,
        },
        "passes": [],
        "options": {},
    }
    files: dict[str, Any] = {
        "kernels/cpu-baseline/module.so": toy_library,
        "kernels/cpu-baseline/module.c": Path(__file__).with_name("toy.c").read_bytes(),
        "graph/planned.txt": b"graph planned\n",
        "tokenizer.json": byte_tokenizer(),
        "tokenizer_config.json": json.dumps(
            {
                "bos_token": "<bos>",
                "eos_token": {"content": "<end>"},
                "chat_template": "{{ bos_token }}{% for m in messages %}<user>{{ m.content }}"
                "{% endfor %}",
            }
        ).encode(),
    }
    return Artifact(manifest, files)


def value(name: str, dtype: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def constant(shape: list[int], grid: int, offset: list[int], tensor: list[str]) -> dict[str, Any]:
    file = [0] * len(offset)
    return {
        "dtype": "f32",
        "shape": shape,
        "grid": grid,
        "file": file,
        "offset": offset,
        "tensor": tensor,
    }


def offsets(path: Path, *names: str) -> list[int]:
    """Return where tensors begin in a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return [8 + length + header[name]["data_offsets"][0] for name in names]


def byte_tokenizer() -> bytes:
    """A tokenizer with a token for each byte, and `<bos>` before every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = bytes_to_unicode()
    library = Tokenizer(models.BPE({alphabet[b]: b for b in range(256)}, []))
    library.add_special_tokens([AddedToken(t, special=True) for t in ("<bos>", "<end>", "<user>")])
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return library.to_str().encode()


def bytes_to_unicode() -> dict[int, str]:
    """The letters that stand for bytes in a byte-level vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
