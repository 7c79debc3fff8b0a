"""`mpoe inspect`: what a model is made of, or what a mixture of it would cost; from a config alone, without weights."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from mpoe.cli.loading import load_finished
from mpoe.cli.parsing import name_first, parse
from mpoe.config import MPOEConfig
from mpoe.models import (
    NO_CODE,
    ParameterCount,
    class_of,
    clear_load_errors,
    count_parameters,
    mixtures,
    mpo_experts,
    read_config,
    set_compute,
)
from mpoe.models.families import T5_SIZES
from mpoe.models.truncation import MatrixFacts, matrix_facts
from mpoe.models.upcycle import swap_modules
from mpoe.mpo.machine import machine_of
from mpoe.nn import MPOExperts
from mpoe.report import PlainConsole, layers_of_stacks, parameter_table
from mpoe.report.matrices_table import matrices_legend, matrices_table
from mpoe.report.model_shape import PUBLISHED, ModelShape, model_shape
from mpoe.report.plan_table import PLAN_LEGEND, PLAN_TOKENS, plan_table, rows_of_plan
from mpoe.report.scaling import Hardware, Step, step_cost
from mpoe.report.scaling_table import SCALE_DEVICES, SCALE_LEGEND, step_table, variant_table
from mpoe.report.variants import ffn_experts, mixture_blocks, variants
from mpoe.training.arguments import MixtureArguments

MAY_BE_BARE = {"--plan": PLAN_TOKENS, "--scale": SCALE_DEVICES}
"""Flags that need no numbers after them, and the numbers that they stand for then."""


@dataclass
class InspectArguments:
    """Which model, and what about it."""

    _argument_group_name: ClassVar[str] = "model, and what about it"

    model: str = field(
        metadata={
            "aliases": ["--config"],
            "help": f"{', '.join((*T5_SIZES, *PUBLISHED))}, a folder with a config.json, or a name on the hub.",
        }
    )
    num_experts: list[int] = field(default_factory=lambda: [8], metadata={"help": "One column, or table, for each."})
    plan: list[int] | None = field(
        default=None,
        metadata={
            "help": "balanced: print how the planner would compute each matrix of a layer for so many tokens, "
            f"{', '.join(map(str, PLAN_TOKENS))} if no number follows."
        },
    )
    plan_on: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "The kind of device that is planned for."})
    scale: list[int] | None = field(
        default=None,
        metadata={
            "help": "Print memory, bytes and time of a training step on so many devices, "
            f"{', '.join(map(str, SCALE_DEVICES))} if no number follows."
        },
    )
    base: str | None = field(
        default=None,
        metadata={"help": "Of a saved mixture: the dense model that it was made of, to measure its matrices against."},
    )
    json: bool = field(default=False, metadata={"help": "Print JSON, with a row for every matrix."})


def run(argv: Sequence[str]) -> None:
    """Print the parameter table and the matrices, or the tables that a flag asks for.

    Args:
        argv: What follows `mpoe inspect`: the model, then flags.

    Raises:
        ValueError: Wrong input.
    """
    description = "Count the parameters of a model or of its mixture, and what that costs, without building it."
    kinds = (InspectArguments, MixtureArguments, Step, Hardware)
    (args, mixture_args, step, hardware), _ = parse(
        "mpoe inspect MODEL", description, kinds, _with_numbers(name_first(argv, "--model"))
    )
    config = _config(args.model)
    saved = getattr(config, "quantization_config", None)
    if saved is not None:
        columns = {"saved mixture": MPOEConfig.from_dict(saved)}
    else:
        columns = {f"{n} experts": mixture_args.mpoe_config(n) for n in args.num_experts}
    if args.base is not None and saved is None:
        raise ValueError(f"base is about a saved mixture; {args.model} is dense, and its own base: leave it out")
    if args.base is not None and any(mixture is not None and mixture.is_extended for mixture in columns.values()):
        raise ValueError(f"base is about truncated matrices; those of {args.model} are extended: leave it out")
    console = PlainConsole()
    if args.json:
        print(json.dumps(_as_json(args, config, columns, step, hardware), indent=2))
        return
    if args.plan is None and args.scale is None:
        _print_parameters(console, args, config, columns, saved is not None or mixture_args.stacks is not None)
        return
    shape = model_shape(config, args.model)
    tables: list[Table | str] = []
    for column, mixture in _mixtures(columns).items():
        if args.plan is not None:
            tables += [*_plan_tables(shape, mixture, args.plan, args.plan_on), PLAN_LEGEND, ""]
        if args.scale is not None:
            title = f"{args.model}, {column}, {step.tokens_per_device:,} tokens a device"
            tables += [*_scale_tables(shape, mixture, args.scale, step, hardware, title), SCALE_LEGEND]
    for table in tables:
        console.print(table)


def _mixtures(columns: Mapping[str, MPOEConfig | None]) -> dict[str, MPOEConfig]:
    found = {column: mixture for column, mixture in columns.items() if mixture is not None}
    if len(found) < len(columns):
        raise ValueError("--plan and --scale need a mixture; with these flags the model stays dense")
    return found


def _planned(shape: ModelShape, mixture: MPOEConfig) -> list[MPOExperts]:
    """A layer's matrices on the meta device, those of each size once."""
    layer = torch.nn.ModuleList(ffn_experts(shape, mixture))
    share = mixture.matrix_cache_gib / max(mixture_blocks(shape, mixture), 1)
    set_compute(layer, dataclasses.replace(mixture, matrix_cache_gib=share))
    return list({experts.dims: experts for experts in mpo_experts(layer).values()}.values())


def _plan_tables(shape: ModelShape, mixture: MPOEConfig, tokens: Sequence[int], device_type: str) -> list[Table]:
    return [
        plan_table(experts, tokens, machine_of(device_type), needs_grad)
        for experts in _planned(shape, mixture)
        for needs_grad in (False, True)
    ]


def _scale_tables(
    shape: ModelShape, mixture: MPOEConfig, devices: Sequence[int], step: Step, hardware: Hardware, title: str
) -> list[Table]:
    found = variants(shape, mixture)
    return [variant_table(found, step, title), *(step_table(found, n, step, hardware) for n in devices)]


def _print_parameters(
    console: PlainConsole,
    args: InspectArguments,
    config: PreTrainedConfig,
    columns: Mapping[str, MPOEConfig | None],
    asks_for_stacks: bool,
) -> None:
    models = {column: _on_meta(config, mixture) for column, mixture in {"dense": None, **columns}.items()}
    counts = {column: count_parameters(model) for column, model in models.items()}
    console.print(parameter_table(counts, f"{args.model}, millions"))
    for column, model in models.items():
        if mixtures(model):
            console.print(f"{column}: {layers_of_stacks(model)}{_growth(counts[column])}.")
    if config.is_encoder_decoder and any(map(mixtures, models.values())) and not asks_for_stacks:
        console.print("Where a task's answers are labels, mpoe finetune changes the encoder alone: --stacks encoder.")
    console.print("--scale says what a training step takes on several devices.")
    if any(isinstance(module, MPOExperts) for model in models.values() for module in model.modules()):
        console.print("--plan says how matrices are multiplied and at what cost.")
    facts = _facts(args, config, list(models.values())[-1])
    if facts:
        console.print(matrices_table(facts, f"Matrices, {list(models)[-1]}"))
        console.print(matrices_legend(facts))


def _growth(count: ParameterCount) -> str:
    """What the dense model has become, in words."""
    total, active, whole = (n / count.dense - 1 for n in (count.total, count.active, count.whole_experts))
    return f", {total:+.0%} parameters ({whole:+.0%} with whole experts), {active:+.0%} met by one token"


def _facts(args: InspectArguments, config: PreTrainedConfig, model: PreTrainedModel) -> list[MatrixFacts]:
    """With errors, if the weights that they need are at hand: of a dense model that would be cut, or of both."""
    if args.base is not None:
        return matrix_facts(load_finished(args.model)[0], load_finished(args.base)[0])
    facts = matrix_facts(model)
    has_weights = any(Path(args.model).glob("*.safetensors")) and getattr(config, "quantization_config", None) is None
    return matrix_facts(model, load_finished(args.model)[0]) if has_weights and any(m.is_cut for m in facts) else facts


def _as_json(
    args: InspectArguments,
    config: PreTrainedConfig,
    columns: Mapping[str, MPOEConfig | None],
    step: Step,
    hardware: Hardware,
) -> dict[str, Any]:
    """Everything that was asked for, JSON-ready; counts, bytes and seconds."""
    found: dict[str, Any] = {"model": args.model, "columns": {}}
    for column, mixture in {"dense": None, **columns}.items():
        model = _on_meta(config, mixture)
        count = count_parameters(model)
        found["columns"][column] = of_column = {
            "parameters": {**vars(count), "total": count.total},
            "matrices": [dataclasses.asdict(matrix) for matrix in _facts(args, config, model)],
        }
        if mixture is None:
            continue
        shape = model_shape(config, args.model) if args.plan is not None or args.scale is not None else None
        if args.plan is not None and shape is not None:
            of_column["plan"] = [
                {
                    "size": f"{experts.dims.out_features}x{experts.dims.in_features}",
                    "needs_grad": needs_grad,
                    **vars(row),
                }
                for experts in _planned(shape, mixture)
                for needs_grad in (False, True)
                for row in rows_of_plan(experts, args.plan, machine_of(args.plan_on), needs_grad)
            ]
        if args.scale is not None and shape is not None:
            of_column["scale"] = [
                {"variant": variant.name, "is_sharded": is_sharded, **dataclasses.asdict(cost)}
                for devices in args.scale
                for is_sharded in (False, True)
                for variant in variants(shape, mixture)
                for cost in [step_cost(variant, devices, is_sharded, step, hardware)]
            ]
    return found


def _with_numbers(argv: Sequence[str]) -> list[str]:
    """`MAY_BE_BARE` flags without numbers get theirs, because a list must not be empty for Transformers' parser."""
    words: list[str] = []
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        words.append(word)
        if word in MAY_BE_BARE and following.startswith("--"):
            words.extend(map(str, MAY_BE_BARE[word]))
    return words


def _config(name: str) -> PreTrainedConfig:
    if name in PUBLISHED and not Path(name).exists():
        return AutoConfig.for_model(**PUBLISHED[name])
    return read_config(name)


def _on_meta(config: PreTrainedConfig, mixture: MPOEConfig | None) -> PreTrainedModel:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with torch.device("meta"):
        with clear_load_errors(type(config).__name__):
            model = _dense(config)
        if getattr(config, "scale_decoder_outputs", True) is False:
            # T5 v1.1 and flan: their checkpoints have a head of their own, but T5Config says "tied" whatever it read.
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        if mixture is not None:
            swap_modules(model, mixture)
    return model


def _dense(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of the class that its config names, or else with a language-model head; with random weights."""
    architecture = class_of(config)
    if architecture is not None:
        return architecture(config)
    return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config, **NO_CODE)
