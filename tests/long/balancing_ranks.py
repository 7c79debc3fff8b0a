"""Started by `distributed.py`: the counts of balancing under DDP, other rows on each process.

Prints the largest difference of the biases' steps and the pending counts to a model that got all rows in one process;
they are whole numbers, so that it is 0.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mpoe
from mpoe.models import routers

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import tiny_t5

STEPS = 6


def main(layout: str) -> None:
    """SGD on both; broadcasting of buffers is on, as it is by default."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=4, layout=layout)).train()
    alone = copy.deepcopy(model)
    for router in routers(alone).values():
        router.balancing.count = _local_count(router.balancing)
    wrapped = DistributedDataParallel(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (model, alone)]
    for step in range(STEPS):
        torch.manual_seed(step)
        halves = [{"input_ids": torch.randint(2, 64, (3, 9)), "labels": torch.randint(2, 64, (3, 4))} for _ in "ab"]
        wrapped(**halves[rank]).loss.backward()
        for half in halves:
            (alone(**half).loss / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    differences = []
    for here, there in zip(_counts(model), _counts(alone), strict=True):
        on_all = [torch.empty_like(here) for _ in range(dist.get_world_size())]
        dist.all_gather(on_all, here)
        differences += [(counts - there).abs().max().item() for counts in on_all]
    assert any(router.balancing.steps.any() for router in routers(alone).values()), "the case must move a bias"
    if rank == 0:
        sys.stdout.write(f"{max(differences)}\n")
    del wrapped  # its destructor may wait for ever once the group is gone
    dist.barrier()
    dist.destroy_process_group()


def _local_count(balancing):
    """What one process counts, written out."""

    def count(expert_index, mask):
        real = expert_index if mask is None else expert_index[mask]
        balancing.pending += torch.bincount(real.flatten(), minlength=len(balancing.pending))

    return count


def _counts(model):
    return [counts for r in routers(model).values() for counts in (r.balancing.steps, r.balancing.pending)]


if __name__ == "__main__":
    main(sys.argv[1])
