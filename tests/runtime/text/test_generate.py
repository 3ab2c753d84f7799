from __future__ import annotations

import numpy as np
import pytest

import dilu
from dilu.errors import DiluError
from dilu.runtime import machine
from dilu.runtime.text import generate
from dilu.runtime.text.generate import Statistics, TokenLoop
from dilu.runtime.text.sample import Sampling

V, MAXIMUM, END = 260, 64, 257


def continued(prompt, count, end=END, maximum=MAXIMUM):
    """What the toy says: the sum of all tokens so far, modulo the vocabulary."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + count, maximum + 1):
        tokens.append(sum(tokens) % V)
        if tokens[-1] == end:
            break
    return tokens[len(prompt) :]


@pytest.fixture
def session(toy):
    with dilu.load(toy, threads=1) as session:
        yield session


@pytest.fixture
def loop(session):
    return TokenLoop(session)


def run(loop, prompts, **options):
    out = [[] for _ in prompts]
    for index, token in loop.generate(prompts, **options):
        out[index].append(token)
    return out


PROMPTS = [[1, 2, 3], [250], [7] * 21, [5, 9, 100, 3, 2]]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one(loop, prompt):
    assert run(loop, [prompt], max_tokens=20) == [continued(prompt, 20)]


@pytest.mark.parametrize("chunk", [1, 2, 5, 512])
def test_a_batch_is_each_alone_in_chunks_of_any_size(loop, monkeypatch, chunk):
    monkeypatch.setattr(generate, "PREFILL_TOKENS", chunk)
    assert run(loop, PROMPTS, max_tokens=20) == [continued(p, 20) for p in PROMPTS]
    assert loop._pool.used == 0


def test_sequences_that_end_at_different_times(loop):
    prompts = [[1], [END - 2, 1, 1], [2]]  # the second one's first token would be the end
    prompts[1] = [200, END - 200]
    assert run(loop, prompts, max_tokens=5) == [continued(p, 5) for p in prompts]
    assert len(continued(prompts[1], 5)) == 1


def test_equal_prompts(loop):
    assert run(loop, [[1, 2]] * 3, max_tokens=4) == [continued([1, 2], 4)] * 3


def test_the_maximum(loop):
    (out,) = run(loop, [[1] * 60], max_tokens=100)
    assert out == continued([1] * 60, 100)
    assert len(out) == 5  # the last is made by the token at the last position
    assert len(run(loop, [[1] * MAXIMUM], max_tokens=100)[0]) == 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1] * 65, {}, "the prompt is longer than the maximum: 65 tokens, and the model .* 64"),
        ([], {}, "the prompt is empty"),
        ([V], {}, "token 260 is not in the vocabulary of 260"),
        ([-1], {}, "token -1 is not in the vocabulary"),
        ([1], {"max_tokens": -1}, "max_tokens is -1"),
    ],
)
def test_impossible_runs_are_refused_at_once(loop, prompt, options, message):
    with pytest.raises(DiluError, match=message):
        loop.generate([prompt], **{"max_tokens": 1} | options)


def test_no_tokens(loop):
    assert list(loop.generate([[1]], max_tokens=0)) == []
    assert list(loop.generate([], max_tokens=5)) == []


def test_logits(loop, monkeypatch):
    whole = loop.logits(PROMPTS)
    assert [x.shape for x in whole] == [(len(p), V) for p in PROMPTS]
    for prompt, logits in zip(PROMPTS, whole, strict=True):
        wanted = [sum(prompt[: n + 1]) % V for n in range(len(prompt))]
        assert logits.argmax(1).tolist() == wanted
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 2)
    for one, other in zip(whole, loop.logits(PROMPTS), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_abandoned_run_gives_its_pages_back(loop):
    running = loop.generate([[1, 2]], max_tokens=9)
    next(running)
    assert loop._pool.used > 0
    running.close()
    assert loop._pool.used == 0


def test_runs_side_by_side(loop):
    """The second run makes the cache grow while the first one uses it."""
    first = loop.generate([[1, 2, 3]], max_tokens=8)
    got = [next(first)[1]]
    assert run(loop, PROMPTS, max_tokens=8) == [continued(p, 8) for p in PROMPTS]
    got += [token for _, token in first]
    assert got == continued([1, 2, 3], 8)


def test_sampling_repeats_by_its_seed(loop):
    def drawn(seed):
        how = Sampling(5.0, seed=seed)
        return run(loop, [[1], [1]], max_tokens=20, sampling=how)

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert drawn(3)[0] != drawn(3)[1]


def test_statistics(loop):
    stats = Statistics()
    tokens = run(loop, [[1, 2, 3], [4]], max_tokens=5, statistics=stats)
    assert (stats.prompt_tokens, stats.new_tokens) == (4, sum(map(len, tokens)))
    assert stats.decode_tokens == stats.new_tokens - 2
    assert stats.first_token_seconds is not None
    assert stats.prompt_rate > 0
    assert stats.decode_rate > 0
    assert Statistics().decode_rate == 0


def test_a_cache_that_does_not_fit(loop, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 2000)
    with pytest.raises(DiluError, match=r"not enough memory: .* cache"):
        list(loop.generate([[1]], max_tokens=60))
    monkeypatch.undo()
    assert run(loop, [[1]], max_tokens=3) == [continued([1], 3)]


def test_releasing_the_cache(loop):
    run(loop, [[1]], max_tokens=3)
    loop.release()
    assert run(loop, [[1]], max_tokens=3) == [continued([1], 3)]
