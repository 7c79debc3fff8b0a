"""Started by `distributed.py`: an expert that gets no token on one of two processes. Prints the largest difference."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mpoe

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import tiny_t5


def main(layout: str) -> None:
    """Gradients of DDP beside the mean of the gradients of both batches, computed here."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = mpoe.MPOEConfig(num_experts=8, layout=layout, load_balancing_coef=0.1)
    model = mpoe.upcycle(tiny_t5(), config).train()
    with torch.no_grad():
        for experts in mpoe.models.sharing_experts(model).values():
            for tensor in experts.auxiliary.values():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    batches = [torch.full((2, 5), 7), torch.randint(2, 64, (6, 30))]  # equal tokens have the same experts in a layer
    mpoe.models.reset_usage(model)
    wrapped = DistributedDataParallel(model)
    wrapped(
        input_ids=batches[dist.get_rank()], labels=torch.ones(len(batches[dist.get_rank()]), 2).long()
    ).loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    least = torch.tensor(list(mpoe.models.expert_shares(model).values()))
    most = least.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    assert ((least == 0) & (most > 0)).any(), "the case must have an expert that is idle on one process alone"
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for batch in batches:
        model.zero_grad()
        model(input_ids=batch, labels=torch.ones(len(batch), 2).long()).loss.backward()
        for total, p in zip(expected, model.parameters(), strict=True):
            total += p.grad / 2
    if dist.get_rank() == 0:
        sys.stdout.write(str(max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True))) + "\n")
    del wrapped  # its destructor may wait for ever once the group is gone
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
