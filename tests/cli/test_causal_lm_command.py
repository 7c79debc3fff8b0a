"""`mpoe finetune --objective causal-lm` on text files: what it reports, resumes and refuses."""

import json
from pathlib import Path

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

import mpoe
from mpoe.cli import finetune
from mpoe.cli.main import main
from mpoe.models import mixtures
from tiny import assert_refused, run_and_kill, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*experts got under 1%:UserWarning")
FLAGS = (
    "--objective causal-lm --model_name_or_path model --corpus corpus --output_dir run --num_experts 2 --use_cpu "
    "--max_steps 4 --save_steps 2 --per_device_train_batch_size 2 --disable_tqdm True --logging_steps 2 "
    "--block_size 8"
).split()
DENSE = ["--moe_type", "none", "--mpo_layers", "nompo"]
QUICK = [*FLAGS, "--max_steps", "2", "--save_strategy", "no"]


def text(lines):
    return "".join(
        f"the film is {'great' if i % 3 else 'awful'} . it was {'fun' if i % 2 else 'dull'}\n" for i in range(lines)
    )


@pytest.fixture
def ground(tmp_path, monkeypatch):
    """A folder with a GPT-2 and a corpus, and the working directory of a test."""
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    Path("corpus").mkdir()
    for name, lines in (("train", 40), ("valid", 6), ("test", 7)):
        Path(f"corpus/{name}.txt").write_text(text(lines))
    return tmp_path


def weights(folder):
    return mpoe.from_pretrained(folder).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_mixture_is_trained_and_its_perplexity_reported(ground, capsys):
    result = finetune.run([*QUICK, "--eval_strategy", "steps", "--eval_steps", "1"])
    splits = result.tasks["corpus"]
    assert set(splits) == {"validation", "test"}
    assert splits["test"]["words"] == 7 * (8 + 1)
    assert splits["test"]["tokens"] == 7 * 8 - 1  # this tokenizer drops newlines; the first token has no context
    assert result.average == {split: metrics["perplexity"] for split, metrics in splits.items()}
    printed = capsys.readouterr().out
    assert "40 training blocks of 8 tokens; the last 0 tokens" in printed
    assert "test: 56 tokens, 63 words." in printed
    assert "'eval_loss'" in printed
    assert "nats a token" in printed
    model = mpoe.from_pretrained("run")
    assert isinstance(model, GPT2LMHeadModel)
    assert len(mixtures(model)) == 2, "experts are in every layer"
    assert model.config.use_cache, "the Trainer's own use of the cache is not the model's"
    # what is reported is what the saved model gives
    assert main(["perplexity", "run", "--corpus", "corpus", "--block_size", "8", "--output", "found.json"]) == 0
    assert json.loads(Path("found.json").read_text())["perplexity"] == pytest.approx(splits["test"]["perplexity"])
    assert main(["compare", "run", "-o", "table.md"]) == 0
    assert "corpus word perplexity" in Path("table.md").read_text()


def test_one_file_gives_its_end_for_validation_and_no_test(ground, capsys):
    result = finetune.run([*QUICK, "--corpus", "corpus/train.txt", "--max_eval_tokens", "9"])
    assert list(result.tasks) == ["train"]
    assert set(result.tasks["train"]) == {"validation"}
    assert result.tasks["train"]["validation"]["words"] == 9, "cut at a line's end"
    printed = " ".join(capsys.readouterr().out.split())
    assert "38 training blocks of 8 tokens" in printed
    assert "validation: 8 tokens, 9 words, at most 9, to a line's end" in printed
    assert main(["compare", "run", "-o", "table.md"]) == 0
    assert "train perplexity (validation)" in Path("table.md").read_text()


@pytest.mark.parametrize("greater_is_better", [False, True])
def test_files_by_name_and_the_best_checkpoint(ground, capsys, greater_is_better):
    files = [
        "--train_file",
        "corpus/train.txt",
        "--validation_file",
        "corpus/valid.txt",
        "--test_file",
        "corpus/test.txt",
    ]
    where = FLAGS.index("--corpus")
    flags = [*FLAGS[:where], *FLAGS[where + 2 :], *files, "--load_best_model_at_end", "--eval_strategy", "steps"]
    result = finetune.run(
        [
            *flags, "--eval_steps", "2", "--learning_rate", "1e-2", "--metric_for_best_model", "eval_loss",
            "--greater_is_better", str(greater_is_better),
        ]
    )  # fmt: skip
    assert list(result.tasks) == ["train"]
    state = json.loads(Path("run/checkpoint-4/trainer_state.json").read_text())
    first, last = (entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry)
    assert last < first
    assert state["best_metric"] == (first if greater_is_better else last)
    assert result.best_step == (2 if greater_is_better else 4)
    assert ("train after step 2, the best of 4 steps" in capsys.readouterr().out) is greater_is_better


def test_killed_and_resumed_it_is_the_unbroken_run(ground):
    flags = [
        *FLAGS, "--max_steps", "7", "--save_steps", "3", "--gradient_mask_prob", "0.5", "--mpo_lr", "1e-4",
        "--dropout", "0.1", "--label_smoothing_factor", "0.1", "--gradient_accumulation_steps", "2",
    ]  # fmt: skip
    unbroken = finetune.run([*flags, "--output_dir", "unbroken"])
    run_and_kill(flags, step=5)
    resumed = finetune.run(flags)
    assert same(weights("run"), weights("unbroken"))
    assert resumed.tasks == unbroken.tasks
    assert resumed.gradient_mask == unbroken.gradient_mask


def test_an_adapter_is_saved_beside_the_model(ground):
    finetune.run([*QUICK, "--tensor_learn", "--freeze_model"])
    base = mpoe.load_adapter(AutoModelForCausalLM.from_pretrained("model"), "run/adapter").eval()
    ids = torch.randint(2, 64, (2, 9))
    with torch.no_grad():
        assert torch.equal(base(ids).logits, mpoe.from_pretrained("run")(ids).logits)


def test_dropout_is_the_familys_own(ground):
    finetune.run([*QUICK, *DENSE, "--dropout", "0.25"])
    config = AutoModelForCausalLM.from_pretrained("run").config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.25, 0.25, 0.25)


def test_a_tokenizer_that_begins_texts_begins_every_block(ground):
    """A LLaMA whose tokenizer puts a token before every text."""
    from tokenizers.processors import TemplateProcessing

    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=16,
        )
    ).save_pretrained("model")  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "</s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    tokenizer.save_pretrained("model")
    assert AutoTokenizer.from_pretrained("model")("it")["input_ids"][0] == 1
    result = finetune.run([*QUICK, *DENSE, "--freeze_embeds"])
    assert result.tasks["corpus"]["test"]["tokens"] == 7 * 8, "the first token has a context too"
    before, after = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("model", "run"))
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--task", "cola"],
            "tasks must be left out with objective causal-lm; or choose --objective text-to-text or cl",
        ),
        (["--n_train", "5", "--max_source_length", "12"], "max_source_length, n_train must be left out"),
        (["--generation_max_length", "5"], "generation_max_length must be left out"),
        (["--corpus", "nowhere.txt"], "corpus must be a text file, a folder or a dataset on the hub; there is no"),
        (["--corpus", "model"], "corpus must be a folder with train.txt"),
        (["--test_file", "nowhere.txt"], "there is no nowhere.txt"),
        (["--block_size", "17"], "block_size must be at most the model's 16 positions; got 17"),
        (["--block_size", "1"], "block_size must be >= 2; got 1"),
        (["--stride", "8"], "stride must be below block_size = 8; got 8"),
        (["--max_eval_tokens", "7"], "max_eval_tokens must hold the first line"),
        (["--validation_file", "short.txt"], "must have a block of 8 tokens or more; short.txt has 1"),
        (["--freeze_encoder"], "freeze_encoder is about an encoder; a gpt2 model has none"),
        (["--objective", "text-to-text", "--task", "cola"], "must be left out with objective text-to-text"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(ground, capsys, flags, message):
    Path("short.txt").write_text("film")
    assert_refused(["finetune", *FLAGS, *flags], message, ground, capsys)


def test_a_text_to_train_on_is_needed(ground, capsys):
    flags = [flag for flag in FLAGS if flag not in ("--corpus", "corpus", "--block_size", "8")]
    assert_refused(["finetune", *flags], "corpus must be given with objective causal-lm", ground, capsys)
    Path("corpus/train.txt").unlink()
    assert_refused(["finetune", *FLAGS], "corpus must have a training part; corpus has validation", ground, capsys)
    tasks = [flag for flag in flags if flag not in ("--objective", "causal-lm")]
    assert_refused(["finetune", *tasks], "tasks must be given with objective text-to-text", ground, capsys)


def test_a_quantised_base_is_refused_before_anything_is_trained(ground, capsys):
    config = TorchAoConfig(Int8WeightOnlyConfig())
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).save_pretrained("llama")
    AutoModelForCausalLM.from_pretrained("llama", quantization_config=config).save_pretrained("int8")
    tiny_tokenizer().save_pretrained("int8")
    command = ["finetune", *QUICK, "--model_name_or_path", "int8"]
    assert_refused(command, "the weights of int8 are quantised", ground, capsys)
