import importlib
import json

import pytest

benchmark = importlib.import_module("plan")
FLAGS = ("--threads", "1", "--repeats", "1")


def run(folder, *flags):
    benchmark.main([*FLAGS, "--out", str(folder), *flags])
    (results,) = folder.glob("plan-*.json")
    return json.loads(results.read_text())["rows"], (folder / "plan-cells.jsonl").read_text().splitlines()


@pytest.fixture
def tiny_full_grid(monkeypatch):
    """The full form, which resumes, on the tiny grid."""
    monkeypatch.setitem(benchmark.GRIDS, "full", benchmark.GRIDS["tiny"])


def test_every_cell_is_timed_and_judged(tmp_path):
    rows, cells = run(tmp_path, "--tiny")
    assert len(cells) == 2
    assert rows[0]["case"] == "all (3 choices)"  # without gradients there are two choices, with a cache and without
    assert rows[0]["target"] == ">= 1"
    assert {row["case"].rsplit(" (", 1)[0] for row in rows} == {
        "all",
        "forward",
        "forward, cache",
        "step",
    }
    for row in rows:
        if row["way"] == "regret":
            assert row["value"]["min"] >= 1
            assert (row["value"]["max"] > benchmark.GOOD) == ("note" in row)


def test_goes_on_where_it_was_stopped(tmp_path, tiny_full_grid, monkeypatch):
    _, first = run(tmp_path, "--budget", "0")
    assert first == []
    _, first = run(tmp_path)
    monkeypatch.setattr(benchmark, "_measure", None)
    _, again = run(tmp_path)
    assert again == first
    assert len(first) == 2


def test_regret_is_over_the_fastest_way_that_is_possible():
    cell = benchmark.Cell((24, 36), None, 3, 5, False, "cpu", "float32", 1)
    without, with_cache = benchmark._choices({cell: {"apply": [2.0], "rebuild": [3.0], "cached": [1.0]}})
    assert (without.has_cache, with_cache.has_cache) == (False, True)
    assert without.regret == {"apply": 1.0, "rebuild": 1.5}[without.chosen]
    assert with_cache.regret == {"apply": 2.0, "rebuild": 3.0, "cached": 1.0}[with_cache.chosen]
