"""The loader of training batches, resumed on another number of ranks."""

import pytest

from llmslm.data.loader import BatchLoader
from llmslm.data.sampler import LengthBatchSampler

ROWS, BATCH = 50, 4


class Rank:
    """One rank's loader and how much it has trained."""

    def __init__(self, rank, world_size, trained=0, state=None):
        sampler = LengthBatchSampler(
            [1 + i % 7 for i in range(ROWS)], BATCH, shuffle=True, seed=3, **_where(rank, world_size)
        )
        self.trained = trained
        self.loader = BatchLoader(list(range(ROWS)), sampler, lambda: self.trained, collate_fn=list)
        if state:
            self.loader.load_state_dict(state)

    def train(self, steps):
        """Rows of the next batches, over as many epochs as it takes."""
        batches = []
        while len(batches) < steps:
            before = len(batches)
            for batch in self.loader:
                batches.append(batch)
                self.trained += 1
                if len(batches) == steps:
                    break
            assert len(batches) > before, "an epoch without batches"
        return batches


def _where(rank, world_size):
    return {"rank": rank, "world_size": world_size}


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (1, 4), (4, 1), (2, 2)])
def test_another_number_of_ranks_goes_on_with_what_is_left(before, after, steps):
    first = [Rank(rank, before) for rank in range(before)]
    seen = [one.train(steps) for one in first]
    state = first[0].loader.state_dict()
    assert all(one.loader.state_dict() == state for one in first)
    second = [Rank(rank, after, steps, state) for rank in range(after)]
    left = (ROWS // BATCH - state["examples"] // BATCH) // after
    if left:
        rounds = state["examples"] // BATCH // before
        this_epoch = [row for batches in seen for batch in batches[steps - rounds :] for row in batch]
        rest = [row for one in second for batch in one.train(left) for row in batch]
        assert len(set(this_epoch + rest)) == len(this_epoch) + len(rest)
    rows = [row for one in second for batch in one.train(ROWS // BATCH // after) for row in batch]
    assert len(set(rows)) == len(rows)  # the next epoch is a whole one
    assert len({tuple(sorted(one.loader.state_dict().items())) for one in second}) == 1
