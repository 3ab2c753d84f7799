"""Tied, stored and missing heads: as transformers' own `from_pretrained` loads them."""

import numpy as np
import pytest
import torch
from captured import CapturedModel
from stored import bind, bound, config_of, model_files, quantize, wide, write
from transformers import AutoModelForCausalLM

from dilu.errors import DiluError
from dilu.frontend.language.language_model import capture_language_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def files():
    config = config_of("llama", tie_word_embeddings=False)
    return {k: v.bfloat16() for k, v in model_files(config).items()}


def without(tensors, *names):
    return {k: v for k, v in tensors.items() if k not in names}


def own(folder):
    """Return what transformers loads: every parameter's values."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {k: v.numpy() for k, v in model.state_dict().items()}


def assert_as_transformers(folder):
    got, want = bound(folder), own(folder)
    assert got.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


TIED = config_of("llama", tie_word_embeddings=True)


def test_a_stored_head_that_differs_is_used_though_it_is_said_to_be_tied(tmp_path, files):
    write(tmp_path, TIED, files)
    assert_as_transformers(tmp_path)
    binder, _ = bind(tmp_path)
    assert binder.canonical(HEAD) != binder.canonical(EMBEDDING)


def test_a_stored_head_that_is_the_same_is_shared(tmp_path, files):
    write(tmp_path, TIED, files | {HEAD: files[EMBEDDING].clone()})
    assert_as_transformers(tmp_path)
    binder, _ = bind(tmp_path)
    assert binder.canonical(HEAD) == binder.canonical(EMBEDDING)


@pytest.mark.parametrize("missing", [HEAD, EMBEDDING])
def test_what_is_stored_alone_serves_both(tmp_path, files, missing):
    write(tmp_path, TIED, without(files, missing))
    assert_as_transformers(tmp_path)


def test_neither_is_stored(tmp_path, files):
    write(tmp_path, TIED, without(files, HEAD, EMBEDDING))
    with pytest.raises(DiluError, match=r"the checkpoint has no tensor for '(lm_head|model.embed)"):
        bound(tmp_path)


def test_a_head_that_is_not_tied_must_be_stored(tmp_path, files):
    """transformers would make it of random numbers."""
    write(tmp_path, config_of("llama", tie_word_embeddings=False), without(files, HEAD))
    with pytest.raises(DiluError, match=r"no tensor for 'lm_head\.weight'[\s\S]*does not tie"):
        bound(tmp_path)


def test_tied_codes_with_scales_of_their_own(tmp_path, files):
    stored, want = dict(files), {}
    codes, scales = quantize(files[EMBEDDING].float(), (1, None))
    for name, factor in ((EMBEDDING, 1.0), (HEAD, 0.5)):
        stored |= {name: codes.clone(), f"{name}_scale": scales * factor}
        want[name] = wide(codes, scales * factor, (1, None)).numpy()
    settings = {"quant_method": "fbgemm_fp8"}
    got = bound(write(tmp_path, TIED, stored, quantization_config=settings))
    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values)
    alone = without(stored, HEAD, f"{HEAD}_scale")
    got = bound(write(tmp_path, TIED, alone, quantization_config=settings))
    np.testing.assert_array_equal(got[HEAD], want[EMBEDDING])


@pytest.mark.slow
def test_an_untied_head_is_computed_with(tmp_path, files):
    write(tmp_path, TIED, files)
    graph, _ = capture_language_model(tmp_path)
    prompt = [0, 5, 31, 7]
    (got,) = CapturedModel(graph, tmp_path).feed([prompt])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        want = model(input_ids=torch.tensor([prompt])).logits[0].numpy()
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
