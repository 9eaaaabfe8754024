"""Length-bucketed batches: every example once, the same number of batches on every rank."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmslm.data.codec import pack_rows
from llmslm.data.sampler import LengthBatchSampler, PackedBatchSampler, best_fit
from llmslm.errors import UserError


def ranks(lengths, batch_size, world_size, **kwargs):
    """The batches of one epoch, by rank."""
    epoch, done = kwargs.pop("epoch", 0), kwargs.pop("done", 0)
    result = []
    for rank in range(world_size):
        sampler = LengthBatchSampler(lengths, batch_size, rank=rank, world_size=world_size, **kwargs)
        sampler.epoch, sampler.done = epoch, done
        result.append(list(sampler))
        assert done or len(result[-1]) == len(sampler)
    return result


shapes = {
    "size": st.integers(1, 700),
    "batch_size": st.integers(1, 9),
    "world_size": st.integers(1, 5),
    "seed": st.integers(0, 3),
}


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_evaluation_sees_each_example_once(size, batch_size, world_size, seed):
    lengths = np.random.default_rng(seed).integers(1, 50, size)
    if size < world_size:
        with pytest.raises(
            UserError, match=rf"{size} examples to evaluate on {world_size} processes; .*trainer\.devices"
        ):
            ranks(lengths, batch_size, world_size, shuffle=False)
        return
    dealt = ranks(lengths, batch_size, world_size, shuffle=False)
    assert len({len(batches) for batches in dealt}) == 1
    assert sorted(i for batches in dealt for batch in batches for i in batch) == list(range(size))
    assert all(0 < len(batch) <= max(batch_size, 2) for batches in dealt for batch in batches)
    assert lengths[dealt[0][0][0]] == lengths.max()


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_training_leaves_out_less_than_a_round(size, batch_size, world_size, seed):
    lengths = np.random.default_rng(seed).integers(1, 50, size)
    dealt = ranks(lengths, batch_size, world_size, shuffle=True, seed=seed, epoch=2)
    counts = Counter(i for batches in dealt for batch in batches for i in batch)
    assert len({len(batches) for batches in dealt}) == 1
    if size >= batch_size * world_size:
        assert max(counts.values()) == 1
        assert size - len(counts) < batch_size * world_size
        assert {len(batch) for batches in dealt for batch in batches} == {batch_size}
    else:
        assert [len(batches) for batches in dealt] == [1] * world_size


def test_every_example_is_trained_on_over_the_epochs():
    seen = [ranks(range(1, 12), 2, 2, shuffle=True, epoch=epoch) for epoch in range(12)]
    assert {i for dealt in seen for batches in dealt for batch in batches for i in batch} == set(range(11))


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = list(range(1, 101))
    first = ranks(lengths, 4, 2, shuffle=True, seed=1, epoch=3)
    assert ranks(lengths, 4, 2, shuffle=True, seed=1, epoch=3) == first
    assert ranks(lengths, 4, 2, shuffle=True, seed=1, epoch=4) != first
    assert ranks(lengths, 4, 2, shuffle=True, seed=2, epoch=3) != first


def test_batches_hold_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 200, 8 * LengthBatchSampler.WINDOW * 3)
    (batches,) = ranks(lengths, 8, 1, shuffle=True)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.05 * lengths.sum()
    positions = np.corrcoef([lengths[batch].mean() for batch in batches], range(len(batches)))[0, 1]
    assert abs(positions) < 0.3  # short ones do not all come first


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("done", [0, 2, 6])
def test_a_resumed_epoch_goes_on_with_the_next_batch(world_size, done):
    lengths = list(range(1, 50))
    (whole,) = ranks(lengths, 4, 1, shuffle=True, epoch=5)
    rest = ranks(lengths, 4, world_size, shuffle=True, epoch=5, done=done)
    assert len({len(batches) for batches in rest}) == 1
    in_turn = [batch for batches in zip(*rest, strict=True) for batch in batches]
    assert in_turn == whole[done : done + len(in_turn)]
    assert len(whole) - done - len(in_turn) < world_size


@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_packed_rows_hold_each_example_once(size, batch_size, world_size, seed):
    lengths = np.random.default_rng(seed).integers(1, 40, (size, 2))
    dealt = []
    for rank in range(world_size):
        sampler = PackedBatchSampler(lengths, batch_size, (64, 40), seed=seed, rank=rank, world_size=world_size)
        sampler.epoch = 3
        dealt.append(list(sampler))
        assert len(dealt[-1]) == len(sampler)
        packed = [pack_rows([tuple(lengths[i]) for i in batch], (64, 40)) for batch in dealt[-1]]
        assert all(len(rows) <= batch_size for rows in packed)
    counts = Counter(i for batches in dealt for batch in batches for i in batch)
    if size > 4 * batch_size * world_size:
        assert max(counts.values()) == 1
        assert len(counts) > size / 2


@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_short_examples_are_packed_into_parts_of_rows(size, batch_size, world_size, seed):
    lengths = np.random.default_rng(seed).lognormal(2, 0.7, (size, 2)).clip(1, 40).astype(int)
    dealt = []
    for rank in range(world_size):
        options = {"parts": 4, "seed": seed, "rank": rank, "world_size": world_size}
        sampler = PackedBatchSampler(lengths, batch_size, (64, 48), **options)
        sampler.epoch = 2
        batches = list(sampler)
        dealt += batches
        assert len(batches) == len(sampler)
        for batch in batches:
            kind = next(kind for kind in sampler.kinds if (lengths[batch] <= kind.capacities).all())
            assert len(pack_rows([tuple(lengths[i]) for i in batch], kind.capacities)) <= kind.a_batch
            assert kind.capacities in ((64, 48), (16, 16))
    assert sorted(i for kind in sampler.kinds for row in kind.rows for i in row) == list(range(size))
    counts = Counter(i for batch in dealt for i in batch)
    if sum(kind.batches for kind in sampler.kinds) >= world_size:
        assert max(counts.values()) == 1


def test_packed_batches_differ_in_length_no_more_than_shuffled_ones():
    random = np.random.default_rng(0)
    lengths = random.lognormal(3.5, 0.8, 30000).clip(5, 512).astype(int)
    sampler = PackedBatchSampler(lengths, 16, (512,))
    packed = list(sampler)
    size = round(np.mean([len(batch) for batch in packed]))
    shuffled = random.permutation(30000)[: 30000 // size * size].reshape(-1, size)

    def spread(batches):
        """Of the length of the example that a token of a batch is in."""
        return np.std([(lengths[batch] ** 2).sum() / lengths[batch].sum() for batch in batches])

    assert spread(packed) < spread(shuffled)
    assert np.std([len(batch) for batch in packed]) < 0.1 * size
    later = PackedBatchSampler(lengths, 16, (512,))
    later.epoch = 1
    assert not {frozenset(batch) for batch in later} & {frozenset(batch) for batch in packed}


def test_few_long_examples_are_no_batch_of_their_own():
    lengths = np.array([[5, 5]] * 2000 + [[40, 9]] * 3)
    sampler = PackedBatchSampler(lengths, 8, (64, 48), parts=4)
    assert [kind.a_batch for kind in sampler.kinds] == [8]
    sampler = PackedBatchSampler(lengths[:-3], 8, (64, 48), parts=4)
    assert [kind.a_batch for kind in sampler.kinds] == [32]


@pytest.mark.parametrize("capacities", [(384, 64), (512, 88), (1024, 120), (384, 312)])
def test_parts_of_rows_are_as_full_as_rows(capacities):
    random, parts = np.random.default_rng(0), capacities[0] // 128
    prompts = random.lognormal(3.5, 0.6, 8000).clip(4, 300)
    sides = np.stack([prompts, (prompts * capacities[1] / capacities[0]).clip(1)], axis=1).astype(int)
    filled = []
    for number in (1, parts):
        sampler = PackedBatchSampler(sides, 8, capacities, parts=number)
        slots = sum(len(kind.rows) * sum(kind.capacities) for kind in sampler.kinds)
        filled.append(sides.sum() / slots)
    assert len(sampler.kinds) == 2
    assert filled[1] > filled[0] - 0.1


def test_packing_leaves_little_room():
    lengths = np.random.default_rng(0).integers(4, 200, (5000, 1))
    rows = best_fit(lengths, (512,))
    assert sorted(i for row in rows for i in row) == list(range(5000))
    assert all(lengths[row].sum() <= 512 for row in rows)
    assert len(rows) * 512 < 1.01 * lengths.sum()


def test_long_prompts_with_short_targets_share_rows_with_the_opposite():
    random = np.random.default_rng(0)
    prompts = random.lognormal(5, 0.6, 8000).clip(10, 500)
    sides = np.stack([prompts, random.lognormal(2.5, 0.5, 8000).clip(3, 120)], axis=1).astype(int)
    sides[:2000, 1] = sides[:2000, 1].clip(20)
    capacities = (1024, 120)
    sampler = PackedBatchSampler(sides, 4, capacities, seed=1)
    batches = list(sampler)
    assert sum(sides[batch].sum() for batch in batches) > 0.93 * len(batches) * 4 * sum(capacities)
    assert sum(map(len, batches)) > 0.98 * len(sides)  # little is left out of an epoch


def test_packing_refuses_what_is_longer_than_a_row():
    with pytest.raises(UserError, match=r"65 tokens.* packed row 64; .*data\.pack_tokens"):
        PackedBatchSampler([3, 65], 1, (64,))
