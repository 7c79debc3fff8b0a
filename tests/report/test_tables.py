import csv
import io
import json

import pytest
from rich.console import Console

from mpoe.models import ParameterCount
from mpoe.nn import RouterStatistics
from mpoe.report import (
    comparison_rows,
    comparison_table,
    comparison_text,
    metrics_table,
    parameter_table,
    router_table,
    trained_table,
)
from mpoe.training.finetune import FinetuneResult
from mpoe.training.optimizer import TrainedPart

WIDTH = 80


def lines_of(table):
    console = Console(width=WIDTH, record=True, file=None, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


def cells(line):
    return [cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")]


def test_parameters_are_in_millions_and_small_ones_keep_their_digits():
    count = ParameterCount(
        other=109_700_000, central=113_200_000, auxiliary=70_800_000, router=147_648, trained=293_800_000,
        dense=222_900_000, whole_experts=1_015_800_000, active=231_900_000,
    )  # fmt: skip
    found = {cells(line)[0]: cells(line)[1] for line in lines_of(parameter_table({"8 experts": count})) if "│" in line}
    assert found["routers"] == "0.148"
    assert found["total"] == "293.8"
    assert found["same mixture, whole experts"] == "1,015.8"


def test_routers_fit_a_terminal_and_show_every_layer():
    share = [0.5, 0.25, 0.2, 0.05, 0.0, 0.0, 0.0, 0.0]
    routers = {
        f"encoder.block.{b}.layer.1.DenseReluDense": RouterStatistics(share, share, share, 0.0, 1.25) for b in range(12)
    }
    lines = lines_of(router_table(routers))
    assert lines[-2].split() == ["encoder.block.11.layer.1", *"50% 25% 20% 5% 0% 0% 0% 0% 1.25".split()]
    assert not any("…" in line for line in lines)
    assert max(map(len, lines)) <= WIDTH
    routers["last"] = RouterStatistics(share, share, share, 0.125, 0.5)
    assert not any("…" in line for line in lines_of(router_table(routers)))
    assert lines_of(router_table(routers))[-2].split()[-2:] == ["0.50", "12%"]


def test_gate_mass_stands_below_load_where_it_is_another_number():
    """The second expert is selected by its bias alone."""
    share = [0.5, 0.5, 0.0]
    learned = RouterStatistics(share, [0.8, 0.1, 0.1], [0.8, 0.001, 0.0], 0.0, 0.25)
    lines = lines_of(router_table({"a.0.mlp": learned, "a.1.mlp": RouterStatistics(share, share, share, 0.0, 1.0)}))
    found = [line.split() for line in lines if line.split()[:1] in (["a.0"], ["gates"], ["a.1"])]
    assert found == [
        ["a.0", "50%", "50%", "0%", "0.25"],
        ["gates", "80%", "0%", "0%"],
        ["a.1", "50%", "50%", "0%", "1.00"],
    ]
    assert "gates: the mean weight of each expert" in " ".join(" ".join(lines).split())
    assert "gates" not in " ".join(lines_of(router_table({"a.1.mlp": RouterStatistics(share, share, share, 0.0, 1.0)})))


def test_what_trains_adds_up():
    parts = [TrainedPart("central tensors", 0, 2_000_000, 1e-3), TrainedPart("routers", 5_000, 5_000, 3e-4)]
    lines = [cells(line) for line in lines_of(trained_table(parts)) if "│" in line]
    assert lines[0] == ["central tensors", "0.000", "2.000", "-"]
    assert lines[1] == ["routers", "0.005", "0.000", "0.0003"]
    assert lines[2][:3] == ["total", "0.005", "2.000"]


def make_result(tasks, pace=1.5):
    count = ParameterCount(5_000_000, 2_000_000, 500_000, 0, 0, 0, 0, 0)
    trained = [TrainedPart("routers", 1_000_000, 2_000_000, 1e-3)]
    average = {"test": sum(next(iter(splits["test"].values())) for splits in tasks.values()) / len(tasks)}
    return FinetuneResult(
        tasks, average, 0.5, 110, None, pace, None, 3 * 2**30, count, trained, {}, None, None, None, {}
    )


def test_runs_side_by_side():
    one = {"cola": {"test": {"matthews": 0.2, "cross_entropy": 0.5, "rows": 522.0}}}
    rows = comparison_rows({"dense": make_result(one), "mpoe": make_result(one, pace=None)})
    assert rows[0] == {
        "run": "dense", "cola matthews": 0.2, "cola cross entropy": 0.5, "parameters, M": 7.5, "trained, M": 1.0,
        "steps": 110.0, "s a step": 1.5, "peak memory, GiB": 3.0,
    }  # fmt: skip
    lines = [cells(line) for line in lines_of(comparison_table(rows)) if "│" in line]
    assert lines[0] == ["cola matthews", "0.2000", "0.2000"]
    assert lines[-2:] == [["s a step", "1.50", "-"], ["peak memory, GiB", "3.0", "3.0"]]
    assert comparison_text(rows, ".md").splitlines()[2] == "| dense | 0.2000 | 0.5000 | 7.5 | 1.0 | 110 | 1.50 | 3.0 |"
    assert json.loads(comparison_text(rows, ".json")) == rows
    assert next(csv.DictReader(io.StringIO(comparison_text(rows, ".csv"))))["cola matthews"] == "0.2"


def test_runs_of_other_tasks_have_gaps():
    several = {
        "cola": {"test": {"matthews": 0.2, "accuracy": 0.7, "rows": 5.0}},
        "stsb": {"test": {"pearson": 0.8, "rows": 5.0}},
    }
    rows = comparison_rows({"both": make_result(several), "cola": make_result({"cola": several["cola"]})})
    assert list(rows[0]) == list(rows[1])
    assert (rows[0]["average"], rows[0]["stsb pearson"]) == (pytest.approx(0.5), 0.8)
    assert (rows[1]["average"], rows[1]["stsb pearson"], rows[1]["cola accuracy"]) == (None, None, 0.7)
    assert rows[0]["cola accuracy"] == 0.7


def test_scores_of_generated_texts_are_columns():
    of_corpus = {"news": {"test": {"perplexity": 70.5, "tokens": 9.0, "words": 7.0}}}
    scores = {"dense": {"bleu_2": 62.5, "bleu_4": 9.5, "self_bleu_2": 74.25, "samples": 500}}
    rows = comparison_rows({"dense": make_result(of_corpus), "mpoe": make_result(of_corpus)}, scores)
    assert list(rows[0])[1:5] == ["news perplexity", "BLEU-2", "BLEU-4", "Self-BLEU-2"]
    assert rows[0]["Self-BLEU-2"] == 74.25
    assert rows[1]["BLEU-2"] is None
    assert comparison_text(rows, ".md").splitlines()[3].startswith("| mpoe | 70.5000 | - | - | - |")
    assert "| 62.50 | 9.50 | 74.25 |" in comparison_text(rows, ".md")


def test_metrics_have_a_row_a_split():
    metrics = {"validation": {"matthews": 0.25, "rows": 521}, "test": {"matthews": -0.125, "rows": 1522}}
    lines = lines_of(metrics_table(metrics, title="cola"))
    assert lines[0].strip() == "cola"
    assert [cells(line) for line in lines if "│" in line] == [
        ["validation", "0.2500", "521"],
        ["test", "-0.1250", "1,522"],
    ]
    lines = lines_of(metrics_table({**metrics, "dev": {"rows": 3}}, title="cola"))
    assert cells([line for line in lines if "│" in line][-1]) == ["dev", "-", "3"]
