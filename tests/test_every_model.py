"""A slice of every_model.py: a type of each fate, and none of them internal or wrong."""

from __future__ import annotations

import re

import every_model
import pytest

#: Types that are not language models of the kind that is supported, and what is said of them.
REFUSED = {
    "gpt2": "GPT2LMHeadModel has no list of decoder layers",
    "bert": "BertLMHeadModel has no list of decoder layers",
    "bloom": "BloomForCausalLM has no list of decoder layers",
    "falcon": "model_type 'falcon' has an attention of its own, which is not reached through",
    "qwen2_vl": r"the text part \(qwen2_vl_text\) of a multimodal checkpoint",
    "gptj": "model_type 'gptj' has an attention of its own",
}
RIGHT = ["mistral3", "cohere2", "gpt_neox"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_says_why(tmp_path, kind):
    verdict, text = every_model.attempt(kind, tmp_path, captured=True)
    assert verdict == "refused"
    assert re.search(REFUSED[kind], text), text


@pytest.mark.slow
@pytest.mark.parametrize("kind", RIGHT)
def test_what_is_captured_is_right(tmp_path, kind):
    assert every_model.attempt(kind, tmp_path, captured=True)[0] == "right"


def test_every_type_is_tried():
    kinds = every_model.all_kinds()
    assert {"llama", "deepseek_v3", "gpt2", "qwen3_vl", "mistral3"} <= set(kinds)
    assert len(kinds) == len(set(kinds)) > 200


@pytest.mark.slow
def test_a_wrong_model_is_seen(tmp_path):
    model = every_model.tiny_model(every_model.tiny_config("qwen2", num_hidden_layers=1))
    want = every_model.reference(model)
    model.save_pretrained(tmp_path)
    assert every_model.compare(tmp_path, want, captured=True)[0] == "right"
    want[1] = want[1] + 0.01 * abs(want[1]).max()
    assert every_model.compare(tmp_path, want, captured=True)[0] == "wrong"
