"""The names in a reference checkpoint: what they say about it, and which of them each of our tensors has there.

Shape letters: E experts; m sites.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from mpoe.config import MPOEConfig
from mpoe.models.find import find_attention
from mpoe.models.reference_file import SITE_KEY


@dataclass(frozen=True)
class ReferenceLayout:
    """What the names in a checkpoint say about it.

    Attributes:
        moe_type: "switch" or "moe".
        num_experts: E.
        num_sites: m.
        components: As `MPOEConfig.mpo_layers`.
        has_biases: Whether the experts' matrices have biases.
        has_own_head: Whether the language-model head is not the word embedding's table.
    """

    moe_type: str
    num_experts: int
    num_sites: int
    components: tuple[str, ...]
    has_biases: bool
    has_own_head: bool

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> ReferenceLayout:
        """Read it from the names.

        Args:
            tensors: A checkpoint by the reference's names.

        Raises:
            ValueError: None or several kinds of mixture, one expert, or an even number of sites.
        """
        sites = [match for match in map(SITE_KEY.fullmatch, tensors) if match]
        matrices = {match["matrix"] for match in sites}
        types = {m[1] for matrix in matrices if (m := re.search(r"\.(sffn|moe_layer)\.experts\.", matrix))}
        if len(types) != 1:
            raise ValueError(
                "a reference checkpoint must hold the site tensors of one kind of mixture, with names like "
                "encoder.block.0.layer.1.sffn.experts.0.wi_mpo.tensor_set.0 or "
                f"encoder.block.0.layer.1.moe_layer.experts.w1_mpo.0; got {_first(tensors)}"
            )
        if types == {"sffn"}:
            numbers = [int(m[1]) for matrix in matrices if (m := re.search(r"\.sffn\.experts\.(\d+)\.", matrix))]
            num_experts = 1 + max(numbers)
        else:
            gates = [tensor for key, tensor in tensors.items() if key.endswith(".gate.w_gating")]
            num_experts = max((gate.shape[-1] for gate in gates if gate.ndim), default=0)
        num_sites = 1 + max(int(match["site"]) for match in sites)
        if num_experts < 2 or num_sites % 2 == 0:
            raise ValueError(
                "a mixture must have at least 2 experts, and its matrices an odd number of site tensors; got "
                f"{num_experts} experts and {num_sites} site tensors"
            )
        has = {
            "mlp": True,
            "attention": any("Attention." in matrix for matrix in matrices),
            "word_embed": not matrices.isdisjoint(("shared", "lm_head")),
        }
        return cls(
            moe_type="switch" if types == {"sffn"} else "moe",
            num_experts=num_experts,
            num_sites=num_sites,
            components=tuple(name for name, is_there in has.items() if is_there),
            has_biases=any(re.search(r"\.moe_layer\.experts\.b[12]$", key) for key in tensors),
            has_own_head=any(key.startswith("lm_head") for key in tensors),
        )


@dataclass(frozen=True)
class ReferenceMatrix:
    """One matrix of the base model that the checkpoint holds as site tensors.

    Attributes:
        weight: Its parameter in the base model.
        experts: The `MPOExperts` that takes its place in the mixture.
        component: Of `MPOEConfig.mpo_layers`.
        shape: (out, in).
        prefixes: What stands before the number of the site: one for each expert, or one for all.
        bias: Its bias in the checkpoint.
    """

    weight: str
    experts: str
    component: str
    shape: tuple[int, int]
    prefixes: tuple[str, ...]
    bias: str | None = None

    def keys(self, layout: ReferenceLayout) -> list[str]:
        """All its names in the checkpoint.

        Args:
            layout: Of the checkpoint.
        """
        sites = [f"{prefix}{k}" for prefix in self.prefixes for k in range(layout.num_sites)]
        return sites if self.bias is None else [*sites, self.bias]


def find_matrices(
    model: T5ForConditionalGeneration, feed_forwards: list[str], layout: ReferenceLayout
) -> list[ReferenceMatrix]:
    """The base model's matrices that a checkpoint holds as site tensors.

    Args:
        model: The base, on any device.
        feed_forwards: The names of its feed-forward modules.
        layout: Of the checkpoint.
    """
    found = []

    def add(weight: str, experts: str, component: str, prefixes: list[str], bias: str | None = None) -> None:
        rows, columns = model.get_parameter(weight).shape
        found.append(ReferenceMatrix(weight, experts, component, (rows, columns), tuple(prefixes), bias))

    for name in feed_forwards:
        layer = name.removesuffix(".DenseReluDense")
        for n, (dense, ours) in enumerate((("wi", "up"), ("wo", "down")), start=1):
            if layout.moe_type == "switch":
                prefixes = [f"{layer}.sffn.experts.{e}.{dense}_mpo.tensor_set." for e in range(layout.num_experts)]
                bias = None
            else:
                prefixes = [f"{layer}.moe_layer.experts.w{n}_mpo."]
                bias = f"{layer}.moe_layer.experts.b{n}" if layout.has_biases else None
            add(f"{name}.{dense}.weight", f"{name}.{ours}", "mlp", prefixes, bias)
    if "attention" in layout.components:
        for name in find_attention(model, "t5", MPOEConfig()):
            add(f"{name}.weight", f"{name}.experts", "attention", [f"{name}_mpo.tensor_set."])
    if "word_embed" in layout.components:
        add("shared.weight", "shared.experts", "word_embed", ["shared_mpo.tensor_set."])
        if layout.has_own_head:
            add("lm_head.weight", "lm_head.experts", "word_embed", ["lm_head_mpo.tensor_set."])
    return found


def plain_names(
    model: nn.Module, feed_forwards: list[str], matrices: list[ReferenceMatrix], layout: ReferenceLayout
) -> dict[str, str]:
    """The checkpoint's names of all that is no matrix product operator, by our name.

    Args:
        model: The base, on any device.
        feed_forwards: The names of its feed-forward modules.
        matrices: From `find_matrices`.
        layout: Of the checkpoint.
    """
    replaced = {matrix.weight for matrix in matrices}
    names = {name: name for name, _ in model.named_parameters() if name not in replaced}  # tied ones once
    for name in feed_forwards:
        layer = name.removesuffix(".DenseReluDense")
        if layout.moe_type == "switch":
            names |= {f"{name}.router.{part}": f"{layer}.sffn.switch.{part}" for part in ("weight", "bias")}
        else:
            names[f"{name}.router.weight"] = f"{layer}.moe_layer.gate.w_gating"
    return names


def check_names(tensors: Mapping[str, Tensor], expected: set[str]) -> None:
    """Refuse a checkpoint in which a tensor is missing, or for one of whose tensors there is no place.

    Args:
        tensors: The checkpoint by the reference's names.
        expected: All the names that it must have.

    Raises:
        ValueError: The names differ.
    """
    missing, unknown = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or unknown:
        parts = [f"{len(k)} {what}: {_first(k)}" for k, what in ((missing, "missing"), (unknown, "unknown")) if k]
        raise ValueError(
            f"the checkpoint must hold the tensors of the config's model and no others; {'; '.join(parts)}. Is it the "
            "config of this checkpoint's base?"
        )


def _first(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "")
