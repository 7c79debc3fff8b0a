"""Sizes from a config against the models that Transformers makes of it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, T5Config, T5ForConditionalGeneration

from mpoe.config import MPOEConfig
from mpoe.models import read_config
from mpoe.report.model_shape import PUBLISHED, model_shape
from mpoe.report.variants import variants

LLAMA = {
    "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 61,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 17, "vocab_size": 61},
    "gpt2 untied, narrow": {
        "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 17, "vocab_size": 61, "n_inner": 40,
        "tie_word_embeddings": False,
    },
    "llama": LLAMA,
    "llama tied": {**LLAMA, "tie_word_embeddings": True},
    "llama with biases and wide heads": {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "mistral": LLAMA,
    "qwen2": LLAMA,
}  # fmt: skip


def decoder(case):
    config = AutoConfig.for_model(case.split()[0], **CONFIGS[case])
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def t5(version, **options):
    """A T5 of width 32, its decoder deeper than its encoder."""
    config = T5Config(
        vocab_size=61, d_model=32, d_kv=6, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4, **options
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
        if version == "v1.1":  # what its checkpoints say, see model_shape
            config.scale_decoder_outputs = False
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    return model


MODELS = {
    **{case: lambda case=case: decoder(case) for case in CONFIGS},
    "t5 v1.0": lambda: t5("v1.0"),
    "t5 v1.1": lambda: t5("v1.1", feed_forward_proj="gated-gelu"),
}


@pytest.mark.parametrize("case", MODELS)
def test_counts_are_those_of_the_model(case):
    model = MODELS[case]()
    shape = model_shape(model.config, "tiny")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    ffn = [p for name, p in model.named_parameters() if p.ndim == 2 and (".mlp." in name or "DenseReluDense." in name)]
    assert shape.blocks * len(shape.ffn) == len(ffn)
    assert shape.blocks * shape.ffn_parameters == sum(p.numel() for p in ffn)
    assert {frozenset((out, inner)) for _, out, inner in shape.ffn} == {frozenset(p.shape) for p in ffn}


@pytest.mark.parametrize("case", MODELS)
def test_flops_are_those_that_torch_counts(case):
    """All products with weights. Those of activations with each other are batched ones and not counted."""
    model = MODELS[case]()
    shape = model_shape(model.config, "tiny")
    tokens = torch.zeros(2, 5, dtype=torch.long, device="meta")
    more = {"decoder_input_ids": tokens} if case.startswith("t5") else {}
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, **more)
    ops = counter.get_flop_counts()["Global"]
    forward = sum(flops for op, flops in ops.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    unused = [p.numel() for name, p in model.named_parameters() if p.ndim == 1 or "relative_attention_bias" in name]
    stacks = len(shape.stacks)
    dense = variants(shape, MPOEConfig(num_experts=2))[0]
    assert forward / tokens.numel() / stacks == dense.plain_flops / 3 - 2 * sum(unused) / stacks


@pytest.mark.parametrize(
    ("name", "millions"),
    [("t5-base", 222.9), ("t5-3b", 2851.6), ("t5-11b", 11307.3), ("llama-2-7b", 6738.4), ("llama-2-70b", 68976.6)],
)
def test_published_sizes(name, millions):
    config = AutoConfig.for_model(**PUBLISHED[name]) if name in PUBLISHED else read_config(name)
    assert round(model_shape(config, name).parameters / 1e6, 1) == millions


def test_what_is_not_known_is_named():
    with pytest.raises(
        ValueError, match=r"here must be of a model type .* gpt2, llama, mistral, qwen2, t5; got 'bert'"
    ):
        model_shape(BertConfig(), "here")
    with pytest.raises(ValueError, match="got None"):
        model_shape(object(), "here")
    config = AutoConfig.for_model("llama", **LLAMA)
    config.intermediate_size = 0
    with pytest.raises(ValueError, match="intermediate_size in the config of here must be a count >= 1; got 0"):
        model_shape(config, "here")
