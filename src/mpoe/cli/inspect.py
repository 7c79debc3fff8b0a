"""`mpoe inspect`: what a mixture would cost, from a config alone; no weights are made."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from mpoe.cli.parsing import parse
from mpoe.config import MPOEConfig
from mpoe.models import clear_load_errors, count_parameters, read_config
from mpoe.models.families import T5_SIZES
from mpoe.models.upcycle import swap_modules
from mpoe.nn import MPOExperts
from mpoe.report import parameter_table
from mpoe.training.arguments import MixtureArguments


@dataclass
class InspectArguments:
    """Which model."""

    config: str = field(metadata={"help": f"{', '.join(T5_SIZES)}, a folder with a config.json, or a name on the hub."})
    num_experts: list[int] = field(default_factory=lambda: [8], metadata={"help": "One column for each."})


def run(argv: Sequence[str]) -> None:
    """Print the parameter table and the site dimensions.

    Args:
        argv: What follows `mpoe inspect`.

    Raises:
        ValueError: Wrong input.
    """
    description = "Count the parameters of a mixture, without building it."
    (args, mixture_args), _ = parse("mpoe inspect", description, (InspectArguments, MixtureArguments), argv)
    config = read_config(args.config)
    saved = getattr(config, "quantization_config", None)
    columns: dict[str, MPOEConfig | None] = {"dense": None}
    if saved is not None:
        columns["saved mixture"] = MPOEConfig.from_dict(saved)
    else:
        columns |= {f"{n} experts": mixture_args.mpoe_config(n) for n in args.num_experts}
    models = {name: _on_meta(config, mixture) for name, mixture in columns.items()}
    console = Console()
    console.print(
        parameter_table({name: count_parameters(m) for name, m in models.items()}, f"{args.config}, millions")
    )
    shapes = {
        experts.dims: experts.dims.bond_dims(experts.max_bond_dim)
        for experts in list(models.values())[-1].modules()
        if isinstance(experts, MPOExperts)
    }
    for dims, bonds in shapes.items():
        note = f" ({dims.note})" if dims.note else ""
        console.print(
            f"{dims.out_features}×{dims.in_features}: sites {dims.out_dims} × {dims.in_dims}, bonds {bonds}{note}"
        )


def _on_meta(config: PreTrainedConfig, mixture: MPOEConfig | None) -> PreTrainedModel:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with torch.device("meta"):
        with clear_load_errors(type(config).__name__):
            model = AutoModelForSeq2SeqLM.from_config(config)
        if getattr(config, "scale_decoder_outputs", True) is False:
            # T5 v1.1 and flan: their checkpoints have a head of their own, but T5Config says "tied" whatever it read.
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        if mixture is not None:
            swap_modules(model, mixture)
    return model
