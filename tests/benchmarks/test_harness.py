import importlib.metadata
import json
from itertools import pairwise

import pytest
import torch

import harness
from harness import Row, Samples, Target, compare, parse, parser, ratios, rows_over


class Clock:
    """A clock that only moves when a way says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.log = []
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def way(self, name, *seconds):
        def run():
            self.log.append(name)
            self.now += seconds[min(self.log.count(name), len(seconds)) - 1]

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture(autouse=True)
def keeps_memory(monkeypatch):
    """Whether this C library can be told to; this process is not to be changed by it."""
    can = {"keep": False}
    monkeypatch.setattr(harness, "_keep_memory", lambda: can["keep"])
    return can


def options(tmp_path, *flags):
    return parse(parser("A test."), ["--tiny", "--threads", "1", "--out", str(tmp_path / "results"), *flags])


@pytest.mark.parametrize(
    ("flags", "can", "expected"),
    [
        (["--short"], True, "keep"),
        (["--short"], False, "default"),
        (["--short", "--malloc", "default"], True, "default"),
        (["--tiny"], True, "default"),
    ],
)
def test_results_say_whether_memory_was_kept(flags, can, expected, keeps_memory):
    keeps_memory["keep"] = can
    assert parse(parser("A test."), ["--threads", "1", *flags]).malloc == expected


def test_ways_take_turns_and_every_round_starts_with_another(clock):
    times = compare({"a": clock.way("a", 1.0), "b": clock.way("b", 2.0), "c": clock.way("c", 3.0)}, repeats=4, warmup=1)
    assert {name: samples.values for name, samples in times.items()} == {"a": (1,) * 4, "b": (2,) * 4, "c": (3,) * 4}
    assert "".join(clock.log[-12:]) == "abcbcacababc"


def test_a_short_call_is_repeated_and_its_time_is_that_of_one_call(clock):
    times = compare({"a": clock.way("a", 0.001)}, repeats=2, warmup=1)
    assert times["a"].values == pytest.approx((0.001, 0.001))
    assert len(clock.log) >= 2 * harness.MIN_SAMPLE_S / 0.001


def test_warm_up_is_not_timed(clock):
    assert compare({"a": clock.way("a", 100.0, 50.0, 1.0)}, repeats=2, warmup=2)["a"].values == (1.0, 1.0)


@pytest.mark.parametrize(("budget", "rounds"), [(None, 9), (5.5, 6), (0.5, harness.MIN_ROUNDS)])
def test_a_budget_ends_the_rounds(clock, budget, rounds):
    assert len(compare({"a": clock.way("a", 1.0)}, repeats=9, warmup=1, budget_s=budget)["a"].values) == rounds


def test_ratios_are_taken_round_by_round():
    times = {"dense": Samples((1.0, 2.0, 10.0)), "ours": Samples((2.0, 8.0, 10.0))}
    ratio = ratios(times)["ours"]
    assert ratio.values == (2.0, 4.0, 1.0)
    assert (ratio.median, ratio.min, ratio.max) == (2.0, 1.0, 4.0)  # the ratio of the medians is 4
    assert ratios(times, over="ours")["dense"].values == (0.5, 0.25, 1.0)


def test_rows_have_a_target_over_dense_or_over_another_way():
    values = {"dense": Samples((1.0,)), "Switch": Samples((4.0,)), "ours": Samples((2.0,))}
    targets = {
        ("ours", "dense"): Target(1.5),
        ("ours", "Switch"): Target(0.5),
        ("not measured", "dense"): Target(1.0),
        ("ours", "not measured"): Target(1.0),
    }
    rows = rows_over("case", values, targets)
    assert [(row.way, row.over, row.verdict) for row in rows] == [
        ("dense", "dense", ""), ("Switch", "dense", ""), ("ours", "dense", "missed"), ("ours", "Switch", "passed"),
    ]  # fmt: skip


def test_rows_over_another_way():
    rows = rows_over("case", {"all": Samples((6.0,)), "selected": Samples((4.0,))}, over="selected")
    assert [(row.way, row.over, row.ratio) for row in rows] == [
        ("all", "selected", Samples((1.5,))), ("selected", "selected", Samples((1.0,))),
    ]  # fmt: skip


@pytest.mark.parametrize(("at_most", "median", "holds"), [(True, 2.0, True), (True, 2.1, False), (False, 1.9, False)])
def test_a_target_is_about_the_median(at_most, median, holds):
    assert Target(2.0, at_most).holds(Samples((0.0, median, 9.0))) is holds


def test_a_child_answers_with_its_last_line(tmp_path):
    script = tmp_path / "child.py"
    script.write_text("import sys\nprint('starting')\nprint('{\"flag\": \"' + sys.argv[1] + '\"}')")
    assert harness.run_child(str(script), "--x") == {"flag": "--x"}
    script.write_text("raise SystemExit('no memory left')")
    with pytest.raises(RuntimeError, match=r"(?s)child.py --x exited with 1.*no memory left"):
        harness.run_child(str(script), "--x")


def test_results_file_and_table(tmp_path, capsys):
    args = options(tmp_path, "--seed", "3")
    rows = [
        Row("512 tokens", "dense", Samples((0.001, 0.003))),
        Row("512 tokens", "ours", Samples((0.002, 0.003)), Samples((2.0, 1.0)), "dense", Target(1.4), note="why"),
        Row("memory", "ours", Samples((float(2**21),)), unit="MiB", target=Target(2.0**22)),
    ]
    path = harness.write_results("layer", rows, args)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.name.startswith("layer-")
    assert path.name == path.name.lower()
    written = json.loads(path.read_text())
    assert written["rows"][1] == {
        "case": "512 tokens", "way": "ours", "unit": "s", "over": "dense", "target": "<= 1.4", "verdict": "missed",
        "value": {"median": 0.0025, "min": 0.002, "max": 0.003, "values": [0.002, 0.003]},
        "ratio": {"median": 1.5, "min": 1.0, "max": 2.0, "values": [2.0, 1.0]}, "note": "why",
    }  # fmt: skip
    assert written["rows"][2]["verdict"] == "passed"
    assert written["settings"]["seed"] == 3
    assert written["settings"]["threads"] == 1
    assert written["hardware"]["ram_bytes"] > 2**28
    assert written["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"date", "command", "benchmark"} <= set(written)
    shown = capsys.readouterr().out
    assert "2.50 (2.00 … 3.00) ms" in shown
    assert "2.00 (2.00 … 2.00) MiB" in shown
    assert "1 of 2 targets reached" in shown
    assert str(path) in shown


@pytest.mark.parametrize("value", [1e-4, 0.0123, 0.99951, 1.0, 9.999, 99.99, 123456.0])
def test_numbers_are_shown_to_three_digits(value):
    assert float(harness._digits(value)) == pytest.approx(value, rel=0.006)


def test_full_results_go_to_the_repository_and_others_do_not():
    folders = [parse(parser("A test."), ["--threads", "1", *flags]).out for flags in ([], ["--short"], ["--tiny"])]
    assert folders[0] == harness.ROOT / "benchmarks" / "results"
    assert folders[1] == folders[2] == harness.ROOT / "build" / "benchmarks"


def test_repeats_grow_with_the_size():
    sizes = ["--tiny"], ["--short"], []
    counts = [parse(parser("A test."), ["--threads", "1", *flags]).repeats for flags in sizes]
    assert all(fewer < more for fewer, more in pairwise(counts))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as end:
        parse(parser("A test."), ["--device", "cuda"])
    assert end.value.code == 2
    assert "must have a CUDA device" in capsys.readouterr().err
