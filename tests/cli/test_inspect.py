"""`mpoe inspect --scale` and `--plan` as a user types them; the parameter table is in test_commands.py."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig, BertConfig, GPT2Config, LlamaConfig

import mpoe
from mpoe.cli.main import main
from mpoe.models import read_config
from mpoe.report.model_shape import PUBLISHED, model_shape
from mpoe.report.variants import variants
from tiny import assert_refused, tiny_t5, tiny_tokenizer
from tiny_families import tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^```text\n\$ mpoe (inspect .*)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE)


def printed(capsys, *command):
    assert main(["inspect", "--config", *command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    return lines


def row(lines, name):
    """The cells behind the first row of that name."""
    return next(line for line in lines if line.strip().startswith(name)).split(name)[1].split()


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "vit"])
def test_every_family_is_counted(name, tmp_path, capsys):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / name)
    lines = printed(capsys, str(tmp_path / name), "--num_experts", "4")
    dense = f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}"
    assert next(line for line in lines if "dense model" in line).split("│")[2].strip() == dense


def test_scale_of_t5_base(capsys):
    lines = printed(capsys, "t5-base", "--scale", "8", "--num_experts", "8")
    assert row(lines, "dense")[:3] == ["222.9", "222.9", "1.000"]
    assert row(lines, "MPOE extended")[:3] == ["234.8", "234.8", "1.054"]
    assert row(lines, "MPOE adapter")[:3] == ["234.8", "11.9", "0.054"]  # 2·24·64·3840 and 24·768·8
    assert row(lines, "Switch EP")[:2] == ["1,015.8", "1,015.8"]
    eight = lines[lines.index(next(line for line in lines if line.startswith("8 devices"))) :]
    assert row(eight, "dense")[:3] == ["3.72", "0.78", "0"]  # 16 bytes, and 2 · 7/8 · 2 bytes, of 222.9 M
    assert row(eight, "MPOE extended")[1:3] == ["0.82", "0"]
    assert row(eight, "Switch EP")[2] == "0.66"  # 8192 · 4 · 1.25 · 768 · 12 layers · 2 bytes · 7/8
    assert not any(line.startswith("64 devices") for line in lines)


def test_scale_without_numbers_is_for_1_to_1000_devices(capsys):
    lines = printed(capsys, "t5-small", "--scale", "--expert_rank", "4")
    assert [line.strip() for line in lines if "device" in line and line[0].isdigit()] == [
        "1 device",
        "8 devices",
        "64 devices",
        "1,000 devices",
    ]


def test_scale_follows_the_flags(capsys):
    one = printed(capsys, "t5-small", "--scale", "2", "--tokens_per_device", "1000", "--achieved", "0.5")
    two = printed(capsys, "t5-small", "--scale", "2", "--tokens_per_device", "2000", "--achieved", "1.0")
    assert "1,000 tokens a device" in one[0]
    tables = [
        lines[lines.index(next(line for line in lines if line.startswith("2 devices"))) :] for lines in (one, two)
    ]
    first, second = (row(lines, "dense") for lines in tables)
    assert first[1:5] == second[1:5]  # twice the tokens at twice the pace; as many gradients
    assert float(second[-1].replace(",", "")) == pytest.approx(2 * float(first[-1].replace(",", "")), rel=1e-2)


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (GPT2Config(), "124.4"),
        (LlamaConfig(num_hidden_layers=2, hidden_size=512, intermediate_size=1024, num_attention_heads=8), "38.0"),
    ],
    ids=["gpt2", "llama"],
)
def test_scale_of_a_folder_with_a_config(tmp_path, monkeypatch, capsys, config, millions):
    monkeypatch.chdir(tmp_path)
    config.save_pretrained("model")
    assert row(printed(capsys, "model", "--scale", "8"), "dense")[0] == millions
    assert "→" in "".join(printed(capsys, "model", "--plan", "64", "--layout", "balanced"))


def test_a_saved_mixture_and_published_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=3, stacks=("encoder",)))
    model.save_pretrained("mixture")
    total = sum(p.numel() for p in model.parameters()) / 1e6
    assert row(printed(capsys, "mixture", "--scale", "8"), "MPOE extended")[0] == f"{total:.1f}"
    assert row(printed(capsys, "llama-2-70b", "--scale", "8"), "dense")[0] == "68,976.6"
    assert "2,851.6" in "".join(printed(capsys, "t5-3b"))


def test_plan_shows_every_matrix_and_what_was_chosen(capsys):
    lines = printed(capsys, "t5-base", "--plan", "--num_experts", "4", "--layout", "balanced")
    titles = [line.strip() for line in lines if "×" in line]
    shapes = ("3072×768", "768×3072")
    assert titles == [f"{shape}, {what}" for shape in shapes for what in ("evaluation", "a training step")]
    chosen = [line.split() for line in lines if "→" in line and line.strip()[0].isdigit()]
    assert [cells[0] for cells in chosen] == ["1", "32", "512", "4,096"] * 4
    assert {cells[2] for cells in chosen} <= {"apply", "rebuild", "cached"}
    training = [cells for n, cells in enumerate(chosen) if n % 8 >= 4]
    assert "cached" not in {cells[2] for cells in training}
    assert len(printed(capsys, "t5-base", "--plan", "7", "--plan_on", "cuda", "--layout", "balanced")) > 10


def test_both_at_once_and_several_mixtures(capsys):
    flags = "--plan 8 --scale 1 --num_experts 2 4 --layout balanced"
    lines = printed(capsys, "t5-small", *flags.split())
    text = "\n".join(lines)
    assert text.count("t5-small, 2 experts") == text.count("t5-small, 4 experts") == 1
    assert text.count("2 experts, bonds") == text.count("4 experts, bonds") == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--scale 0", "devices must be >= 1; got 0"),
        ("--scale 8 -1", "devices must be >= 1; got -1"),
        ("--scale 1.5", "invalid int value: '1.5'"),
        ("--scale --tokens_per_device -5", "tokens_per_device must be > 0 and finite; got -5"),
        ("--scale --achieved 2", "achieved must be in (0, 1]; got 2.0"),
        ("--scale --network_bandwidth 0", "network_bandwidth must be > 0 and finite; got 0.0"),
        ("--scale --moe_type none --mpo_layers nompo", "--plan and --scale need a mixture"),
        ("--scale --num_experts 1", "only mixtures of feed-forward layers whose experts share a matrix are costed"),
        ("--plan --layout balanced --mpo_layers attention", "only mixtures of feed-forward layers whose experts share"),
        ("--plan 0 --layout balanced", "tokens must be >= 1; got 0"),
        ("--plan 8", "only matrices of layout 'balanced' are planned; got 'extended'"),
        ("--expert_rank 0", "expert_rank must be an integer >= 1; got 0"),
        ("--linear_trunc 8", "linear_trunc must be 30000 with layout extended"),
        ("--plan --plan_on tpu", "invalid choice: 'tpu'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(tmp_path, capsys, flags, message):
    assert_refused(["inspect", "--config", "t5-small", *flags.split()], message, tmp_path, capsys)


def test_unknown_models_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    BertConfig().save_pretrained("bert")
    known = "bert must be of a model type whose sizes are known, one of gpt2, llama, mistral, qwen2, t5; got 'bert'"
    assert_refused(["inspect", "--config", "bert", "--scale"], known, tmp_path, capsys)
    nowhere = "nothing/there/at must be a folder with a config.json"
    assert_refused(["inspect", "--config", "nothing/there/at", "--plan"], nowhere, tmp_path, capsys)


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_docs_show_what_the_command_prints(capsys, command, output):
    """If this fails, the page is out of date: put in what the command prints now."""
    assert [line.rstrip() for line in printed(capsys, *command.split()[1:])] == output.splitlines()


def test_the_docs_show_several_models_and_compare_more():
    """The rows of the page's first table are what `--scale` prints as ratios."""
    assert {command.split()[1] for command, _ in SHOWN} == {"t5-base", "llama-2-7b", "llama-2-70b"}
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert {name for name, *_ in rows} == {"t5-base", *PUBLISHED}
    for name, *shown in rows:
        config = AutoConfig.for_model(**PUBLISHED[name]) if name in PUBLISHED else read_config(name)
        found = {variant.name: variant for variant in variants(model_shape(config, name), mpoe.MPOEConfig())}
        extended, adapter, switch = (
            found[of].total_trained / found["dense"].total for of in ("MPOE extended", "MPOE adapter", "Switch")
        )
        flops = found["MPOE extended"].flops_per_token(8192) / found["dense"].flops_per_token(8192)
        expected = (extended, flops, adapter, switch)
        assert shown == [f"{value:.{len(text.split('.')[1])}f}" for value, text in zip(expected, shown, strict=True)]


def read_json(capsys, *command):
    assert main(["inspect", *command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def check_counts(mixture):
    assert len(mixture["matrices"]) == 24
    assert sum(m["central"] + m["auxiliary"] for m in mixture["matrices"]) == sum(
        mixture["parameters"][part] for part in ("central", "auxiliary")
    )


def test_json_has_every_matrix_and_what_was_asked_for(capsys):
    found = read_json(capsys, "t5-small", "--num_experts", "4", "--expert_rank", "3", "--scale", "8")
    mixture = found["columns"]["4 experts"]
    assert found["columns"]["dense"]["matrices"] == []
    check_counts(mixture)
    assert {m["auxiliary"] for m in mixture["matrices"]} == {4 * 3 * (2048 + 512)}
    assert {(m["expert_rank"], m["num_experts"], m["dims"], m["error"]) for m in mixture["matrices"]} == {
        (3, 4, None, None)
    }
    assert {row["devices"] for row in mixture["scale"]} == {8}


def test_json_of_a_balanced_mixture_has_its_plan(capsys):
    found = read_json(capsys, "t5-small", "--num_experts", "4", "--plan", "32", "--scale", "8", "--layout", "balanced")
    mixture = found["columns"]["4 experts"]
    check_counts(mixture)
    assert {matrix["error"] for matrix in mixture["matrices"]} == {0.0}
    assert {row["tokens"] for row in mixture["plan"]} == {32}
    assert {row["devices"] for row in mixture["scale"]} == {8}


@pytest.mark.parametrize("is_saved", [True, False])
def test_extended_matrices_have_a_rank_and_what_they_add(tmp_path, capsys, is_saved):
    """64×32 and 32×64 in four layers, three matrices each; 5 experts of rank 4."""
    model = tiny_t5()
    if is_saved:
        mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=5, expert_rank=4))
    model.save_pretrained(tmp_path / "model")
    flags = [] if is_saved else ["--num_experts", "5", "--expert_rank", "4"]
    lines = printed(capsys, str(tmp_path / "model"), *flags)
    added = f"{4 * 5 * 4 * (64 + 32) / 1e6:.2f}"
    share = f"{5 * 4 * (64 + 32) / (64 * 32):.1%}"
    for name, size in (("wi_0", "64×32"), ("wi_1", "64×32"), ("wo", "32×64")):
        assert row(lines, f"DenseReluDense.{name}") == ["4×", size, "5", "4", added, share]
    assert not any("--plan" in line for line in lines)


def test_the_error_of_a_truncation_is_that_of_the_mixture(tmp_path, capsys):
    dense = tiny_t5()
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    flags = ["--layout", "balanced", "--linear_trunc", "6"]
    predicted = read_json(capsys, str(tmp_path / "dense"), *flags)["columns"]["8 experts"]["matrices"]
    mpoe.upcycle(dense, mpoe.MPOEConfig(layout="balanced", max_bond_dim=6)).save_pretrained(tmp_path / "mixture")
    tiny_tokenizer().save_pretrained(tmp_path / "mixture")
    saved = str(tmp_path / "mixture")
    unknown = read_json(capsys, saved)["columns"]["saved mixture"]["matrices"]
    assert {matrix["error"] for matrix in unknown} == {None}
    measured = read_json(capsys, saved, "--base", str(tmp_path / "dense"))["columns"]["saved mixture"]["matrices"]
    assert [m["name"] for m in measured] == [m["name"] for m in predicted]
    for found, expected in zip(measured, predicted, strict=True):
        assert found["error"] == pytest.approx(expected["error"], rel=1e-3)
        assert found["error"] > 0.1
    lines = printed(capsys, saved, "--base", str(tmp_path / "dense"))
    assert any("DenseReluDense" in line for line in lines)


def test_a_base_is_for_saved_mixtures(tmp_path, capsys):
    assert_refused(["inspect", "t5-small", "--base", "t5-small"], "base is about a saved mixture", tmp_path, capsys)
    mpoe.upcycle(tiny_t5()).save_pretrained(tmp_path / "mixture")
    command = ["inspect", str(tmp_path / "mixture"), "--base", "t5-small"]
    assert_refused(command, "are extended: leave it out", tmp_path, capsys)


def test_what_has_become_of_the_dense_model_is_said(tmp_path, capsys):
    text = " ".join(printed(capsys, "t5-base", "--num_experts", "8"))
    assert "8 experts: 24 feed-forward layers (encoder 12, decoder 12), +5%" in text
    assert "--stacks encoder" in text
    text = " ".join(printed(capsys, "t5-base", "--num_experts", "8", "--stacks", "encoder"))
    assert "8 experts: 12 feed-forward layers (encoder alone)" in text
    assert "Where a task" not in text
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    text = " ".join(printed(capsys, str(tmp_path / "llama"), "--num_experts", "4"))
    assert "feed-forward layers, +" in text
