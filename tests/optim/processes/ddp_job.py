"""One process of a DistributedDataParallel job, started by test_preconditioner.py.

python ddp_job.py STORE RANK WORLD_SIZE RESULT
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFACPreconditioner

NUM_CASES, NUM_STEPS, INVERSES = 16, 4, ("block_diagonal", "block_tridiagonal", "ekfac")


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def data(step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(NUM_CASES, 6, generator=generator)
    return inputs, torch.randint(3, (NUM_CASES,), generator=generator)


def train(net, inverse, rows, micro_batches=1):
    """Return the parameters after a few steps on these rows of every batch."""
    preconditioner = KFACPreconditioner(
        net,
        distribution="categorical",
        damping=0.1,
        inverse=inverse,
        statistics_fraction=1.0,
        inverse_update_period=2,
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        inputs, targets = (values[rows] for values in data(step))
        for part, labels in zip(
            inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True
        ):
            loss = nn.functional.cross_entropy(net(part), labels)
            (loss / micro_batches).backward()
        preconditioner.step()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def main(store, rank, world_size, result):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    share = NUM_CASES // world_size
    rows = slice(rank * share, (rank + 1) * share)
    trained = {
        inverse: train(DistributedDataParallel(model()), inverse, rows) for inverse in INVERSES
    }
    torch.save(trained, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
