"""Optimiser steps and micro-batches: every row once an epoch, the same step however it is split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmix.train.steps import best_fit, by_budget, epoch_order, plan_steps, share_of

IDS = [f"{number:032x}" for number in range(57)]
sizes = st.lists(st.integers(1, 3000), min_size=1, max_size=60).map(np.array)


@given(st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(seed, epoch):
    order = epoch_order(IDS, seed, "dpo", epoch)
    assert sorted(order) == list(range(len(IDS)))
    assert not np.array_equal(order, epoch_order(IDS, seed, "dpo", epoch + 1))
    assert not np.array_equal(order, epoch_order(IDS, seed, "eos", epoch))


@given(st.permutations(range(len(IDS))))
def test_the_order_depends_on_the_ids_and_not_on_where_the_rows_stand(places):
    shuffled = [IDS[place] for place in places]
    assert [shuffled[row] for row in epoch_order(shuffled, 1, "dpo", 0)] == [
        IDS[row] for row in epoch_order(IDS, 1, "dpo", 0)
    ]


@given(st.integers(1, 20), st.floats(0.05, 3.5))
def test_steps_lay_the_epochs_end_to_end(batch_size, epochs):
    steps = plan_steps(IDS, seed=1, stage="dpo", batch_size=batch_size, epochs=epochs)
    seen = np.concatenate([steps.rows(step) for step in range(len(steps))])
    assert len(seen) == max(1, round(epochs * len(IDS)))
    assert all(len(steps.rows(step)) == batch_size for step in range(len(steps) - 1))
    for epoch in range(len(seen) // len(IDS)):
        assert sorted(seen[epoch * len(IDS) : (epoch + 1) * len(IDS)]) == list(range(len(IDS)))
    assert max(np.bincount(seen)) <= -(-len(seen) // len(IDS))


def test_max_steps_wins_over_epochs():
    steps = plan_steps(IDS, seed=1, stage="dpo", batch_size=8, epochs=0.1, max_steps=20)
    assert len(steps) == 20
    assert steps.epochs == pytest.approx(160 / 57)


@given(sizes, st.integers(1, 9000), st.integers(1, 2))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget, sequences):
    groups = by_budget(lengths, budget, sequences)
    assert sorted(np.concatenate(groups)) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or lengths[group].max() * sequences * len(group) <= budget
    longest = [lengths[group].max() for group in groups]
    assert longest == sorted(longest, reverse=True)


@given(sizes, st.integers(1, 9000))
def test_packs_hold_every_row_once_within_the_capacity_and_no_two_would_fit_in_one(lengths, capacity):
    packs = best_fit(lengths, capacity)
    assert sorted(np.concatenate(packs)) == list(range(len(lengths)))
    assert all(len(pack) == 1 or lengths[pack].sum() <= capacity for pack in packs)
    filled = sorted(int(lengths[pack].sum()) for pack in packs)
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


@given(sizes, st.integers(1, 8))
def test_processes_share_the_rows_of_a_step_evenly(lengths, world):
    shares = [share_of(lengths, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shares)) == list(range(len(lengths)))
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    if len(lengths) % world == 0:
        tokens = [int(lengths[share].sum()) for share in shares]
        assert max(tokens) - min(tokens) <= lengths.max()
