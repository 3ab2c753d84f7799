"""What is proved of every captured language model: its tokens do not mix but by attention."""

from __future__ import annotations

import json
import re

import pytest

from dilu.errors import UnsupportedError
from dilu.frontend.language.language_model import capture_language_model
from dilu.frontend.language.tokens_apart import require_tokens_apart
from dilu.ir.text import parse_graph


def require(body: str, result: str) -> None:
    """Check a function of `tokens` and `rows` whose rows of 4 numbers are %x."""
    text = f"""graph captured
    func @main(%tokens: i64[T], %rows: i64[R]) const(%table: f32[9,4], %w: f32[4,4], %c: f32[4]) {{
      %x: f32[T,4] = take(%table, %tokens)
      {body}
      return %{result}
    }}
    """
    (function,) = parse_graph(text).functions
    require_tokens_apart(function, function.parameters[1])


APART = {
    "projections": "%y: f32[T,4] = matmul(%x, %w) {transpose_b=true}",
    "norms": """%s: f32[T,1] = reduce_sum(%x) {axes=[1], keepdims=true}
      %y: f32[T,4] = mul(%x, %s)""",
    "the same for all": """%z: f32[T,4] = broadcast_to(%c) {shape=[<T>, 4]}
      %y: f32[T,4] = add(%x, %z)""",
    "an axis in front": """%r: f32[1,T,4] = reshape(%x) {shape=[1, <T>, 4]}
      %t: f32[1,4,T] = transpose(%r) {permutation=[0, 2, 1]}
      %u: f32[1,T,4] = transpose(%t) {permutation=[0, 2, 1]}
      %y: f32[T,4] = reshape(%u) {shape=[<T>, 4]}""",
    "wanted rows": "%y: f32[R,4] = take(%x, %rows)",
}


@pytest.mark.parametrize("name", APART)
def test_what_keeps_tokens_apart(name):
    require(APART[name], "y")


MIXED = {
    "numbers of its own": (
        """%i: i64[T] = iota() {dtype=i64, size=<T>}
      %p: f32[T,4] = take(%table, %i)
      %y: f32[T,4] = add(%x, %p)""",
        "the model numbers its tokens itself",
    ),
    "numbers plus one": (
        "%y: i64[T + 1] = iota() {dtype=i64, size=<T + 1>}",
        "the model numbers its tokens itself",
    ),
    "a mean": ("%y: f32[4] = reduce_sum(%x) {axes=[0], keepdims=false}", "reduce_sum along them"),
    "a shift": (
        "%y: f32[T - 1,4] = slice(%x) {axis=0, start=0, step=1, stop=<T - 1>}",
        "slice along them",
    ),
    "a row in front": (
        """%z: f32[1,4] = reshape(%c) {shape=[1, 4]}
      %y: f32[T + 1,4] = concat(%z, %x) {axis=0}""",
        "concat along them",
    ),
    "attention of its own": (
        """%a: f32[T,T] = matmul(%x, %x) {transpose_b=true}
      %y: f32[T,4] = matmul(%a, %x) {transpose_b=false}""",
        "matmul along them",
    ),
    "rows of another's choice": ("%y: f32[T,4] = take(%x, %tokens)", "take along them"),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_tokens(name):
    body, says = MIXED[name]
    with pytest.raises(UnsupportedError, match=re.escape(says)):
        require(body, "y")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bart", "blenderbot"])
def test_models_that_number_their_tokens(kind, tmp_path):
    """Their decoders learn positions, and count them along the batch: for several sequences, or the
    later pieces of one, they would be other positions than the model means."""
    sizes = {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 48,
    }
    settings = {"model_type": kind, "vocab_size": 64, "max_position_embeddings": 48, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedError, match="the model numbers its tokens itself"):
        capture_language_model(tmp_path / "config.json", config_only=True)
