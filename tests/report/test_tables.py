from rich.console import Console

from mpoe.models import ParameterCount
from mpoe.report import metrics_table, parameter_table, usage_table

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


def test_usage_fits_a_terminal_and_shows_every_layer():
    shares = {f"encoder.block.{b}.layer.1.DenseReluDense": [0.5, 0.25, 0.2, 0.05, 0, 0, 0, 0] for b in range(12)}
    lines = lines_of(usage_table(shares))
    assert cells(lines[-2]) == ["encoder.block.11.layer.1", "50%", "25%", "20%", "5%", "0%", "0%", "0%", "0%"]
    assert not any("…" in line for line in lines)
    assert max(map(len, lines)) <= WIDTH


def test_metrics_have_a_row_a_split():
    metrics = {"validation": {"matthews": 0.25, "rows": 521}, "test": {"matthews": -0.125, "rows": 1522}}
    lines = lines_of(metrics_table(metrics, title="cola"))
    assert lines[0].strip() == "cola"
    assert [cells(line) for line in lines if "│" in line] == [
        ["validation", "0.2500", "521"],
        ["test", "-0.1250", "1,522"],
    ]
