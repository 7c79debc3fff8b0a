"""`MPOEConfig`: every choice about a mixture, validated. Knows no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

LAYOUTS = ("separable", "balanced")
GAUGES = ("identity", "central", "sqrt")
COMPONENTS = ("mlp",)


@dataclass
class MPOEConfig:
    """What a mixture is made of.

    The same object goes to `mpoe.upcycle(model, config)`, to `from_pretrained(..., quantization_config=config)` and,
    as a dictionary, into the `config.json` of a saved model.

    Attributes:
        num_experts: Experts per feed-forward layer, count, >= 1.
        mpo_layers: Components whose matrices become matrix product operators: `("mlp",)`. Empty: the experts are whole
            dense matrices, which is the +Switch baseline of the paper.
        layout: How each matrix is cut into sites. "separable" (the first site carries only outputs, the last only
            inputs; nothing is ever multiplied out) or "balanced" (the paper's: every site carries a piece of both).
        num_sites: Site tensors per matrix, odd; None is the layout's own, 3 for separable and 5 for balanced.
        max_auxiliary_bond: Cap on the two full bonds beside the central tensor, count, >= 1; this is the knob for how
            large the auxiliary tensors are, and it loses nothing. None is the size of the paper's shapes.
        max_bond_dim: Truncation: keep at most this many singular values on every bond, count, >= 1; None is exact.
        site_dims: Site dimensions by matrix shape, for those who want their own:
            `{"3072x768": [[4, 4, 8, 6, 4], [3, 4, 4, 4, 4]]}`, outputs first. Shapes not named are planned.
        gauge: Where the freedom on the bonds goes. "identity": auxiliaries start as identities and the central tensor
            is the matrix itself, reshaped; "central": isometries around the centre; "sqrt": the square root of the
            singular values on both sides of every bond, as in the reference implementation.
        stacks: Which stacks get experts, of "encoder" and "decoder"; None is every stack that the model has.
        layers: Which blocks of these stacks get experts, by index from 0; None is all.
        offset_scale: An auxiliary tensor is `start + s * parameter` with s = offset_scale * rms(start) / rms(central),
            dimensionless, > 0. It makes one learning rate serve the whole model; towards 0 the mixture becomes dense
            fine-tuning.
        expert_noise: Standard deviation of the random part of the auxiliaries at the start, relative to their rms,
            dimensionless, >= 0. At 0 all experts are the pre-trained layer and only routing tells them apart.
        is_scale_prob: Multiply an expert's output by its router probability (as Switch does) instead of by p / p, whose
            value is 1 and whose gradient still reaches the router. Upcycling keeps the function only with False.
        load_balancing_coef: Weight of the load-balancing loss, averaged over layers, in the model's loss, >= 0.
        seed: Seed of the routers' initial weights and of the expert noise.
    """

    num_experts: int = 8
    mpo_layers: tuple[str, ...] = ("mlp",)
    layout: str = "separable"
    num_sites: int | None = None
    max_auxiliary_bond: int | None = None
    max_bond_dim: int | None = None
    site_dims: dict[str, Any] | None = None
    gauge: str = "identity"
    stacks: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    offset_scale: float = 0.3
    expert_noise: float = 0.0
    is_scale_prob: bool = False
    load_balancing_coef: float = 0.01
    seed: int = 0

    quant_method: ClassVar[str] = "mpoe"
    """The name under which Transformers' loader finds the format (see `mpoe.models.checkpoint`)."""

    def __post_init__(self) -> None:
        self.mpo_layers = tuple(self.mpo_layers)
        self.stacks = None if self.stacks is None else tuple(self.stacks)
        self.layers = None if self.layers is None else tuple(self.layers)
        _require(self.layout in LAYOUTS, "layout", f"one of {LAYOUTS}", self.layout)
        _require(self.gauge in GAUGES, "gauge", f"one of {GAUGES}", self.gauge)
        for name in ("num_experts", "num_sites", "max_auxiliary_bond", "max_bond_dim"):
            value = getattr(self, name)
            optional = name != "num_experts"
            _require((optional and value is None) or _is_count(value), name, "an integer >= 1", value)
        _require(set(self.mpo_layers) <= set(COMPONENTS), "mpo_layers", f"a list of {COMPONENTS}", self.mpo_layers)
        _require(
            self.stacks is None or (self.stacks and set(self.stacks) <= {"encoder", "decoder"}),
            "stacks", "a list of 'encoder' and 'decoder'", self.stacks,
        )  # fmt: skip
        _require(
            self.layers is None or (self.layers and all(_is_count(n + 1) for n in self.layers)),
            "layers", "a list of block indices >= 0", self.layers,
        )  # fmt: skip
        _require(_is_number(self.offset_scale) and self.offset_scale > 0, "offset_scale", "> 0", self.offset_scale)
        for name in ("expert_noise", "load_balancing_coef"):
            value = getattr(self, name)
            _require(_is_number(value) and value >= 0, name, ">= 0", value)

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
            ValueError: A key that is no field.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known - {"quant_method"})
        if unknown:
            raise ValueError(
                f"keys of an MPOEConfig must be among {sorted(known)}; got {unknown}; remove or rename them"
            )
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults; Transformers prints this."""
        defaults = MPOEConfig().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != defaults[name]}


def _require(holds: object, name: str, must: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {must}; got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
