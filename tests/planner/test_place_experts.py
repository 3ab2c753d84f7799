"""Placements of experts: what always holds, balance beside the published algorithm, errors."""

from __future__ import annotations

import numpy as np
import pytest
from eplb import eplb
from hypothesis import given, settings
from hypothesis import strategies as st

from dilu.errors import DiluError
from dilu.planner.place_experts import ExpertPlacement, least_imbalance, place_experts


def zipf(layers: int, experts: int, exponent: float, seed: int = 0) -> np.ndarray:
    """Return Zipf loads, in another order in every layer."""
    rng = np.random.default_rng(seed)
    load = np.arange(1, experts + 1) ** -exponent
    return np.stack([rng.permutation(load) for _ in range(layers)])


def check(placement: ExpertPlacement, experts: int, ranks: int, slots: int) -> None:
    layers = placement.slots
    assert layers.shape[1:] == (ranks, slots // ranks)
    for rows in layers:
        assert set(rows.ravel().tolist()) == set(range(experts))  # every expert is somewhere
        assert all(len(set(row.tolist())) == len(row) for row in rows)  # and twice nowhere
        assert (np.diff(rows) > 0).all()


@given(st.data())
@settings(max_examples=60)
def test_any_load_on_any_ranks(data):
    ranks = data.draw(st.integers(1, 9))
    experts = data.draw(st.integers(1, 40))
    least = -(-experts // ranks)
    size = data.draw(st.integers(least, min(experts, least + 3)))
    load = data.draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    load_LE = np.array([load, [1] * experts])
    placement = place_experts(load_LE, ranks, ranks * size)
    check(placement, experts, ranks, ranks * size)
    imbalance = placement.imbalance(load_LE)
    assert (imbalance >= least_imbalance(load_LE, ranks, ranks * size) - 1e-9).all()
    again = place_experts(load_LE * 3.0, ranks, ranks * size)  # loads are shares
    np.testing.assert_allclose(again.imbalance(load_LE), imbalance)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(
    ("experts", "ranks", "slots"), [(256, 32, 288), (128, 8, 136), (64, 8, 64)]
)
def test_balance_beside_eplb(exponent, experts, ranks, slots):
    load = zipf(61, experts, exponent)
    placement = place_experts(load, ranks, slots)
    check(placement, experts, ranks, slots)
    ours = placement.imbalance(load)
    theirs = ExpertPlacement(eplb(load, ranks, slots), experts).imbalance(load)
    bound = least_imbalance(load, ranks, slots)
    assert ours.mean() <= theirs.mean()
    assert (ours >= bound - 1e-9).all()
    if exponent <= 1:  # beyond, the bound is not tight
        assert (ours <= np.maximum(1.05, 1.05 * bound)).all()


def test_a_load_without_tokens_counts_as_equal():
    placement = place_experts(np.zeros((1, 8)), 4)
    np.testing.assert_allclose(placement.rank_load(np.zeros((1, 8))), 0.25)


def test_the_order_of_equal_experts_is_no_matter_of_chance():
    load = np.ones((2, 16))
    one, two = (place_experts(load, 4, 20).slots for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_groups_stay_in_a_part_of_the_topology():
    """Eight groups on four machines of two devices: two groups each, replicas too."""
    load = zipf(5, 64, 0.7)
    placement = place_experts(load, 8, 80, levels=(4, 2), groups=8)
    check(placement, 64, 8, 80)
    for rows in placement.slots:
        for machine in rows.reshape(4, -1):
            assert len(set((machine // 8).tolist())) == 2


def test_groups_that_do_not_divide_are_no_hindrance():
    load = zipf(2, 60, 1.0)
    placement = place_experts(load, 8, 64, levels=(4, 2), groups=3)
    check(placement, 60, 8, 64)
    assert placement.imbalance(load).max() < place_experts(load, 8, 64).imbalance(load).max() + 1e-9


def test_a_machine_whose_experts_would_not_fill_its_ranks_takes_others():
    """Two groups of two experts on two machines: a rank of three slots needs a third expert."""
    check(place_experts(zipf(1, 4, 1.0), 4, 12, levels=(2, 2), groups=2), 4, 4, 12)


@pytest.mark.parametrize(
    ("load", "options", "message"),
    [
        (np.ones(8), {"ranks": 2}, r"is \(8,\), not \[layers, experts\]"),
        (np.array([[1, 1], [1, -1]]), {"ranks": 2}, "layer 1 is negative or not a number"),
        (np.array([[1, np.nan]]), {"ranks": 2}, "layer 0 is negative or not a number"),
        (np.ones((1, 8)), {"ranks": 3}, "8 experts do not fill 8 slots on 3 ranks.*1 replicas"),
        (np.ones((1, 8)), {"ranks": 2, "slots": 6}, "do not fill 6 slots"),
        (np.ones((1, 8)), {"ranks": 0}, "on 0 ranks"),
        (
            np.ones((1, 4)),
            {"ranks": 2, "slots": 10},
            "more than every rank.*at most 4 replicas",
        ),
        (np.ones((1, 8)), {"ranks": 4, "levels": (2, 4)}, "a topology of 2 × 4 has not 4 ranks"),
        (np.ones((1, 8)), {"ranks": 4, "groups": 3}, "not 3 groups of equal size"),
    ],
)
def test_numbers_that_do_not_fit(load, options, message):
    with pytest.raises(DiluError, match=f"(?s){message}"):
        place_experts(load, **options)
