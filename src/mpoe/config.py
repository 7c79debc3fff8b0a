"""`MPOEConfig`: every choice about a mixture, validated. Knows no torch."""

from __future__ import annotations

import dataclasses
import reprlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from mpoe.config_checks import are_matrices, are_site_dims, is_count, is_index, is_number, require

LAYOUTS = ("extended", "balanced")
GAUGES = ("identity", "central", "sqrt")
COMPONENTS = ("word_embed", "mlp", "attention")
MOE_TYPES = ("switch", "moe", "none")
SECOND_POLICIES = ("all", "none", "threshold", "random")
BIASES = ("base", "none", "shared", "expert")
ACTIVATIONS = ("gelu", "relu", "silu")
BALANCING = ("bias", "loss", "none")
ROUTING = ("token", "sequence", "prefix")
COMPUTE = ("auto", "apply", "rebuild", "cached")
ROUTER_GRADIENTS = ("router", "all", "none")
MAX_EXPERTS = 2**20  # a router scores all of them for every token
MAX_EXPERT_RANK = 2**20  # larger than any matrix


@dataclass
class MPOEConfig:
    """What a mixture is made of.

    The same object goes to `mpoe.upcycle(model, config)`, to `from_pretrained(..., quantization_config=config)` and,
    as a dictionary, into the `config.json` of a saved model.

    Attributes:
        num_experts: Experts per feed-forward layer, count, 1 .. MAX_EXPERTS; 1 is no mixture (see `is_mixture`).
        moe_type: Router. "switch": the most probable expert; "moe": the two most probable; "none": no router, every
            layer is one network (layout "extended": all gates are 1). None is the layout's own: "moe" for "extended",
            "switch" for the others.
        top_k: Experts per token, count, 1 .. num_experts; None is the type's own, 1 for switch and 2 for moe.
        mpo_layers: Components whose matrices become matrix product operators, of "word_embed", "mlp" and "attention".
            Without "mlp" the experts of a mixture are whole dense matrices: the paper's +Switch and +MoE baselines.
            Without a mixture, plain MPO compression.
        layout: How the experts of a matrix W share it. "extended": y = W x + b + s · V (g ⊙ U x); the base's linear
            layer stays in place and every expert extends the bonds beside W by `expert_rank` dimensions of its own.
            "balanced" (the paper's): every expert is an MPO of `num_sites` sites, and outputs are mixed.
        expert_rank: Layout "extended": r, the dimensions that each expert adds to a matrix, count, >= 1.
        expert_scale: Layout "extended": s = expert_scale · rms(W z) / rms(z) with a Gaussian z, dimensionless, > 0. It
            makes one learning rate suit V whatever the scale of W.
        expert_activation: Layout "extended": a non-linearity between U and V, "gelu", "relu" or "silu". With it an
            expert cannot be merged into W. `None` disables it.
        frozen_router: Whether the router keeps its random initial weights.
        balancing: How the load of the experts is balanced. "bias": a bias per expert, used to select the top k and
            never as a weight, moves against the expert's excess load once per optimizer step. "loss": the auxiliary
            loss of Switch Transformers and of the paper, weighed by `load_balancing_coef`. "none". None is "loss" if
            `load_balancing_coef` is given, else "bias".
        balancing_step: What a step of balancing "bias" adds to an expert's bias or takes from it, relative to the mean
            probability 1 / num_experts, dimensionless, > 0.
        num_sites: Layout "balanced": site tensors per matrix, odd; None is 5.
        max_auxiliary_bond: Cap on the two full bonds beside the central tensor, count, >= 1; this is the knob for how
            large the auxiliary tensors are, and it loses nothing. None is the size of the paper's shapes.
        max_bond_dim: Truncation of the feed-forward matrices: keep at most this many singular values on every bond,
            count, >= 1; None is exact.
        word_embed_bond_dim: The same for the word embedding.
        attention_bond_dim: The same for the attention's matrices.
        site_dims: Site dimensions by matrix shape, for those who want their own:
            `{"3072x768": [[4, 4, 8, 6, 4], [3, 4, 4, 4, 4]]}`, outputs first; `"o:768x768"` is for the matrices called
            "o" alone. Shapes not named are planned.
        matrices: Single matrices by their full name in the dense model, with site dimensions and inner bonds of their
            own: `{"encoder.block.0.layer.1.DenseReluDense.wi": {"site_dims": [[192, 16, 1], [1, 2, 384]],
            "bonds": [100, 200]}}`. `mpoe compress` writes it.
        gauge: Where the freedom on the bonds goes. "identity": auxiliaries start as identities and the central tensor
            is the matrix itself, reshaped; "central": isometries around the centre; "sqrt": the square root of the
            singular values on both sides of every bond, as in the reference implementation; at the learning rate that
            suits the other two it learned nothing, its central tensors' elements being tens of times
            smaller.
        auxiliary_start: Whether an auxiliary tensor is an offset from what it started as (see `offset_scale`), which is
            kept beside it. Without, it is its own parameter: smaller, and the learning rate of the whole model does not
            suit it. `mpoe compress` writes such models.
        share_central: Whether the experts of a layer share its central tensor. Without, each expert is an MPO of its
            own: larger than whole experts, and only there to be compared with.
        feed_forward: Where a model keeps its feed-forward networks, if no row of `mpoe.models.families` says so: the
            fields of `FeedForwardNames` there, like
            `{"path": "layers.*.ffn", "up": "w1", "down": "w2", "activation": "act"}`.
        stacks: Which stacks' feed-forward and attention layers are changed, of "encoder" and "decoder"; None is every
            stack that the model has.
        layers: Which blocks of these stacks, by index from 0; None is all.
        offset_scale: An auxiliary tensor is `start + s * parameter` with s = offset_scale * rms(start) / rms(central),
            dimensionless, > 0. It makes one learning rate serve the whole model; towards 0 the mixture becomes dense
            fine-tuning.
        expert_noise: Standard deviation of the random part of the auxiliaries at the start, relative to their rms,
            dimensionless, >= 0. At 0 all experts are the pre-trained layer and only routing tells them apart.
        is_scale_prob: Multiply an expert's output by its router probability (as Switch does) instead of by p / p, whose
            value is 1 and whose gradient still reaches the router. Upcycling keeps the function only with False.
        router_gradient: How far the gradient of p / p goes. It is that of a function which does not depend on p, so
            it tells the router little and the tokens nothing that is true. "router": to the router's weights; then
            nothing reaches the tokens through a router, neither from the load-balancing loss. "all": to the tokens
            too, as in the reference. "none": routers learn from the load-balancing loss alone. Weights that count
            (is_scale_prob, top_k >= 2) have their own gradient whatever this says.
        expert_bias: Biases of the expert matrices: "shared" by all experts of a layer (as in the paper's code), or one
            an "expert"; where the base has none they start at 0. "none" is for bases without biases. "base" is as the
            base has them, shared.
        expert_dropout: Dropout inside the experts, in [0, 1]; None is the base model's (the reference: switch_dropout).
        routing: What goes to an expert as one. "token": every token by itself. "sequence": all tokens of an input, by
            their mean. "prefix": all tokens of an input, by its first four, which name the task in T5's text-to-text
            tasks, so that tasks, not inputs, get experts. The last two are for encoders, whose tokens see each other.
        capacity_factor: An expert takes at most max(4, capacity_factor · tokens / num_experts) tokens of a training
            batch, > 0; what it cannot take is dropped and passes through the residual. None drops nothing.
        eval_capacity_factor: The same in evaluation.
        second_policy_train: Which experts after the first a token is really sent to in training (top_k >= 2): "all",
            "none", "threshold" (those of a weight > second_threshold) or "random" (kept with probability
            weight / second_threshold). Upcycling keeps the function only with "all" and without capacities.
        second_policy_eval: The same in evaluation.
        second_threshold: A weight, in (0, 1].
        router_jitter: In training a router's inputs are multiplied by uniform noise in [1 - jitter, 1 + jitter], >= 0.
        router_input_norm: Scale a router's inputs to unit root mean square.
        load_balancing_coef: Weight of the load-balancing loss (balancing "loss"), averaged over layers, >= 0; None is
            0.01.
        router_z_loss_coef: Weight of the routers' z-loss, averaged over layers, in the model's loss, >= 0.
        tied_head: With "word_embed": whether the language-model head is the embedding's own table. None is as the model
            has it; `upcycle` writes the answer here for those who load the model.
        compute: How products with MPOs are computed: "auto" lets the planner choose the cheapest way (`mpoe.mpo.plan`),
            "apply" multiplies nothing out, "rebuild" multiplies the matrices of active experts out every time, "cached"
            keeps them in evaluation. Says nothing about what the model is.
        matrix_cache_gib: Memory for matrices that are kept multiplied out in evaluation, for the whole model, GiB,
            >= 0. As much again may be kept from one micro-batch to the next under gradient accumulation.
        matrix_save_gib: Memory for matrices that are kept from the forward to the backward pass, for the whole model,
            GiB, >= 0; those that are not are multiplied out again.
        seed: Seed of the routers' initial weights and of the expert noise.
    """

    num_experts: int = 8
    moe_type: str | None = None
    top_k: int | None = None
    mpo_layers: tuple[str, ...] = ("mlp",)
    layout: str = "extended"
    expert_rank: int = 8
    expert_scale: float = 1.0
    expert_activation: str | None = None
    frozen_router: bool = False
    balancing: str | None = None
    balancing_step: float = 0.01
    num_sites: int | None = None
    max_auxiliary_bond: int | None = None
    max_bond_dim: int | None = None
    word_embed_bond_dim: int | None = None
    attention_bond_dim: int | None = None
    site_dims: dict[str, Any] | None = None
    matrices: dict[str, Any] | None = None
    gauge: str = "identity"
    auxiliary_start: bool = True
    share_central: bool = True
    feed_forward: dict[str, Any] | None = None
    stacks: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    offset_scale: float = 0.3
    expert_noise: float = 0.0
    is_scale_prob: bool = False
    router_gradient: str = "router"
    expert_bias: str = "base"
    expert_dropout: float | None = None
    routing: str = "token"
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    second_policy_train: str = "all"
    second_policy_eval: str = "all"
    second_threshold: float = 0.2
    router_jitter: float = 0.0
    router_input_norm: bool = True
    load_balancing_coef: float | None = None
    router_z_loss_coef: float = 0.0
    tied_head: bool | None = None
    compute: str = "auto"
    matrix_cache_gib: float = 2.0
    matrix_save_gib: float = 0.0
    seed: int = 0

    quant_method: ClassVar[str] = "mpoe"
    """The name under which Transformers' loader finds the format (see `mpoe.models.checkpoint`)."""

    def __post_init__(self) -> None:
        for name in ("mpo_layers", "stacks", "layers"):
            value = getattr(self, name)
            is_list = isinstance(value, Iterable) and not isinstance(value, str | bytes | dict)
            require(is_list or (value is None and name != "mpo_layers"), name, "a list", value)
        self.mpo_layers = tuple(self.mpo_layers)
        self.stacks = None if self.stacks is None else tuple(self.stacks)
        self.layers = None if self.layers is None else tuple(self.layers)
        if self.balancing is None:
            self.balancing = "bias" if self.load_balancing_coef is None else "loss"
        if self.balancing == "loss" and self.load_balancing_coef is None:
            self.load_balancing_coef = 0.01
        require(self.layout != "separable", "layout", f"one of {LAYOUTS}, 'separable' is retired", self.layout)
        for name, choices in (
            ("layout", LAYOUTS), ("gauge", GAUGES), ("moe_type", (*MOE_TYPES, None)), ("expert_bias", BIASES),
            ("second_policy_train", SECOND_POLICIES), ("second_policy_eval", SECOND_POLICIES),
            ("compute", COMPUTE), ("routing", ROUTING), ("router_gradient", ROUTER_GRADIENTS),
            ("balancing", BALANCING), ("expert_activation", (*ACTIVATIONS, None)),
        ):  # fmt: skip
            require(getattr(self, name) in choices, name, f"one of {choices}", getattr(self, name))
        require(is_count(self.num_experts), "num_experts", "an integer >= 1", self.num_experts)
        require(self.num_experts <= MAX_EXPERTS, "num_experts", f"at most {MAX_EXPERTS:,}", self.num_experts)
        require(is_count(self.expert_rank), "expert_rank", "an integer >= 1", self.expert_rank)
        require(self.expert_rank <= MAX_EXPERT_RANK, "expert_rank", f"at most {MAX_EXPERT_RANK:,}", self.expert_rank)
        for name in (
            "top_k", "num_sites", "max_auxiliary_bond", "max_bond_dim", "word_embed_bond_dim", "attention_bond_dim",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value is None or is_count(value), name, "an integer >= 1", value)
        require(
            not self.is_mixture or self.experts_per_token <= self.num_experts,
            "top_k", f"at most num_experts = {self.num_experts}", self.experts_per_token,
        )  # fmt: skip
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            require(self.routing == "token" or value is None, name, "None with a routing of whole inputs", value)
        for name in ("second_policy_train", "second_policy_eval"):
            require(
                getattr(self, name) == "all" or self.experts_per_token > 1,
                name, "'all' where a token has one expert (moe_type 'moe' gives it two)", getattr(self, name),
            )  # fmt: skip
        require(
            all(layer in COMPONENTS for layer in self.mpo_layers),
            "mpo_layers", f"a list of {COMPONENTS}", self.mpo_layers,
        )  # fmt: skip
        require(
            self.stacks is None or (self.stacks and all(stack in ("encoder", "decoder") for stack in self.stacks)),
            "stacks", "a list of 'encoder' and 'decoder'", self.stacks,
        )  # fmt: skip
        require(
            self.layers is None or (self.layers and all(is_index(n) for n in self.layers)),
            "layers", "a list of block indices >= 0", self.layers,
        )  # fmt: skip
        for name in ("offset_scale", "expert_scale", "balancing_step", "capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            optional = name.endswith("capacity_factor")
            require((optional and value is None) or (is_number(value) and value > 0), name, "> 0", value)
            require(value is None or value <= 1e6, name, "at most 1e6", value)
        # beyond these, float32 has no such scales
        for name in ("offset_scale", "expert_scale", "balancing_step"):
            require(1e-9 <= getattr(self, name) <= 1e6, name, "from 1e-9 to 1e6", getattr(self, name))
        for name in (
            "expert_noise", "load_balancing_coef", "router_jitter", "router_z_loss_coef", "matrix_cache_gib",
            "matrix_save_gib",
        ):  # fmt: skip
            value = getattr(self, name)
            if name == "load_balancing_coef" and value is None:
                continue
            require(is_number(value) and value >= 0, name, ">= 0", value)
            require(value <= 1e6, name, "at most 1e6", value)
        require(
            isinstance(self.share_central, bool)
            and (self.share_central or (self.is_mixture and "mlp" in self.mpo_layers)),
            "share_central", "True, or False for a mixture of MPOs (mpo_layers with 'mlp')", self.share_central,
        )  # fmt: skip
        require(self.routing == "token" or self.is_mixture, "routing", "'token' where nothing is routed", self.routing)
        for name in ("is_scale_prob", "router_input_norm", "auxiliary_start", "frozen_router", "tied_head"):
            value, is_optional = getattr(self, name), name == "tied_head"
            must = "True, False or None" if is_optional else "True or False"
            require(isinstance(value, bool) or (is_optional and value is None), name, must, value)
        require(is_index(self.seed) and self.seed < 2**63, "seed", "an integer from 0 to 2**63 - 1", self.seed)
        require(
            are_site_dims(self.site_dims),
            "site_dims", 'None or site dimensions by shape, {"3072x768": [[192, 16, 1], [1, 2, 384]]}', self.site_dims,
        )  # fmt: skip
        require(
            are_matrices(self.matrices), "matrices",
            'None or, by name, {"site_dims": [[192, 16, 1], [1, 2, 384]], "bonds": [100, 200]}', self.matrices,
        )  # fmt: skip
        described = self.feed_forward
        require(
            described is None or (isinstance(described, dict) and all(isinstance(key, str) for key in described)),
            "feed_forward", "None or a description, fields and their values", described,
        )  # fmt: skip
        self._check_layout()
        dropout, threshold = self.expert_dropout, self.second_threshold
        require(dropout is None or (is_number(dropout) and 0 <= dropout <= 1), "expert_dropout", "in [0, 1]", dropout)
        require(is_number(threshold) and 0 < threshold <= 1, "second_threshold", "in (0, 1]", threshold)

    def _check_layout(self) -> None:
        """Refuse options that another layout has and that would change the function; warn about the others."""
        defaults = {of.name: of.default for of in dataclasses.fields(self)}
        changed = {name for name, value in vars(self).items() if value != defaults[name]}
        if self.layout == "extended" and (others := [layer for layer in self.mpo_layers if layer != "mlp"]):
            raise ValueError(f"mpo_layers {others} need layout='balanced'; got layout 'extended', which is for 'mlp'")
        if self.is_extended:
            for name in sorted(changed & set(_REFUSED_BY_EXTENDED)):
                raise ValueError(
                    f"{name} must be left out with layout 'extended', got {reprlib.repr(getattr(self, name))}; use "
                    "layout='balanced' for it"
                )
            unused = changed & set(_UNUSED_BY_EXTENDED)
        else:
            unused = changed & set(_EXTENDED_ALONE)
        if self.balancing != "loss" and self.load_balancing_coef is not None:
            unused.add("load_balancing_coef")
        if self.balancing != "bias" and "balancing_step" in changed:
            unused.add("balancing_step")
        if unused:
            layout = self.layout if "mlp" in self.mpo_layers else "whole experts"
            warnings.warn(
                f"{', '.join(sorted(unused))} has no effect with layout {layout!r} and balancing {self.balancing!r}",
                stacklevel=4,
            )

    @property
    def is_mixture(self) -> bool:
        """Whether feed-forward layers get several experts and a router; if not, only `mpo_layers` are changed."""
        return self.num_experts > 1 and self.moe_type != "none"

    @property
    def is_extended(self) -> bool:
        """Whether the feed-forward matrices are extended; without "mlp" in `mpo_layers` the layout says nothing."""
        return self.layout == "extended" and "mlp" in self.mpo_layers

    @property
    def experts_per_token(self) -> int:
        """K, the number of experts that a token is sent to."""
        return self.top_k or (2 if self.router_type == "moe" else 1)

    @property
    def router_type(self) -> str:
        """`moe_type`, or the layout's own if it is None."""
        return self.moe_type or ("moe" if self.is_extended else "switch")

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready values, with the `quant_method` that Transformers' loader looks for."""
        values = {"quant_method": self.quant_method, **dataclasses.asdict(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], **_: Any) -> MPOEConfig:
        """The inverse of `to_dict`.

        Args:
            values: Field names and values; `quant_method` may be there.

        Raises:
            ValueError: A key that is no field, or the layout 'separable' of mpoe 0.1.
        """
        if "auxiliary_sides" in values:  # written by mpoe 0.1, whose balancing was the loss
            values = {"balancing": "loss", **values}
            if values.pop("auxiliary_sides") != "both" or values.get("layout") == "separable":
                if values.get("mpo_layers"):
                    raise ValueError(
                        "layout 'separable' is retired, and this is a mixture in it; mpoe 0.1.0 (commit cd4991d) is "
                        "the last version that reads it: load it there and train again in layout 'extended' here"
                    )
                values["layout"] = "balanced"  # whole experts, which have no layout
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known - {"quant_method"})
        if unknown:
            raise ValueError(
                f"keys of an MPOEConfig must be among {sorted(known)}; got {unknown}; remove or rename them"
            )
        return cls(**{name: value for name, value in values.items() if name in known})

    def changes_to(self, other: MPOEConfig, names: Iterable[str]) -> str:
        """What another config has otherwise, for an error message; empty if nothing.

        Args:
            other: What is asked for now, where this one is there already.
            names: The fields that count.
        """
        there, now = vars(self), vars(other)
        return ", ".join(f"{name}: {there[name]} there, {now[name]} now" for name in names if there[name] != now[name])

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults; Transformers prints this."""
        defaults = MPOEConfig().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != defaults[name]}


_EXTENDED_ALONE = ("expert_rank", "expert_scale", "expert_activation")
_REFUSED_BY_EXTENDED = (
    "max_bond_dim", "word_embed_bond_dim", "attention_bond_dim", "matrices", "share_central", "expert_bias",
    "capacity_factor", "eval_capacity_factor", "second_policy_train", "second_policy_eval", "second_threshold",
)  # fmt: skip
_UNUSED_BY_EXTENDED = (
    "num_sites", "max_auxiliary_bond", "site_dims", "gauge", "auxiliary_start", "offset_scale", "expert_noise",
    "router_gradient", "compute", "matrix_cache_gib", "matrix_save_gib",
)  # fmt: skip
