"""What others wrote is shown letter by letter: on a terminal, in a table, in Markdown."""

import io
import json
import sys

import pytest
from rich.console import Console

import mpoe
from mpoe.cli.generate import _Streamer
from mpoe.cli.main import main
from mpoe.models import ParameterCount
from mpoe.nn import RouterStatistics
from mpoe.printable import markdown, printable
from mpoe.report import PlainConsole, metrics_table, parameter_table, router_table
from tiny import FLAGS, tiny_t5, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*experts got under 1%:UserWarning")

MARKUP = ["[red]x", "[/]", "[/red]", "[link=file:///etc/passwd]x[/link]", ":skull:", "[bold", "\\[red]"]
CONTROL = {
    "\x1b[2J": r"\x1b[2J", "\x1b]0;title\x07": r"\x1b]0;title\x07", "\x9b31m": r"\x9b31m", "a\rb": r"a\rb",
    "\x08": r"\x08", "\x00": r"\x00", "\x7f": r"\x7f", "\u202egnp.exe": r"\u202egnp.exe", "\u2066x": r"\u2066x",
    "\udce9": r"\udce9", "\u2028": r"\u2028",
}  # fmt: skip


@pytest.mark.parametrize(("text", "shown"), CONTROL.items())
def test_control_characters_are_spelt(text, shown):
    assert printable(text) == shown
    assert printable(f"a{text}b") == f"a{shown}b"


@pytest.mark.parametrize("text", ["", "a text.", "Amélie, naïve", "日本語", "👩‍💻", "نیم‌فاصله", "[red] \\ | <b> 100%"])
def test_other_texts_stay(text):
    assert printable(text) == text


def test_line_ends_stay_where_they_are_asked_for():
    assert printable("a\tb\nc\r\x1b", keep="\n\t") == "a\tb\nc\\r\\x1b"
    assert printable("a\tb\nc") == r"a\tb\nc"


def shown(console_class, renderable):
    file = io.StringIO()
    console = console_class(file=file, width=200, color_system="truecolor", force_terminal=True)
    console.print(renderable, highlight=False)
    return file.getvalue()


@pytest.mark.parametrize("console", [Console, PlainConsole])
@pytest.mark.parametrize("name", MARKUP)
def test_names_in_tables_are_no_markup(console, name):
    statistics = RouterStatistics(
        share=[1.0, 0.0], entropy=0.1, mean_probability=[1.0, 0.0], gate_mass=[1.0, 0.0], dropped_fraction=0.0
    )
    count = ParameterCount(**dict.fromkeys(ParameterCount.__dataclass_fields__, 1))
    for table in (
        metrics_table({name: {name: 0.5}}, title=name, rows="split"),
        parameter_table({name: count}, title=name),
        router_table({name: statistics}, title=name),
    ):
        assert shown(console, table).count(name) >= 2


@pytest.mark.parametrize("name", CONTROL)
def test_names_in_tables_do_not_act(name):
    text = shown(PlainConsole, metrics_table({name: {name: 0.5}}, title=name))
    assert name not in text
    assert printable(name) in text


@pytest.mark.parametrize("text", MARKUP)
def test_what_a_command_prints_is_no_markup(text):
    assert text in shown(PlainConsole, f"Loading {text} ...")
    assert "\x1b[2J" not in shown(PlainConsole, "Loading \x1b[2J ...")


@pytest.mark.parametrize("name", ["[red]m", "m[/]", "m[/red]", ":skull:"])
def test_a_models_and_a_runs_names(ground, capsys, name):
    (ground / name).parent.mkdir(exist_ok=True)
    (ground / "model").rename(ground / name)
    flags = [name if word == "model" else word for word in FLAGS]
    assert main(["finetune", *flags, "--output_dir", f"run{name}", "--max_steps", "1", "--save_strategy", "no"]) == 0
    assert main(["inspect", "--config", name]) == 0
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"Loading {name} ..." in printed
    assert f"run{name}" in printed
    assert f"{name}, millions" in printed


def test_texts_on_the_terminal_do_not_act(ground, capsys):
    text = "the film\x1b[2J is\tgreat\n[red]\u202e"
    assert main(["predict", "model", text]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert line.rstrip("\n").split("\t")[1] == printable(text)
    assert main(["predict", f"nowhere/\x1b[31m/{text}", text]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error
    assert r"\x1b[31m" in error


def hostile_tokenizer(folder):
    """A tokenizer whose words act on a terminal."""
    tokenizer = tiny_tokenizer()
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    words = values["model"]["vocab"]
    values["model"]["vocab"] = {word if i < 3 else f"\x1b[3{i}m{word}": i for word, i in words.items()}
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(values))


def test_answers_on_the_terminal_do_not_act(ground, capsys):
    hostile_tokenizer(ground / "model")
    for command in (["predict", "model", "x"], ["generate", "model", "x", "--max_new_tokens", "4"]):
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert "\x1b" not in printed
        assert r"\x1b[3" in printed


def test_a_stream_on_the_terminal_does_not_act(capsys):
    _Streamer(tiny_tokenizer()).on_finalized_text("a\x1b[2J\nb", stream_end=True)
    assert capsys.readouterr().out == "a\\x1b[2J\nb\n"


def test_a_conversation_does_not_act(ground, capsys, monkeypatch):
    hostile_tokenizer(ground / "model")
    typed = io.StringIO("x\n")
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", typed)
    assert main(["generate", "model", "--max_new_tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert r"\x1b[3" in printed


@pytest.fixture
def results(ground):
    """The results of a run."""
    assert main(["finetune", *FLAGS, "--max_steps", "1", "--save_strategy", "no"]) == 0
    return json.loads((ground / "run" / "results.json").read_text())


def test_compare_shows_names_as_they_are(ground, results, capsys):
    names = ["a|b", "<script>alert(1)</script>", "[x](javascript:1)", "`c`", "**d**", "[red]e[/]", "&amp;", "f\\"]
    names = [name.replace("/", "⁄") for name in names]  # a folder's name has no slash
    results["tasks"] = {"[bold]t|\x1b[2J</td>": next(iter(results["tasks"].values()))}
    for name in names:
        (ground / "runs" / name).mkdir(parents=True)
        (ground / "runs" / name / "results.json").write_text(json.dumps(results))
    capsys.readouterr()
    assert main(["compare", *(f"runs/{name}" for name in names)]) == 0
    printed = capsys.readouterr().out
    assert [name for name in names if name not in printed] == [], printed
    assert r"[bold]t|\x1b[2J</td> accuracy" in printed
    assert "\x1b" not in printed
    lines = (ground / "runs" / "comparison.md").read_text().splitlines()
    assert len(lines) == 2 + len(names)
    assert {line.count("|") for line in lines} == {lines[1].count("|")}
    assert not set("<>[]`*\\\x1b") & set("".join(lines))


def test_markdown_shows_what_it_is_given():
    assert markdown("a|b") == "a&#124;b"
    assert markdown("my_run-1.5 (test)") == "my_run-1.5 (test)"
    assert markdown("a\nb\x1b") == r"a\nb\x1b".replace("\\", "&#92;")


def test_an_adapters_name_in_an_error_is_spelt():
    model = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=2))
    with pytest.raises(ValueError, match=r"got '\\x1b\[2J'"):
        mpoe.set_adapter(model, "\x1b[2J")
