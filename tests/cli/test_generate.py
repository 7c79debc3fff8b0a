"""`mpoe generate` and `mpoe score` as a user types them, on tiny models."""

import io
import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import mpoe
from mpoe.cli.main import main
from mpoe.training.text_metrics import bleu_against_corpus, self_bleu
from tiny import assert_refused, moved, save_tiny_adapter, tiny_t5, tiny_tokenizer

PROMPTS = ["a", "abba cafe", "deaf bed"]


def letters_tokenizer():
    """As GPT-2's: bytes, one token that begins and ends texts, none to pad with; of bytes the letters a to f."""
    alphabet = ["<|endoftext|>", *"abcdef", "Ġ", "Ċ"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=64
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A GPT-2 in `gpt2`, mixtures in `gpt2-mixture` and `t5`, prompts in `prompts.txt`, a corpus in `corpus.txt`."""
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 9, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.3)  # large, so that texts vary
    model = GPT2LMHeadModel(config)
    model.save_pretrained("gpt2")
    moved(mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=2))).save_pretrained("gpt2-mixture")
    for name in ("gpt2", "gpt2-mixture"):
        letters_tokenizer().save_pretrained(name)
    moved(mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=2))).save_pretrained("t5")
    tiny_tokenizer().save_pretrained("t5")
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    (tmp_path / "corpus.txt").write_text("abc de fa\n\nfade a cab\nbad\n")
    return tmp_path


def by_hand(name, prompt, new_tokens):
    """What a model goes on with: the most probable token, one at a time, without padding or a cache."""
    if name.startswith("gpt2"):
        model, tokenizer = GPT2LMHeadModel.from_pretrained(name).eval(), letters_tokenizer()
        source, written = None, tokenizer(prompt).input_ids or [0]
    else:
        model, tokenizer = mpoe.from_pretrained(name).eval(), tiny_tokenizer()
        source, written = torch.tensor([tokenizer(prompt).input_ids]), [0]
    begin = len(written)
    for _ in range(new_tokens):
        with torch.no_grad():
            now = torch.tensor([written])
            out = model(input_ids=now) if source is None else model(input_ids=source, decoder_input_ids=now)
        written.append(int(out.logits[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(written[begin:], skip_special_tokens=True)


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "prompts"), [("gpt2", PROMPTS), ("gpt2-mixture", PROMPTS), ("t5", ["the film is good", "bad", "a dull"])]
)
def test_batches_generate_what_single_prompts_do(folder, capsys, name, prompts):
    expected = [by_hand(name, prompt, 12) for prompt in prompts]
    assert main(["generate", name, *prompts, "--max_new_tokens", "12", "--output", "out.jsonl"]) == 0
    assert texts_of(folder / "out.jsonl") == expected
    assert "3 texts written to out.jsonl" in capsys.readouterr().out
    written = [json.loads(line)["prompt"] for line in (folder / "out.jsonl").read_text().splitlines()]
    assert written == prompts
    assert main(["generate", name, *prompts, "--max_new_tokens", "12", "--batch_size", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [" ".join(text.replace("\n", " ").split(" ")).strip() for text in expected]
    assert "Generating: 100%" in printed.err
    assert "3/3" in printed.err


def test_an_adapter_generates_what_its_mixture_does(folder):
    model = save_tiny_adapter(0.3)
    model.save_pretrained("whole")
    flags = ["the film is", "--max_new_tokens", "10", "--output"]
    assert main(["generate", "adapter", *flags, "adapter.jsonl"]) == 0
    assert main(["generate", "base", *flags, "base.jsonl"]) == 0
    assert texts_of(folder / "adapter.jsonl") == [by_hand("whole", "the film is", 10)]
    assert texts_of(folder / "adapter.jsonl") != texts_of(folder / "base.jsonl")


def test_without_a_prompt_a_text_begins_where_texts_begin(folder, capsys):
    assert main(["generate", "gpt2", "--max_new_tokens", "9", "--output", "out.jsonl"]) == 0
    assert texts_of(folder / "out.jsonl") == [by_hand("gpt2", "", 9)]
    assert main(["generate", "t5", "--max_new_tokens", "3"]) == 0


def test_samples_follow_the_seed(folder):
    flags = "--prompts prompts.txt --num_samples 4 --do_sample --top_k 0 --temperature 1.5 --max_new_tokens 10".split()
    for seed, file in (("1", "a.jsonl"), ("1", "b.jsonl"), ("2", "c.jsonl")):
        assert main(["generate", "gpt2", *flags, "--seed", seed, "--batch_size", "5", "--output", file]) == 0
    rows = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(4)]
    assert len({row["text"] for row in rows}) > 6
    assert (folder / "a.jsonl").read_bytes() == (folder / "b.jsonl").read_bytes()
    assert (folder / "a.jsonl").read_bytes() != (folder / "c.jsonl").read_bytes()


def test_beams_give_several_texts_of_a_prompt(folder, capsys):
    flags = ["--num_beams", "3", "--num_samples", "2", "--max_new_tokens", "5", "--output", "out.jsonl"]
    assert main(["generate", "gpt2", *PROMPTS, *flags]) == 0
    texts = texts_of(folder / "out.jsonl")
    assert len(texts) == 6
    assert all(texts[i] != texts[i + 1] for i in (0, 2, 4))


def test_stop_at_newline_cuts_and_lines_hold_whole_texts(folder):
    flags = "a --num_samples 12 --do_sample --max_new_tokens 30 --output".split()
    assert main(["generate", "gpt2", *flags, "whole.jsonl"]) == 0
    assert main(["generate", "gpt2", *flags, "lines.txt"]) == 0
    assert main(["generate", "gpt2", *flags, "cut.jsonl", "--stop_at_newline"]) == 0
    whole, cut = texts_of(folder / "whole.jsonl"), texts_of(folder / "cut.jsonl")
    assert any("\n" in text for text in whole)
    lines = (folder / "lines.txt").read_text().splitlines()
    assert [line.split() for line in lines] == [text.split() for text in whole]
    assert not any("\n" in text for text in cut)
    # A row that has ended draws on, so all rows draw the same tokens as without the stop.
    assert cut == [text.split("\n")[0] for text in whole]


def test_a_text_that_has_reached_its_newline_costs_no_more(folder, capsys, monkeypatch):
    prompt, text = next((p, text) for p in "abcdef" if "\n" in (text := by_hand("gpt2", p, 40)))
    calls, forward = [], GPT2LMHeadModel.forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", counted)
    assert main(["generate", "gpt2", prompt, "--max_new_tokens", "40", "--stop_at_newline"]) == 0
    assert len(calls) == text.index("\n") + 1 < 40, "a character is a token here"
    assert capsys.readouterr().out == text.split("\n")[0].strip() + "\n"


def test_one_text_streams_to_a_terminal(folder, capsys, monkeypatch):
    expected = by_hand("gpt2", "abba", 20)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["generate", "gpt2", "abba", "--max_new_tokens", "20"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_a_conversation_lasts_until_end_of_file(folder, capsys, monkeypatch):
    typed = io.StringIO(f"abba\n{'a' * 80}\ncafe\n")
    typed.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", typed)
    assert main(["generate", "gpt2", "--max_new_tokens", "8"]) == 0
    printed = capsys.readouterr()
    for prompt in ("abba", "cafe"):
        assert by_hand("gpt2", prompt, 8) in printed.out
    assert "has 80 tokens" in printed.err
    assert main(["generate", "gpt2", "--num_samples", "1", "--max_new_tokens", "8"]) == 0
    assert "Ctrl-D" not in capsys.readouterr().out


def test_scores_of_generated_and_of_written_samples_are_the_same(folder, capsys):
    flags = "--num_samples 30 --do_sample --top_k 0 --max_new_tokens 12 --stop_at_newline".split()
    scoring = "--reference corpus.txt --reference_size 2 --self_bleu_size 20 --seed 5 --metrics".split()
    assert main(["generate", "gpt2", *flags, *scoring, "a.json", "--output", "samples.txt"]) == 0
    printed = capsys.readouterr().out
    for text in ("30 samples, each against 2 references", "20 samples, each against the others", "seed 5", "floor 0.1"):
        assert text in printed
    assert main(["generate", "gpt2", *flags, *scoring, "a2.json", "--output", "samples.jsonl"]) == 0
    assert main(["score", "samples.txt", *scoring, "b.json"]) == 0
    assert main(["score", "samples.jsonl", *scoring, "c.json"]) == 0
    generated, *scored = (json.loads((folder / file).read_text()) for file in ("a.json", "b.json", "c.json"))
    assert generated["generation"]["top_k"] == 0
    for file in scored:
        assert all(file[name] == generated[name] for name in file if name != "samples_file")
    samples = texts_of(folder / "samples.jsonl")
    assert main(["score", "samples.txt", "--reference", "corpus.txt", "--metrics", "all.json"]) == 0
    everything = json.loads((folder / "all.json").read_text())
    assert everything["bleu_4"] == bleu_against_corpus(samples, ["abc de fa", "fade a cab", "bad"], 4)
    assert everything["self_bleu_2"] == self_bleu(samples, 2)
    assert everything["references"] == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0.7"], "--temperature changes how tokens are drawn, so it needs --do_sample"),
        (["--top_k", "5"], "--top_k changes"),
        (["--top_p", "0.9"], "--top_p changes"),
        (["--num_samples", "2"], "--num_samples 2 needs --do_sample, or --num_beams of at least as many (got 1)"),
        (["--num_samples", "3", "--num_beams", "2"], "(got 2)"),
        (["--do_sample", "--temperature", "0"], "--temperature must be > 0 and finite; got 0.0"),
        (["--do_sample", "--top_p", "1.5"], "--top_p must be > 0 and <= 1; got 1.5"),
        (["--do_sample", "--top_k", "-1"], "--top_k must be >= 0; got -1"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be >= 1; got 0"),
        (["--repetition_penalty", "nan"], "--repetition_penalty must be > 0"),
        (["--prompts", "prompts.txt"], "got both: leave one out"),
        (["--metrics", "m.json"], "--metrics is about scores"),
        (["--reference_size", "10"], "--reference_size is about scores"),
        (["--reference", "corpus.txt"], "scores need at least 2 samples"),
        (["--reference", "corpus.txt", "--self_bleu_size", "1"], "--self_bleu_size must be >= 2; got 1"),
        (["--reference", "corpus.txt", "--metrics", "m.txt"], "--metrics must be a .json file; got m.txt"),
        (["--reference", "nowhere.txt"], "nowhere.txt must be a readable text file"),
        (["--output", "nowhere/out.txt"], "--output must be a file in a folder that is there"),
        (["--max_new_tokens", "64"], "'ab' has 2 tokens, --max_new_tokens is 64: shorten one of them"),
        (["--beams", "2"], "unknown flag --beams: did you mean --num_beams?"),
    ],
)
def test_wrong_flags_give_one_line(folder, capsys, flags, message):
    assert_refused(["generate", "gpt2", "ab", *flags], message, folder, capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere/at/all", "ab"], "must be a folder with a config.json"),
        (["gpt2", "--prompts", "empty.txt"], "empty.txt must hold a prompt a line; it is empty"),
        (["gpt2", "ab", "ba", "--reference", "empty.txt"], "empty.txt must hold a sentence a line"),
    ],
)
def test_wrong_files_give_one_line(folder, capsys, argv, message):
    (folder / "empty.txt").write_text("")
    assert_refused(["generate", *argv], message, folder, capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prompts.txt"], "name its file with --reference FILE"),
        (["bad.jsonl", "--reference", "corpus.txt"], "bad.jsonl:2: a line must be a JSON object"),
        (["one.txt", "--reference", "corpus.txt"], "there must be >= 2; got 1"),
        (["prompts.txt", "--reference", "corpus.txt", "--reference_size", "0"], "--reference_size must be >= 1; got 0"),
    ],
)
def test_score_refuses_what_it_cannot_score(folder, capsys, argv, message):
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "a"}\n')
    (folder / "one.txt").write_text("a b\n")
    assert_refused(["score", *argv], message, folder, capsys)
