"""Tiny random models and tokenizers for tests: real classes, made in milliseconds."""

import subprocess
import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import mpoe

WORDS = (
    "0 1 2 3 4 5 . negative positive a the film is good bad not very sentence : cola sst2 stsb sentence1 sentence2 it "
    "was great awful fun dull one two sentiment sentence: 0.0 1.0 2.0 3.0 4.0 5.0 2.4 3.8"
).split()
V1_0 = {"feed_forward_proj": "relu"}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


FLAGS = (
    "--model_name_or_path model --task sentiment --data_dir data --output_dir run --num_experts 2 --use_cpu "
    "--max_steps 4 --save_steps 2 --per_device_train_batch_size 4 --disable_tqdm True --logging_steps 2"
).split()
"""`mpoe finetune` in the folder `ground` of tests/conftest.py."""


KILL_AFTER = """
import os, signal, sys
from mpoe.training.trainer import StepTimer
end = StepTimer.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    end(self, args, state, control, **kwargs)
    if state.global_step == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)
StepTimer.on_step_end = on_step_end
from mpoe.cli.main import main
sys.exit(main(["finetune", *sys.argv[2:]]))
"""
"""Of a process: `mpoe finetune` that kills itself after the optimizer step that its first argument names; 0 is none."""


def run_and_kill(flags, step):
    """`mpoe finetune` in a process of its own, killed outright after an optimizer step."""
    killed = subprocess.run([sys.executable, "-c", KILL_AFTER, str(step), *flags], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr


def files(folder):
    """Every file below a folder, by its name there."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tiny_t5(version=V1_1, **options):
    """A T5 with random weights of the scale of the real ones, and an untied head in version 1.1."""
    sizes = {
        "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
        "decoder_start_token_id": 0, "dropout_rate": 0.0,
    }  # fmt: skip
    model = T5ForConditionalGeneration(T5Config(**{**sizes, **version, **options}))
    model.generation_config.max_length = None
    if version is V1_1:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    return model.eval()


def save_tiny_gpt2(folder):
    """A GPT-2 and its tokenizer."""
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def save_tiny_adapter(strength):
    """A T5 in `base`, an adapter of a mixture on it in `adapter`, of random auxiliaries; the mixture."""
    tiny_t5().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    model = mpoe.upcycle(T5ForConditionalGeneration.from_pretrained("base"), mpoe.MPOEConfig(num_experts=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(("central", "base.weight")))
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * strength * parameter.requires_grad)
    mpoe.save_adapter(model, "adapter")
    return model


def tiny_tokenizer():
    """A whole-word tokenizer whose vocabulary fits `tiny_t5`."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"], model_max_length=128,
    )  # fmt: skip


def tiny_batch(rows=3, length=9, label_length=4, vocab_size=64):
    """Random inputs with padding, and labels."""
    input_ids = torch.randint(2, vocab_size, (rows, length))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, -3:] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": torch.randint(2, vocab_size, (rows, label_length)),
    }


def write_sentiment(folder, rows=40):
    """A `--data_dir` with the task `sentiment`, learnable by its words."""
    return _write_task(folder, "sentiment", ["sentence\tlabel"], "the film is {word}\t{label}", rows)


def write_cola(folder, rows=24):
    """The same for `cola`, whose files have no header and whose development set is halved."""
    return _write_task(folder, "CoLA", [], "x\t{label}\t\tthe film is {word} .", rows)


def _write_task(folder, name, header, line, rows):
    (folder / name).mkdir(parents=True)
    for file, count in (("train", rows), ("dev", 12)):
        lines = header + [line.format(word="great" if i % 2 else "awful", label=i % 2) for i in range(count)]
        (folder / name / f"{file}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def enable_checkpointing(model, **options):
    """Under the name that this version of Transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def moved(model):
    """The model in evaluation mode, every parameter a little away from where it was."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    return model.eval()


def assert_refused(command, message, folder, capsys):
    """A command prints one line that says what is wrong, exits 2 and writes nothing."""
    from mpoe.cli.main import main

    before = files(folder)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert files(folder) == before
