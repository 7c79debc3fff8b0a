"""What upcycling does to the logits of a tiny random model of every family, in a table: python tests/long/preserved.py.

Prints the largest absolute difference of a logit for each layout, and whether greedy generation is the same token for
token. Exits 1 if a difference exceeds a relative 1e-5, or a token differs.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console

import mpoe
from tiny import logits_of
from tiny_families import ENCODER_DECODERS, FAMILY_NAMES, GENERATIVE, family_batch, tiny_model

LAYOUTS = {
    "extended": mpoe.MPOEConfig(num_experts=4),
    "balanced": mpoe.MPOEConfig(num_experts=4, layout="balanced"),
    "whole experts": mpoe.MPOEConfig(num_experts=4, mpo_layers=()),
}


def generated(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Ten tokens by greedy decoding."""
    torch.manual_seed(0)
    batch = family_batch(name)
    inputs = {"input_ids": batch["input_ids"][1:], "attention_mask": batch["attention_mask"][1:]}
    start = {"decoder_start_token_id": 0} if name in ENCODER_DECODERS else {}
    return model.generate(**inputs, **start, max_new_tokens=10, do_sample=False)


def main() -> int:
    """Print the table."""
    failed, console = 0, Console(width=120, highlight=False)
    console.print(f"{'family':<14}" + "".join(f"{layout:>16}" for layout in LAYOUTS) + "   same generation")
    for name in FAMILY_NAMES:
        torch.manual_seed(0)
        dense, batch = tiny_model(name), family_batch(name)
        expected = logits_of(dense, batch)
        text = generated(dense, name) if name in GENERATIVE else None
        cells, same = [], []
        for config in LAYOUTS.values():
            model = mpoe.upcycle(copy.deepcopy(dense), config)
            largest = (logits_of(model, batch) - expected).abs().max().item()
            failed += largest > 1e-5 * max(1.0, expected.abs().max().item())
            cells.append(f"{largest:>16.1e}")
            if text is not None:
                same.append(torch.equal(generated(model, name), text))
        failed += same.count(False)
        verdict = "-" if text is None else ", ".join("yes" if one else "NO" for one in same)
        console.print(f"{name:<14}{''.join(cells)}   {verdict}")
    console.print("all preserved" if not failed else f"{failed} failures")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
