"""Copies on several ranks average the gradients that a graph gives them."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llmslm.graphed import GraphedLoss
from tests.distributed.ranks import run_ranks

STEPS, ROWS = 4, 6


class Step(nn.Module):
    """A module whose training step is graphed, as the LightningModule's is beneath DDP."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.loss = GraphedLoss(self.compute, self.model.parameters())

    def compute(self, batch):
        return (self.model(batch["x"]) ** 2).mean()

    def forward(self, batch):
        return self.loss(batch)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(ROWS, 4, generator=generator) for _ in range(STEPS)]


def trained(step, rows, accumulate):
    """Weights after some steps, each of so many batches."""
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    for number, batch in enumerate(batches(), start=1):
        is_last = number % accumulate == 0
        step.require_backward_grad_sync = is_last  # what `no_sync` sets
        (step({"x": batch[rows]}) / accumulate).backward()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
    return [weight.detach().tolist() for weight in step.parameters()]  # whole: this process is gone when they are read


def of_rank(rank, accumulate):
    step = DistributedDataParallel(Step(), gradient_as_bucket_view=True)
    return trained(step, slice(rank * ROWS // 2, (rank + 1) * ROWS // 2), accumulate)


def test_copies_learn_what_one_process_does():
    for accumulate in (1, 2):
        expected = trained(Step(), slice(None), accumulate)
        for found in run_ranks(of_rank, 2, accumulate):
            for ours, plain in zip(found, expected, strict=True):
                torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain))
