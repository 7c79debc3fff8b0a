"""A training step of a causal language model: the model's own loss, however the step is cut into micro-batches."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, default_data_collator

import mpoe
from mpoe.training.arguments import FinetuneTrainingArguments
from mpoe.training.corpus import TokenizedText
from mpoe.training.language_modeling import Blocks
from mpoe.training.objective import TrainerParts
from mpoe.training.trainer import IGNORED, build_trainer, step_loss, summed_cross_entropy
from tiny import tiny_tokenizer

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    # The Trainer knows of LLaMA's loss that it shifts labels, and does not know it of GPT-2's.
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64)),
}


def blocks(rows, bos=None):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 64, (rows * 8,), generator=generator).numpy().astype("int32")
    return Blocks(TokenizedText(tokens, 1), 8 + (bos is not None), bos)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def trainer_step(model, tmp_path, rows, micro_batches, repeat=False, label_smoothing=0.0):
    """The gradients of one optimizer step of the real Trainer, cut up or the same batch again and again."""
    args = FinetuneTrainingArguments(
        output_dir=str(tmp_path / str(micro_batches)), use_cpu=True, gradient_accumulation_steps=micro_batches,
        disable_tqdm=True, eval_strategy="no",
    )  # fmt: skip
    loss = step_loss(model, summed_cross_entropy(label_smoothing), shift=True)
    trainer = build_trainer(model, tiny_tokenizer(), args, TrainerParts(None, None, default_data_collator, loss))
    trainer.current_gradient_accumulation_steps = micro_batches
    data = [blocks(rows)[i] for i in range(rows)]
    size = rows if repeat else rows // micro_batches
    cut = [data if repeat else data[i * size : (i + 1) * size] for i in range(micro_batches)]
    batches, num_items = trainer.get_batch_samples(
        iter([default_data_collator(part) for part in cut]), micro_batches, "cpu"
    )  # fmt: skip
    for batch in batches:
        trainer.training_step(model, batch, num_items)
    return gradients(model)


@pytest.mark.parametrize("family", MODELS)
def test_a_step_is_the_mean_over_targets_however_it_is_cut(family, tmp_path):
    model = MODELS[family]().train()
    ids = torch.stack([blocks(6)[i]["input_ids"] for i in range(6)])
    model(input_ids=ids, labels=ids).loss.backward()  # the model's own: the mean over 6 * 7 targets
    expected = gradients(model)
    for micro_batches in (1, 2, 3, 6):
        found = trainer_step(model, tmp_path, 6, micro_batches)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_routers_part_is_the_same_under_accumulation(label_smoothing, tmp_path):
    config = mpoe.MPOEConfig(num_experts=4, balancing="loss", load_balancing_coef=0.5)
    model = mpoe.upcycle(MODELS["gpt2"](), config).train()
    plain = trainer_step(model, tmp_path, 4, 1, label_smoothing=label_smoothing)
    assert any(".router." in name and gradient.norm() > 0 for name, gradient in plain.items())
    accumulated = trainer_step(model, tmp_path, 4, 3, repeat=True, label_smoothing=label_smoothing)
    for name, gradient in plain.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-3, atol=1e-6)


def test_label_smoothing_is_transformers():
    from transformers.modeling_outputs import CausalLMOutput
    from transformers.trainer_pt_utils import LabelSmoother

    logits, labels = torch.randn(3, 8, 64), torch.stack([blocks(3)[i]["labels"] for i in range(3)])
    ours = step_loss(MODELS["gpt2"](), summed_cross_entropy(0.1), shift=True)(CausalLMOutput(logits=logits), labels)
    expected = LabelSmoother(0.1)({"logits": logits}, labels, shift_labels=True)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


def test_blocks_are_the_text_packed():
    text = TokenizedText(torch.arange(10, 33).numpy().astype("int32"), 1)
    plain, with_bos = Blocks(text, 5), Blocks(text, 5, bos=1)
    assert (len(plain), plain.dropped) == (4, 3)
    assert torch.cat([plain[i]["input_ids"] for i in range(4)]).tolist() == list(range(10, 30))
    assert plain[1]["labels"].tolist() == [IGNORED, 16, 17, 18, 19]
    assert (len(with_bos), with_bos.dropped) == (5, 3)
    assert with_bos[1]["input_ids"].tolist() == [1, 14, 15, 16, 17]
    assert with_bos[1]["labels"].tolist() == [IGNORED, 14, 15, 16, 17]
