"""The page as text: what is in it, and that no name or text in it is ever code."""

import json
import re
from html.parser import HTMLParser

import pytest

import report_runs
from mpoe.report.page import RunReport, is_report, report_page
from mpoe.report.page.charts import Series, line_chart, number
from mpoe.report.page.run import layer_labels
from mpoe.report.page.sections import parameter_bars
from report_runs import dense, mixture

HOSTILE = [
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "\"><img src=x onerror=alert(1)>",
    "' onmouseover='alert(1)", "<!--", "]]>", "</style><style>*{display:none}", "{{ 7 * 7 }}", "&lt;b&gt;", "</title>",
]  # fmt: skip


class Page(HTMLParser):
    """The elements of a page, their attributes, and the text that a reader sees."""

    VOID = ("meta", "input", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def tags(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join("".join(self.text).split())


@pytest.fixture(scope="module")
def page():
    return Page(report_page([mixture(), dense()], "A fine film ."))


def test_it_has_every_part(page):
    assert page.open == []
    for words in (
        "mpoe-8", "dense", "google/flan-t5-small", "8 experts in 8 layers", "Training loss", "Validation accuracy",
        "0.8125", "1.42", "encoder 0", "decoder 3", "Router entropy", "Load-balancing loss", "gradient mask",
        "mpoe-8 with whole experts", "308.0 M", "How the experts move apart", "Entanglement entropy of bond 1",
        "encoder 0, up", "dense: no experts, so no token has one.",
    ):  # fmt: skip
        assert words in page.words, words
    assert "What is missing" not in page.words
    assert "the dense model of mpoe-8" not in page.words, "it is one of the runs"


def test_it_asks_nothing_of_the_network(page):
    text = report_page([mixture()], None)
    assert not re.search(r"https?://|\burl\(|@import|\bfetch\(|XMLHttp", text)
    assert not any("src" in attributes for _, attributes in page.elements)
    assert all(attributes["href"].startswith("#") for attributes in page.tags("a"))
    policy = next(m["content"] for m in page.tags("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "'unsafe-inline'" not in policy.split("script-src")[1]


def test_it_can_be_used_without_eyes_or_mouse(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes["for"] for attributes in page.tags("label")}
    for attributes in page.tags("input"):
        assert attributes["type"] == "range"
        assert attributes["id"] in labelled
    charts = [attributes for attributes in page.tags("svg") if attributes.get("role") == "img"]
    assert len(charts) > 20
    assert all(len(attributes["aria-label"]) > 20 for attributes in charts)
    assert all(attributes.get("aria-hidden") for attributes in page.tags("svg") if attributes not in charts)
    assert page.tags("html")[0]["lang"] == "en"
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "for"):
            assert attributes.get(name) in (None, *ids)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_and_texts_are_never_code(name):
    layers = [f"encoder.{name}.{n}.mlp" for n in range(2)]
    run = mixture(name, task=name, words=(name, "film"), layers=layers, model=name)
    noted = RunReport(f"{name} too", name, notes=[name])
    harmless = mixture(words=("b", "film"), layers=["encoder.a.0.mlp", "encoder.a.1.mlp"])
    plain = Page(report_page([harmless, RunReport("x", "y", notes=["z"])], "t"))
    hostile = Page(report_page([run, noted], name))
    assert hostile.open == []
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements], "no element came from a name"
    for (_, expected), (_, got) in zip(plain.elements, hostile.elements, strict=True):
        assert expected.keys() == got.keys(), "no attribute came from a name"
    assert name in "".join(hostile.text)
    assert hostile.words.count(" ".join(name.split())) >= 6


def test_characters_that_act_are_spelt():
    text = report_page([mixture("a\u202eb\x1b", words=("\u2066x", "\x00"))], "t")
    assert not re.search("[\u202e\u2066\x00\x1b]", text)
    assert r"a\u202eb\x1b" in text


def test_data_for_the_script_is_whole(page):
    heat, gates = [attributes for attributes in page.tags("table") if "data-values" in attributes]
    shares, masses = json.loads(heat["data-values"]), json.loads(gates["data-values"])
    assert len(shares) == len(masses) == 25, "24 logging steps, and the evaluation at the end"
    assert all(abs(sum(layer) - 100_000) <= 100 for step in shares for layer in step)
    assert all(abs(sum(layer) - 60_000) <= 100 for step in masses[:-1] for layer in step)
    assert all(sum(layer) == 50_000 for layer in masses[-1])
    assert float(heat["data-even"]) == pytest.approx(100_000 / 8, rel=1e-3)
    assert float(gates["data-even"]) == pytest.approx((24 * 60_000 + 50_000) / 25 / 8, rel=1e-3)
    assert heat["data-heat"] == gates["data-heat"]
    slider = next(attributes for attributes in page.tags("input") if attributes["id"] == heat["data-heat"])
    names = json.loads(slider["data-names"])
    assert (names[0], names[-1], slider["max"]) == ("step 5", "evaluation at the end", "24")


def test_an_older_log_has_no_gate_mass():
    lines = report_runs.log(steps=(5, 10))
    for line in lines:
        for of in line["layers"].values():
            del of["gate_mass"]
    old = Page(report_page([RunReport("old", "m", log=lines)]))
    assert len([attributes for attributes in old.tags("table") if "data-values" in attributes]) == 1
    assert "Smallest gate mass" not in old.words
    both = Page(report_page([RunReport("old", "m", report_runs.result(), log=lines)]))
    _, gates = [attributes for attributes in both.tags("table") if "data-values" in attributes]
    values = json.loads(gates["data-values"])
    assert values[0] == values[1] == [[None] * 8] * 8
    assert values[2] == [[6250] * 8] * 8


@pytest.mark.parametrize(
    "run",
    [
        RunReport("new", "m", notes=["Not finished."]),
        RunReport("old", "m", report_runs.result()),
        RunReport("none", "m", report_runs.result(experts=0)),
        RunReport("running", "m", log=report_runs.log(steps=[5])),
        RunReport("same", "m", log=[{"step": 1, "loss": 0.0}, {"step": 2, "loss": 0.0}]),
        RunReport("holes", "m", log=[{"step": 1, "loss": None, "layers": {"a": {"share": [1.0]}}}]),
    ],
    ids=lambda run: run.name,
)
def test_a_run_that_lacks_something_has_a_page_too(run):
    for runs in ([run], [run, mixture()]):
        page = Page(report_page(runs))
        assert page.open == []
        assert run.name in page.words
        assert "No text was given" in page.words


def test_pages_know_each_other():
    assert is_report(report_page([dense()])[:1000])
    assert not is_report("<!doctype html><title>x</title>")


def test_layers_have_short_names_that_tell_them_apart():
    names = ["encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"]
    assert list(layer_labels(names).values()) == ["encoder 0", "decoder 0"]
    assert list(layer_labels(["transformer.h.0.mlp", "transformer.h.11.mlp"]).values()) == ["layer 0", "layer 11"]
    assert list(layer_labels(["a.0.mlp", "b.0.mlp", "mlp"]).values()) == ["a.0", "b.0", "mlp"]


def test_bars_are_to_scale_and_shown_once():
    bars = parameter_bars([mixture(), mixture("again"), dense()])
    assert [bar.label for bar in bars] == ["mpoe-8", "again", "dense", "mpoe-8 with whole experts"]
    widths = [sum(width for *_, width in bar.parts) for bar in bars]
    assert widths[-1] == pytest.approx(100)
    assert widths[0] == pytest.approx(100 * 92.765664 / 308)
    assert widths[2] == pytest.approx(25)


def test_a_charts_lines_are_where_its_ticks_say():
    chart = line_chart("t", "step", [Series("a", [(0, 1.0), (50, 3.0), (100, 2.0)])])
    places = {tick.label: tick.place for tick in chart.x_ticks}
    x, y = zip(*(map(float, point.split()) for point in chart.lines[0].path[1:].split("L")), strict=True)
    assert (x[0], x[2]) == pytest.approx((places["0"], places["100"]), abs=0.1)
    heights = {tick.label: tick.place for tick in chart.y_ticks}
    assert y == pytest.approx([heights["1"], heights["3"], heights["2"]], abs=0.1)
    assert chart.rows == [["0", "1"], ["50", "3"], ["100", "2"]]
    assert "a from 1 to 2" in chart.summary


def test_a_logarithmic_chart_leaves_out_what_has_no_logarithm():
    chart = line_chart("t", "n", [Series("a", [(1, 1.0), (10, 0.01), (100, 0.0)])], is_log=True)
    assert chart.lines[0].path.count("L") == 1
    assert {tick.label for tick in chart.y_ticks} == {"0.01", "0.1", "1"}
    assert line_chart("t", "n", [Series("a", [])]) is None


def test_thousands_of_steps_are_thinned():
    chart = line_chart("t", "step", [Series("a", [(n, float(n % 7)) for n in range(10_000)])])
    assert chart.lines[0].path.count("L") < 240
    assert len(chart.rows) <= 24
    run = RunReport("long", "m", log=report_runs.log(steps=range(5, 20_000, 5)))
    assert len(report_page([run])) < 500_000


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (1234.5, "1,234"), (0.81250, "0.8125"), (1e-5, "1.00e-05"), (12.0, "12")]
)
def test_numbers_are_short(value, shown):
    assert number(value) == shown
