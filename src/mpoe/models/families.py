"""Where each family of models keeps its feed-forward networks, attention and word embedding: one row a family.

A new family is a new row; nothing else needs to know its name. `mpoe.models.find` reads the rows.

A name in a row is the end of a module's full name, with a star for every number; the first star is the block's index.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class FeedForwardNames:
    """Where the parts of one kind of feed-forward network are.

    The fields are the keys of `MPOEConfig.feed_forward`, by which users describe a model that has no row here.

    Attributes:
        path: Name of the module that holds the parts, "layers.*.mlp".
        up: The matrix D -> F, a linear layer: an attribute of that module, dots allowed.
        down: The matrix F -> D.
        activation: The activation, a module or function.
        gate: The activated matrix D -> F of a gated network; None for a plain one, and where `is_fused`.
        is_fused: Whether `up` is both matrices D -> F of a gated network in one, the activated one's rows first.
        dropout: The dropout between the activation and `down`, a module or a probability; None if there is none.
        output_dropout: The one after `down`, if it is in the module that is replaced.
        at: The module that the mixture replaces, where it is not the whole of `path`. The model then goes on to call
            the other parts, which are made to pass everything through.
        stack: "encoder" or "decoder".
    """

    path: str
    up: str
    down: str
    activation: str
    gate: str | None = None
    is_fused: bool = False
    dropout: str | None = None
    output_dropout: str | None = None
    at: str = ""
    stack: str = "decoder"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FeedForwardNames:
        """A user's description.

        Args:
            values: Fields and values, path, up, down and activation at least.

        Raises:
            ValueError: An unknown key, a missing one, or a value of another type.
        """
        known = {field.name: field for field in fields(cls)}
        needed = {"path", "up", "down", "activation"}
        if not needed <= values.keys() <= known.keys():
            raise ValueError(
                f"feed_forward must have the keys {sorted(needed)} and may have {sorted(known.keys() - needed)}; got "
                f"{sorted(values)}"
            )
        for name, value in values.items():
            kind = bool if name == "is_fused" else str
            if not isinstance(value, kind) and not (value is None and known[name].default is None):
                raise ValueError(f"feed_forward[{name!r}] must be of type {kind.__name__}; got {value!r}")
        if values.get("stack", "decoder") not in ("encoder", "decoder"):
            raise ValueError(f"feed_forward['stack'] must be 'encoder' or 'decoder'; got {values['stack']!r}")
        if "*" not in values["path"]:
            raise ValueError(f"feed_forward['path'] must have a star for the block's index; got {values['path']!r}")
        return cls(**values)

    @property
    def parts(self) -> tuple[str, ...]:
        """The attributes of all parts that there are."""
        return tuple(
            name for name in (self.up, self.gate, self.down, self.activation, self.dropout, self.output_dropout) if name
        )


@dataclass(frozen=True)
class AttentionNames:
    """Where the attention's linear layers are.

    Attributes:
        paths: Names of the modules that hold them.
        layers: Attributes of those, dots allowed.
        stack: "encoder" or "decoder".
    """

    paths: tuple[str, ...]
    layers: tuple[str, ...]
    stack: str = "decoder"


@dataclass(frozen=True)
class EmbeddingNames:
    """The modules that a word embedding is made of.

    Attributes:
        table: The embedding.
        head: The language-model head, with or without a matrix of its own.
        users: Other modules that look words up in the same table.
    """

    table: str
    head: str
    users: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Where the models of one family keep their parts.

    Attributes:
        feed_forwards: One for every kind of feed-forward network.
        attention: One for every stack; empty if it is not known.
        word_embed: None if it is not known, or of a form that an MPO has not.
    """

    feed_forwards: tuple[FeedForwardNames, ...]
    attention: tuple[AttentionNames, ...] = ()
    word_embed: EmbeddingNames | None = None


def name_pattern(name: str) -> re.Pattern[str]:
    """What matches the full names that end in a row's name; its first group is the block's index.

    Args:
        name: With a star for every number.
    """
    return re.compile(r"(?:^|\.)" + re.escape(name).replace(r"\*", r"(\d+)") + "$")


def _t5() -> Family:
    blocks = {"encoder": "encoder.block.*.layer.1", "decoder": "decoder.block.*.layer.2"}
    common = {"down": "wo", "activation": "act", "dropout": "dropout"}
    return Family(
        tuple(
            FeedForwardNames(f"{block}.DenseReluDense", **matrices, **common, stack=stack)  # pyright: ignore[reportArgumentType]
            for stack, block in blocks.items()
            for matrices in ({"up": "wi_1", "gate": "wi_0"}, {"up": "wi"})  # v1.1 and flan; v1.0
        ),
        (
            AttentionNames(("encoder.block.*.layer.0.SelfAttention",), ("q", "k", "v", "o"), "encoder"),
            AttentionNames(
                ("decoder.block.*.layer.0.SelfAttention", "decoder.block.*.layer.1.EncDecAttention"),
                ("q", "k", "v", "o"),
            ),
        ),
        EmbeddingNames("shared", "lm_head", ("encoder.embed_tokens", "decoder.embed_tokens")),
    )


def _bert(attention: tuple[str, ...] = ("self.query", "self.key", "self.value", "output.dense")) -> Family:
    """The model's own `output` adds the residual and normalises; of it, only the matrix is taken."""
    names = FeedForwardNames(
        "encoder.layer.*", "intermediate.dense", "output.dense", "intermediate.intermediate_act_fn", at="intermediate",
        stack="encoder",
    )  # fmt: skip
    return Family(
        (names,),
        (AttentionNames(("encoder.layer.*.attention",), attention, "encoder"),),
        EmbeddingNames("embeddings.word_embeddings", "decoder"),
    )


def _llama(attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> Family:
    return Family(
        (FeedForwardNames("layers.*.mlp", "up_proj", "down_proj", "act_fn", gate="gate_proj"),),
        (AttentionNames(("layers.*.self_attn",), attention),),
        EmbeddingNames("embed_tokens", "lm_head"),
    )


def _bart() -> Family:
    """The matrices are attributes of the whole layer, whose forward calls them one by one."""
    names = FeedForwardNames(
        "decoder.layers.*", "fc1", "fc2", "activation_fn", dropout="activation_dropout", at="fc1",
    )  # fmt: skip
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    return Family(
        (replace(names, path="encoder.layers.*", stack="encoder"), names),
        (
            AttentionNames(("encoder.layers.*.self_attn",), projections, "encoder"),
            AttentionNames(("decoder.layers.*.self_attn", "decoder.layers.*.encoder_attn"), projections),
        ),
    )


_GEMMA = replace(_llama(), word_embed=None)  # its embedding scales what it looks up

FAMILIES: dict[str, Family] = {
    "t5": _t5(),
    "mt5": _t5(),
    "gpt2": Family(
        (FeedForwardNames("h.*.mlp", "c_fc", "c_proj", "act", output_dropout="dropout"),),
        (AttentionNames(("h.*.attn",), ("c_attn", "c_proj")),),
        EmbeddingNames("wte", "lm_head"),
    ),
    "bert": _bert(),
    "roberta": _bert(),
    "xlm-roberta": _bert(),
    "electra": _bert(),
    "deberta-v2": _bert(("self.query_proj", "self.key_proj", "self.value_proj", "output.dense")),
    "distilbert": Family(
        (
            FeedForwardNames(
                "transformer.layer.*.ffn", "lin1", "lin2", "activation", output_dropout="dropout", stack="encoder"
            ),
        ),
        (AttentionNames(("transformer.layer.*.attention",), ("q_lin", "k_lin", "v_lin", "out_lin"), "encoder"),),
        EmbeddingNames("embeddings.word_embeddings", "vocab_projector"),
    ),
    "bart": _bart(),
    "mbart": _bart(),
    "opt": Family(
        (FeedForwardNames("decoder.layers.*", "fc1", "fc2", "activation_fn", at="fc1"),),
        (AttentionNames(("decoder.layers.*.self_attn",), ("q_proj", "k_proj", "v_proj", "out_proj")),),
        EmbeddingNames("embed_tokens", "lm_head"),
    ),
    "gpt_neox": Family(
        (FeedForwardNames("layers.*.mlp", "dense_h_to_4h", "dense_4h_to_h", "act"),),
        (AttentionNames(("layers.*.attention",), ("query_key_value", "dense")),),
        EmbeddingNames("embed_in", "embed_out"),
    ),
    "gptj": Family(
        (FeedForwardNames("h.*.mlp", "fc_in", "fc_out", "act", output_dropout="dropout"),),
        (AttentionNames(("h.*.attn",), ("q_proj", "k_proj", "v_proj", "out_proj")),),
        EmbeddingNames("wte", "lm_head"),
    ),
    "llama": _llama(),
    "mistral": _llama(),
    "qwen2": _llama(),
    "qwen3": _llama(),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": replace(
        _llama(("qkv_proj", "o_proj")),
        feed_forwards=(FeedForwardNames("layers.*.mlp", "gate_up_proj", "down_proj", "activation_fn", is_fused=True),),
    ),
    "vit": Family(
        (FeedForwardNames("layers.*.mlp", "fc1", "fc2", "activation_fn", stack="encoder"),),
        (AttentionNames(("layers.*.attention",), ("q_proj", "k_proj", "v_proj", "o_proj"), "encoder"),),
    ),
}

T5_SIZES: dict[str, dict[str, int]] = {
    "t5-small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5-large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
}
"""Published sizes of T5 v1.0 (Raffel et al., JMLR 2020, §3.7), for counting parameters where no hub is reachable."""
