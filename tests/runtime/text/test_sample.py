from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilu.errors import DiluError
from dilu.runtime.text.sample import Sampling, distribution, sample

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.25, 0.05], np.float32))


def chosen(how: Sampling, logits=LOGITS) -> dict[int, float]:
    ids, chances = distribution(logits, how)
    return dict(zip(ids.tolist(), np.round(chances, 4).tolist(), strict=True))


def test_greedy_takes_the_likeliest_and_of_equal_ones_the_first():
    how = Sampling()
    assert sample(LOGITS, how, how.generator()) == 1
    assert sample(np.array([1, 3, 3], np.float32), how, how.generator()) == 1


def test_all_of_them():
    assert chosen(Sampling(1.0)) == {1: 0.4, 3: 0.25, 2: 0.2, 0: 0.1, 4: 0.05}


def test_temperature():
    sharp, flat = chosen(Sampling(0.5)), chosen(Sampling(100.0))
    assert sharp[1] == pytest.approx(0.16 / (0.01 + 0.16 + 0.04 + 0.0625 + 0.0025), abs=1e-4)
    assert max(flat.values()) - min(flat.values()) < 0.01


def test_top_k():
    assert chosen(Sampling(1.0, top_k=2)) == {1: round(0.4 / 0.65, 4), 3: round(0.25 / 0.65, 4)}
    assert list(chosen(Sampling(1.0, top_k=1))) == [1]
    assert len(chosen(Sampling(1.0, top_k=99))) == 5


@pytest.mark.parametrize(("p", "kept"), [(0.3, [1]), (0.5, [1, 3]), (0.8, [1, 3, 2]), (1.0, 5)])
def test_top_p(p, kept):
    ids = list(chosen(Sampling(1.0, top_p=p)))
    assert ids == kept or len(ids) == kept


def test_both():
    assert list(chosen(Sampling(1.0, top_k=3, top_p=0.9))) == [1, 3, 2]


def test_frequencies_are_the_probabilities():
    how, random = Sampling(1.0), np.random.default_rng(1)
    counts = np.bincount([sample(LOGITS, how, random) for _ in range(4000)], minlength=5)
    np.testing.assert_allclose(counts / 4000, np.exp(LOGITS), atol=0.03)


def test_a_seed_repeats():
    how = Sampling(1.0, seed=7)

    def draws(sequence):
        random = how.generator(sequence)
        return [sample(LOGITS, how, random) for _ in range(20)]

    assert draws(0) == draws(0) != draws(1)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50),
    st.floats(1e-3, 100),
    st.none() | st.integers(1, 60),
    st.none() | st.floats(1e-6, 1),
)
def test_every_choice_is_a_token(values, temperature, k, p):
    logits = np.array(values, np.float32)
    how = Sampling(temperature, k, p, 0)
    ids, chances = distribution(logits, how)
    assert chances.sum() == pytest.approx(1)
    assert ids[0] == np.flatnonzero(logits == logits.max())[0] or logits[ids[0]] == logits.max()
    assert sample(logits, how, how.generator()) in ids


def test_forbidden_tokens_are_never_chosen():
    logits = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    random = np.random.default_rng(0)
    assert {sample(logits, Sampling(1.0), random) for _ in range(50)} == {1, 3}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_logits(bad):
    with pytest.raises(DiluError, match="logits that are not finite"):
        sample(np.array([0, bad], np.float32), Sampling(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(DiluError, match=message):
        Sampling(**options)
