"""The command line's arguments: dataclasses for Transformers' `HfArgumentParser`, the reference's names kept."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from transformers import Seq2SeqTrainingArguments

from mpoe.config import MPOEConfig
from mpoe.training import flag_values
from mpoe.training.argument_checks import check_packages, check_values
from mpoe.training.flag_values import NO_TRUNCATION
from mpoe.training.optimizer import Freezing

# Where a text-to-text task's answer is a label, the decoder sees one start token a row, all inputs of its routers are
# nearly alike, and they send everything to one expert (measured on T5: 99 to 100% of tokens in some layers).
STACKS_FOR_LABELS = ("encoder",)


@dataclass
class ModelArguments:
    """Which model, how many experts, and what is loaded over it."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str = field(metadata={"help": "Folder with a Transformers model, or a name on the hub."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the tokenizer; the model's own if left out."}
    )
    num_experts: int = field(default=8, metadata={"help": "Experts per feed-forward layer; 1 is no mixture."})
    dropout: float | None = field(default=None, metadata={"help": "Dropout of the model; its own if left out."})
    load_experiment: str | None = field(
        default=None,
        metadata={"help": "Folder of a mixture with the same flags, or a checkpoint of its run, to take weights from."},
    )
    load_layer: str | None = field(
        default=None,
        metadata={
            "help": "Comma list of the components whose weights come from load_experiment: word_embed, mlp, attention; "
            "noload for none; the whole model if left out."
        },
    )

    def components_to_load(self) -> tuple[str, ...] | None:
        """The components that `load_experiment` replaces: none, some, or all of the model (None).

        Raises:
            ValueError: An unknown component, or one that nothing is loaded from.
        """
        components = flag_values.components("load_layer", self.load_layer, nothing="noload")
        if self.load_experiment is None:
            if components:
                raise ValueError(
                    f"load_layer {self.load_layer!r} needs --load_experiment, the folder to load from; or say noload"
                )
            return ()
        return components


@dataclass
class MixtureArguments:
    """What a mixture is made of."""

    _argument_group_name: ClassVar[str] = "mixture"

    moe_type: Literal["switch", "moe", "none", ""] | None = field(
        default=None,
        metadata={
            "help": "Router: switch is top-1, moe is top-2; none, or empty, is no mixture. If left out, moe for layout "
            "extended and switch for others."
        },
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Experts per token; the router's own (1 or 2) if left out."}
    )
    mpo_layers: str = field(
        default="mlp",
        metadata={
            "help": "Comma list of components whose matrices become MPOs: word_embed, mlp, attention; nompo for none, "
            "which leaves whole experts, or the dense model if there is no mixture."
        },
    )
    linear_trunc: int = field(
        default=NO_TRUNCATION, metadata={"help": "Largest bond of a feed-forward MPO; 30000 is no truncation."}
    )
    emb_trunc: int = field(
        default=NO_TRUNCATION, metadata={"help": "Largest bond of the word embedding's MPO; 30000 is no truncation."}
    )
    attention_trunc: int = field(
        default=NO_TRUNCATION, metadata={"help": "Largest bond of an attention MPO; 30000 is no truncation."}
    )
    layout: Literal["extended", "balanced"] = field(
        default="extended",
        metadata={
            "help": "How experts share a matrix: extended adds low-rank experts inside of it; balanced is the paper's, "
            "MPOs whose outputs are mixed."
        },
    )
    expert_rank: int = field(default=MPOEConfig.expert_rank, metadata={"help": "extended: rank of each expert."})
    expert_scale: float = field(
        default=MPOEConfig.expert_scale, metadata={"help": "extended: scale of the experts, relative to the base's."}
    )
    expert_activation: Literal["gelu", "relu", "silu"] | None = field(
        default=None, metadata={"help": "extended: a non-linearity inside the experts; none if left out."}
    )
    frozen_router: bool = field(default=False, metadata={"help": "Keep the routers' random initial weights."})
    balancing: Literal["bias", "loss", "none"] | None = field(
        default=None,
        metadata={
            "help": "How experts are kept evenly loaded: by a bias in their selection, by the paper's auxiliary loss, "
            "or not. If left out, loss if --load_balancing_coef is given, else bias."
        },
    )
    balancing_step: float = field(
        default=MPOEConfig.balancing_step,
        metadata={"help": "bias: its change per optimizer step, relative to 1 / num_experts."},
    )
    num_sites: int | None = field(
        default=None, metadata={"help": "balanced: site tensors per matrix, odd; 5 if left out."}
    )
    max_auxiliary_bond: int | None = field(
        default=None, metadata={"help": "Cap on the full bonds beside the central tensor: smaller auxiliaries."}
    )
    site_dims: str | None = field(
        default=None,
        metadata={"help": 'Site dimensions by shape, JSON: {"3072x768": [[192,16,1], [1,2,384]]}.'},
    )
    gauge: Literal["identity", "central", "sqrt"] = field(
        default="identity", metadata={"help": "Gauge of the MPOs; identity keeps the matrix as central tensor."}
    )
    share_central: bool = field(
        default=True,
        metadata={"help": "Whether experts share their central tensor; without, each is an MPO, only for comparison."},
    )
    routing: Literal["token", "sequence", "prefix"] = field(
        default="token",
        metadata={
            "help": "What is routed as one: every token, a whole input by the mean of its tokens, or a whole input by "
            "its first four tokens, which name T5's task. The last two are for encoders."
        },
    )
    stacks: str | None = field(
        default=None,
        metadata={
            "help": "Comma list of the stacks that are changed: encoder, decoder. If left out, finetune on "
            "text-to-text tasks with labels puts experts into the encoder alone (a label's decoder sees little but its "
            "start token, and its routers collapse); else they go into all."
        },
    )
    layers: str | None = field(
        default=None, metadata={"help": "Comma list of block indices that are changed; all if left out."}
    )
    offset_scale: float = field(
        default=MPOEConfig.offset_scale, metadata={"help": "Relative size of a step on the auxiliary tensors."}
    )
    expert_noise: float = field(
        default=MPOEConfig.expert_noise, metadata={"help": "Relative standard deviation of noise on the auxiliaries."}
    )
    expert_bias: Literal["base", "none", "shared", "expert"] = field(
        default="base",
        metadata={
            "help": "Biases of the experts: shared by those of a layer, or one for each expert; base is shared where "
            "the base has any, none refuses such a base."
        },
    )
    feed_forward: str | None = field(
        default=None,
        metadata={
            "help": 'Where a model that mpoe does not know keeps its feed-forward networks, JSON: {"path": '
            '"layers.*.ffn", "up": "w1", "down": "w2", "activation": "act"}.'
        },
    )
    switch_dropout: float | None = field(
        default=None, metadata={"help": "Dropout inside the experts; the model's own if left out."}
    )
    is_scale_prob: bool = field(
        default=False, metadata={"help": "Multiply an expert's output by its router probability."}
    )
    router_gradient: Literal["router", "all", "none"] = field(
        default="router",
        metadata={"help": "How far the gradient of the weights p / p goes; all: to the tokens too, as the reference."},
    )
    capacity_factor: float | None = field(
        default=None,
        metadata={
            "help": "In training an expert takes at most factor * tokens / experts tokens (and at least 4), the others "
            "pass through the residual; nothing is dropped if left out. (GShard trains with 1.25.)"
        },
    )
    eval_capacity_factor: float | None = field(
        default=None, metadata={"help": "The same in evaluation. (GShard evaluates with 2.0.)"}
    )
    second_policy_train: Literal["all", "none", "threshold", "random"] = field(
        default="all",
        metadata={
            "help": "moe: whether a token goes to its second expert in training: all, none, threshold (its weight "
            "exceeds second_threshold) or random (with probability weight / second_threshold)."
        },
    )
    second_policy_eval: Literal["all", "none", "threshold", "random"] = field(
        default="all", metadata={"help": "The same in evaluation."}
    )
    second_threshold: float = field(
        default=MPOEConfig.second_threshold, metadata={"help": "Threshold of these policies."}
    )
    router_jitter: float = field(
        default=MPOEConfig.router_jitter, metadata={"help": "Router inputs are multiplied by 1 +- this in training."}
    )
    load_balancing_coef: float | None = field(
        default=None, metadata={"help": "Weight of the load-balancing loss; 0.01 if left out (--balancing loss)."}
    )
    router_z_loss_coef: float = field(
        default=MPOEConfig.router_z_loss_coef, metadata={"help": "Weight of the routers' z-loss."}
    )
    compute: Literal["auto", "apply", "rebuild", "cached"] = field(
        default="auto",
        metadata={
            "help": "How products with MPOs are computed: auto is the cheapest way (see mpoe inspect --plan), apply "
            "multiplies no matrix out, rebuild always, cached keeps the matrices in evaluation."
        },
    )
    matrix_cache_gib: float = field(
        default=MPOEConfig.matrix_cache_gib,
        metadata={
            "help": "Memory for matrices kept multiplied out in evaluation, and as much again under gradient "
            "accumulation, GiB, for the whole model."
        },
    )
    matrix_save_gib: float = field(
        default=MPOEConfig.matrix_save_gib,
        metadata={"help": "Memory for matrices kept from the forward to the backward pass, GiB, for the whole model."},
    )

    def mpoe_config(
        self, num_experts: int, seed: int = 0, default_stacks: tuple[str, ...] | None = None
    ) -> MPOEConfig | None:
        """What the flags make of a model; None if it is to stay dense.

        Args:
            num_experts: Experts per feed-forward layer, count.
            seed: Seed of the routers and the noise.
            default_stacks: Where the experts go if no flag says so; None is everywhere.

        Raises:
            ValueError: A flag's value that makes no sense, named.
        """
        if self.switch_dropout is not None and not 0 <= self.switch_dropout <= 1:
            raise ValueError(f"switch_dropout must be in [0, 1]; got {self.switch_dropout}")
        mpo_layers = flag_values.components("mpo_layers", self.mpo_layers, nothing="nompo") or ()
        for flag in ("linear_trunc", "emb_trunc", "attention_trunc"):
            bond = flag_values.bond(flag, getattr(self, flag))
            if bond is not None and self.layout == "extended" and "mlp" in mpo_layers:
                raise ValueError(
                    f"{flag} must be {NO_TRUNCATION} with layout extended, which truncates nothing; got {bond}. Leave "
                    "it out, or add --layout balanced"
                )
        read = {
            "moe_type": "none" if self.moe_type == "" else self.moe_type,
            "mpo_layers": mpo_layers,
            "max_bond_dim": flag_values.bond("linear_trunc", self.linear_trunc),
            "word_embed_bond_dim": flag_values.bond("emb_trunc", self.emb_trunc),
            "attention_bond_dim": flag_values.bond("attention_trunc", self.attention_trunc),
            "site_dims": flag_values.json_object("site_dims", self.site_dims),
            "stacks": flag_values.names(self.stacks),
            "layers": flag_values.integers("layers", self.layers),
            "feed_forward": flag_values.json_object("feed_forward", self.feed_forward),
            "expert_dropout": self.switch_dropout,
        }
        flags = {flag.name for flag in fields(self)}
        same = {of.name: getattr(self, of.name) for of in fields(MPOEConfig) if of.name in flags - set(read)}
        config = MPOEConfig(num_experts=num_experts, seed=seed, **same, **read)
        if config.is_mixture:
            config.stacks = config.stacks or default_stacks
        return config if config.is_mixture or config.mpo_layers else None


@dataclass
class TrainableArguments:
    """What trains, and how fast."""

    _argument_group_name: ClassVar[str] = "what trains, and how fast"

    freeze_model: bool = field(
        default=False,
        metadata={
            "help": "Train feed-forward matrices, experts and routers only; with --tensor_learn experts and routers."
        },
    )
    freeze_encoder: bool = field(default=False, metadata={"help": "Do not train the encoder."})
    freeze_embeds: bool = field(
        default=False, metadata={"help": "Do not train the input embedding and the language-model head."}
    )
    freeze_model_but_lm_head: bool = field(default=False, metadata={"help": "Train the language-model head only."})
    unfreeze_lm_head: bool = field(
        default=False, metadata={"help": "Train the language-model head, whatever the flags above say."}
    )
    unfreeze_layer_norms: bool = field(
        default=False, metadata={"help": "Train the layer norms, whatever the flags above say."}
    )
    tensor_learn: bool = field(
        default=False, metadata={"help": "Do not train the central tensors; an adapter is saved beside the model."}
    )
    update_mpo_layer: str | None = field(
        default=None,
        metadata={
            "help": "Comma list of the components whose MPOs, experts and routers train: word_embed, mlp, attention; "
            "noupdate for none; all if left out."
        },
    )
    train_AT_index: str | None = field(  # noqa: N815  # the reference spells it so
        default=None,
        metadata={"help": "Comma list of the sites, from 0, whose auxiliary tensors train; all if left out."},
    )
    mpo_lr: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the experts (extended) or of the MPOs' tensors (balanced); that of the model if "
            "left out."
        },
    )
    output_lr_ratio: float = field(
        default=1.0, metadata={"help": "extended: learning rate of V, the experts' outputs, over that of U."}
    )
    auxiliary_weight_decay: float | None = field(
        default=None,
        metadata={
            "help": "Weight decay of the auxiliary tensors; if left out 0 (extended) or weight_decay (balanced)."
        },
    )
    gradient_mask_prob: float = field(
        default=0.0,
        metadata={"help": "Probability that a step's update of a central tensor is discarded; 1 is tensor_learn."},
    )
    gradient_mask_level: Literal["tensor", "element"] = field(
        default="tensor", metadata={"help": "Whether whole central tensors or their elements are drawn."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.gradient_mask_prob <= 1:
            raise ValueError(f"gradient_mask_prob must be in [0, 1]; got {self.gradient_mask_prob}")
        if self.tensor_learn and self.gradient_mask_prob:
            raise ValueError(
                "gradient_mask_prob masks the central tensors, which tensor_learn freezes; leave one of them out"
            )

    def own_rates(self) -> tuple[float | None, float | None, float]:
        """Return what `optimizer_for_mpos` takes beside the model and the Trainer's arguments."""
        return self.mpo_lr, self.auxiliary_weight_decay, self.output_lr_ratio

    def freezing(self) -> Freezing:
        """What these flags freeze.

        Raises:
            ValueError: A flag's value that makes no sense, named.
        """
        return Freezing(
            self.freeze_model,
            self.freeze_encoder,
            self.freeze_embeds,
            self.freeze_model_but_lm_head,
            self.unfreeze_lm_head,
            self.unfreeze_layer_norms,
            # a central tensor that never moves needs no gradient
            self.tensor_learn or self.gradient_mask_prob == 1,
            flag_values.components("update_mpo_layer", self.update_mpo_layer, nothing="noupdate"),
            flag_values.integers("train_AT_index", self.train_AT_index),
        )


@dataclass
class FinetuneTrainingArguments(Seq2SeqTrainingArguments):
    """Transformers' own training arguments, with defaults for fine-tuning T5; `mpoe.training.objective` has others."""

    _argument_group_name: ClassVar[str] = "run"

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
    test_routing: bool = field(
        default=False,
        metadata={
            "help": "Evaluate a second time at the end, with every layer's routing shuffled among the tokens: if that "
            "costs nothing, the mixture does nothing."
        },
    )

    def __post_init__(self) -> None:
        check_packages(self)
        super().__post_init__()
        check_values(self)
