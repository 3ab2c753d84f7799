"""Checkpoint directories are read from their headers, and what is wrong with one is said."""

import json

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from dilu.errors import DiluError
from dilu.frontend.checkpoint.checkpoint import read_checkpoint, read_config
from dilu.frontend.formats import Module


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
    assert checkpoint.quantization.expected(Module(("self_attn.q_proj",))) is not None
    assert checkpoint.quantization.expected(Module(("self_attn.o_proj",))) is None


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


INDEX = "model.safetensors.index.json"
NAME = "model.layers.0.mlp.gate_proj.weight"


def shard(number, total=3):
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def change_index(folder, **files):
    """Let the index say that tensors, by name, are in other files; None: that it has no such."""
    index = folder / INDEX
    content = json.loads(index.read_text())
    content["weight_map"] |= files
    index.write_text(json.dumps(content))


def same_tensors(folder, made):
    """Whether the tensors of a folder lie where those of `made` do."""
    return read_checkpoint(folder).tensors == read_checkpoint(made).tensors


def test_a_missing_shard_is_missed_by_who_reads_of_it(sharded):
    (sharded / shard(3)).unlink()
    checkpoint = read_checkpoint(sharded)
    assert checkpoint.header(NAME).nbytes == 200 * 144
    gone = json.loads((sharded / INDEX).read_text())["weight_map"]
    name = next(n for n, file in gone.items() if file == shard(3))
    with pytest.raises(DiluError, match=r"missing shard: model-00003-of-00003\.safetensors, which"):
        checkpoint.header(name)
    for number in (1, 2):
        (sharded / shard(number)).unlink()
    with pytest.raises(DiluError, match=r"missing shard: model-00001-of-.*, and 2 more"):
        read_checkpoint(sharded)


def test_an_index_that_lies_is_forgiven_where_the_files_are_whole(sharded, made):
    change_index(sharded, **{"extra.weight": shard(1), "vision.weight": "elsewhere.safetensors"})
    change_index(sharded, **{NAME: shard(3)})  # it is in another
    assert same_tensors(sharded, made)
    weight_map = dict.fromkeys(json.loads((sharded / INDEX).read_text())["weight_map"], shard(1))
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))  # all in one of them
    assert same_tensors(sharded, made)


def test_no_index(sharded, made):
    (sharded / INDEX).unlink()
    assert same_tensors(sharded, made)
    (sharded / "consolidated.safetensors").write_bytes(b"of another format")
    assert same_tensors(sharded, made)
    (sharded / shard(2)).unlink()
    with pytest.raises(DiluError, match=r"missing shards: of the 3 files .* are not there: 2"):
        read_checkpoint(sharded)
    (sharded / shard(1, 7)).write_bytes(b"")
    with pytest.raises(DiluError, match=r"shards of several checkpoints .*: -of-00003, -of-00007"):
        read_checkpoint(sharded)


def test_a_stale_index_beside_a_whole_file(sharded, tmp_path_factory):
    whole = make_checkpoint(tmp_path_factory.mktemp("whole"), "llama").path
    single = (whole / "model.safetensors").read_bytes()
    (sharded / "model.safetensors").write_bytes(single)
    assert same_tensors(sharded, whole)  # as transformers, which looks for it first
    (sharded / "model.safetensors").unlink()
    change_index(sharded, **dict.fromkeys(read_checkpoint(whole).tensors, "gone.safetensors"))
    assert read_checkpoint(sharded).header(NAME).file == shard(1)


def test_no_index_but_of_other_things(sharded):
    for text in ("{}", "[]", "{", '{"weight_map": 3}'):
        (sharded / INDEX).write_text(text)
        with pytest.raises(DiluError, match="not an index of safetensors files"):
            read_checkpoint(sharded)


def test_files_that_are_not_read_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(DiluError, match=r"it has pytorch_model\.bin, which are not read"):
        read_checkpoint(tmp_path)


def test_a_tensor_in_two_files(sharded):
    first, third = ({}, {})
    for number, tensors in ((1, first), (3, third)):
        tensors |= load_file(sharded / shard(number))
    name = next(iter(first))
    save_file(third | {name: first[name].clone()}, sharded / shard(3))
    assert read_checkpoint(sharded).header(name).shape == tuple(first[name].shape)
    save_file(third | {name: first[name] * 2}, sharded / shard(3))
    checkpoint = read_checkpoint(sharded)
    message = rf"'{name}' is in {shard(1)} and in {shard(3)} with different values"
    with pytest.raises(DiluError, match=message):
        checkpoint.header(name)
    checkpoint.header(next(n for n in third if n != name))  # the others are not touched by it


def test_missing_tensor(made):
    with pytest.raises(DiluError, match="the checkpoint has no tensor 'x'"):
        read_checkpoint(made).header("x")
