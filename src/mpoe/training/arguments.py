"""The command line's arguments: dataclasses for Transformers' `HfArgumentParser`, the reference's names kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

from transformers import Seq2SeqTrainingArguments

from mpoe.config import COMPONENTS, MPOEConfig

NO_TRUNCATION = 30000  # the reference's way to say "none"

# Where a task's answer is a label, the decoder sees one start token a row, all inputs of its routers are nearly alike,
# and they send everything to one expert (measured on T5: 99 to 100% of tokens in some layers).
STACKS_FOR_LABELS = ("encoder",)


@dataclass
class ModelArguments:
    """Which model, how many experts, and what stays as it is."""

    model_name_or_path: str = field(metadata={"help": "Folder with a Transformers model, or a name on the hub."})
    num_experts: int = field(default=8, metadata={"help": "Experts per feed-forward layer."})
    dropout: float | None = field(default=None, metadata={"help": "Dropout of the model; its own if left out."})
    freeze_embeds: bool = field(
        default=False, metadata={"help": "Do not train the input embedding and the language-model head."}
    )


@dataclass
class MixtureArguments:
    """What a mixture is made of."""

    moe_type: Literal["switch", "none"] = field(
        default="switch", metadata={"help": "Router: switch is top-1; none leaves the model dense (needs nompo)."}
    )
    mpo_layers: str = field(
        default="mlp",
        metadata={"help": "Comma list of components whose matrices become MPOs: mlp; nompo for whole experts."},
    )
    linear_trunc: int = field(
        default=NO_TRUNCATION, metadata={"help": "Largest bond of a feed-forward MPO; 30000 is no truncation."}
    )
    layout: Literal["separable", "balanced"] = field(
        default="separable", metadata={"help": "How matrices are cut into sites; balanced is the paper's."}
    )
    num_sites: int | None = field(
        default=None, metadata={"help": "Site tensors per matrix, odd; the layout's own (3 or 5) if left out."}
    )
    max_auxiliary_bond: int | None = field(
        default=None, metadata={"help": "Cap on the full bonds beside the central tensor: smaller auxiliaries."}
    )
    site_dims: str | None = field(
        default=None,
        metadata={"help": 'Site dimensions by shape, JSON: {"3072x768": [[4,4,8,6,4], [3,4,4,4,4]]}.'},
    )
    gauge: Literal["identity", "central", "sqrt"] = field(
        default="identity", metadata={"help": "Gauge of the MPOs; identity keeps the matrix as central tensor."}
    )
    stacks: str | None = field(
        default=None,
        metadata={
            "help": "Comma list of the stacks that get experts: encoder, decoder. If left out, finetune takes the "
            "encoder alone (a label's decoder sees little but its start token, and its routers collapse), inspect all."
        },
    )
    layers: str | None = field(
        default=None, metadata={"help": "Comma list of block indices that get experts; all if left out."}
    )
    offset_scale: float = field(
        default=MPOEConfig.offset_scale, metadata={"help": "Relative size of a step on the auxiliary tensors."}
    )
    expert_noise: float = field(
        default=MPOEConfig.expert_noise, metadata={"help": "Relative standard deviation of noise on the auxiliaries."}
    )
    load_balancing_coef: float = field(
        default=MPOEConfig.load_balancing_coef, metadata={"help": "Weight of the load-balancing loss."}
    )
    is_scale_prob: bool = field(
        default=False, metadata={"help": "Multiply an expert's output by its router probability."}
    )

    def mpoe_config(
        self, num_experts: int, seed: int = 0, default_stacks: tuple[str, ...] | None = None
    ) -> MPOEConfig | None:
        """The mixture that the flags describe; None if the model is to stay dense.

        Args:
            num_experts: Experts per feed-forward layer, count.
            seed: Seed of the routers and the noise.
            default_stacks: Where the experts go if no flag says so; None is everywhere.

        Raises:
            ValueError: A flag's value that makes no sense, named.
        """
        components = _names(self.mpo_layers) or ()
        if "nompo" in components:
            if len(components) > 1:
                raise ValueError(f"mpo_layers must be nompo alone or a list of {COMPONENTS}; got {self.mpo_layers!r}")
            components = ()
        config = MPOEConfig(
            num_experts=num_experts,
            mpo_layers=components,
            layout=self.layout,
            num_sites=self.num_sites,
            max_auxiliary_bond=self.max_auxiliary_bond,
            max_bond_dim=None if self.linear_trunc >= NO_TRUNCATION else self.linear_trunc,
            site_dims=_json_object("site_dims", self.site_dims),
            gauge=self.gauge,
            stacks=_names(self.stacks) or default_stacks,
            layers=_integers("layers", self.layers),
            offset_scale=self.offset_scale,
            expert_noise=self.expert_noise,
            is_scale_prob=self.is_scale_prob,
            load_balancing_coef=self.load_balancing_coef,
            seed=seed,
        )
        if self.moe_type == "none":
            if components:
                raise ValueError(
                    f"moe_type none leaves the model dense, so mpo_layers must be nompo; got {self.mpo_layers!r}"
                )
            return None
        return config


@dataclass
class DataArguments:
    """Which task, and where its data are."""

    task: str = field(metadata={"help": "A task of mpoe.training.tasks: cola, sst2, mrpc, qqp, stsb, mnli, ..."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with the task's folder in GLUE layout; the hub if left out."}
    )
    max_source_length: int = field(default=128, metadata={"help": "Tokens of an input at most; longer ones are cut."})
    n_train: int | None = field(default=None, metadata={"help": "Train on this many rows only, drawn by the seed."})

    def __post_init__(self) -> None:
        for name in ("max_source_length", "n_train"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}")


@dataclass
class FinetuneTrainingArguments(Seq2SeqTrainingArguments):
    """Transformers' own training arguments, with defaults for fine-tuning T5 on one task."""

    output_dir: str = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        metadata={"help": "Folder for the model, the tokenizer, results.json and checkpoints; new, or this very run's."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows a step on each device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Rows an evaluation step on each device."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training rows."})
    warmup_steps: float = field(default=0.06, metadata={"help": "Steps of warm-up; below 1, a share of all steps."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two log lines."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps, epoch."})
    save_steps: float = field(default=100, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    # Transformers' own default follows its log level, and the command line keeps that at errors.
    disable_tqdm: bool | None = field(default=False, metadata={"help": "No progress bars."})
    predict_with_generate: bool = field(default=True, metadata={"help": "Score labels by generating them."})


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _integers(name: str, text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be a comma list of integers; got {text!r}") from None


def _json_object(name: str, text: str | None) -> dict[str, object] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be a JSON object; got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object; got {text!r}")
    return value
