"""Checkpoint directories are read from their headers, and what is wrong with one is said."""

import json
import struct

import pytest
import torch
from checkpoints import make_checkpoint

from dilu.errors import DiluError
from dilu.frontend.checkpoint import read_checkpoint, read_config, read_quantization


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    make_checkpoint(folder, "llama", shards=3, scale_dtype=torch.bfloat16, exclude=("o_proj",))
    return folder


@pytest.fixture
def sharded(made, tmp_path):
    """A copy to break."""
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_headers_of_a_sharded_checkpoint(made):
    checkpoint = read_checkpoint(made)
    codes = checkpoint.header("model.layers.0.mlp.gate_proj.weight")
    scales = checkpoint.header("model.layers.0.mlp.gate_proj.weight_scale_inv")
    assert (codes.dtype.name, codes.shape) == ("f8e4m3", (200, 144))
    assert (scales.dtype.name, scales.shape) == ("bf16", (2, 2))
    assert len({t.file for t in checkpoint.tensors.values()}) == 3
    assert checkpoint.quantization is not None
    assert checkpoint.quantization.block == (128, 128)
    assert checkpoint.quantization.excluded == ("o_proj",)


def test_offsets_are_those_of_the_data(tmp_path):
    from safetensors import safe_open

    checkpoint = read_checkpoint(make_checkpoint(tmp_path, "llama").path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name, header in checkpoint.tensors.items():
            raw = (tmp_path / header.file).read_bytes()[header.offset :][: header.nbytes]
            want = file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
            assert raw == want


def test_no_such_path(tmp_path):
    with pytest.raises(DiluError, match=r"no such path: .*nowhere"):
        read_checkpoint(tmp_path / "nowhere")


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(DiluError, match=r"not a checkpoint: .* has no config\.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DiluError, match=r"has neither model\.safetensors nor"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_broken_config(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DiluError, match="not a configuration"):
        read_config(tmp_path)


def test_truncated_file(sharded):
    file = sharded / "model-00002-of-00003.safetensors"
    data = file.read_bytes()
    for keep in (len(data) - 1, 100, 4, 0):
        file.write_bytes(data[:keep])
        with pytest.raises(DiluError, match=f"truncated safetensors file: it has {keep} bytes"):
            read_checkpoint(sharded)


@pytest.mark.parametrize(
    "header",
    [
        b"{nonsense",
        b"[1, 2]",
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b"\xff\xfe",
    ],
)
def test_broken_header(sharded, header):
    file = sharded / "model-00001-of-00003.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(DiluError, match=r"broken safetensors header[\s\S]*00001-of-00003"):
        read_checkpoint(sharded)


def test_unknown_element_type(sharded):
    header = b'{"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}'
    file = sharded / "model-00001-of-00003.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(DiluError, match=r"unknown element type 'C64'[\s\S]*tensor 'a'"):
        read_checkpoint(sharded)


def test_missing_shard(sharded):
    (sharded / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(DiluError, match=r"missing shard: model-00003-of-00003\.safetensors"):
        read_checkpoint(sharded)


def test_index_that_lies(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["extra.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(DiluError, match=r"holds 'extra\.weight', which it does not"):
        read_checkpoint(sharded)
    index.write_text("{}")
    with pytest.raises(DiluError, match="not an index of safetensors files"):
        read_checkpoint(sharded)


def test_missing_tensor(made):
    with pytest.raises(DiluError, match="the checkpoint has no tensor 'x'"):
        read_checkpoint(made).header("x")


def test_quantization_methods():
    assert read_quantization({}) is None
    with pytest.raises(DiluError, match=r"unknown quantization method 'gptq'[\s\S]*supported: fp8"):
        read_quantization({"quantization_config": {"quant_method": "gptq"}})
    settings = {"quant_method": "fp8", "weight_block_size": "x"}
    with pytest.raises(DiluError, match="weight_block_size 'x' is not a pair"):
        read_quantization({"quantization_config": settings})
    weights = {"type": "float", "num_bits": 8, "strategy": "channel"}
    settings = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": weights}}}
    scheme = read_quantization({"quantization_config": settings | {"ignore": ["lm_head"]}})
    assert scheme is not None
    assert (scheme.block, scheme.suffix, scheme.excluded) == (None, "_scale", ("lm_head",))
    weights["type"] = "int"
    with pytest.raises(DiluError, match="unknown quantization method 'compressed-tensors"):
        read_quantization({"quantization_config": settings})
