import json
import math
import re

import pytest
import yaml
from rich.console import Console

import quality
from quality_grid import Grid
from quality_table import task_table
from tiny import tiny_t5, tiny_tokenizer, write_cola

GRID = {
    "flags": {
        "model_name_or_path": "{model}", "data_dir": "{data}", "use_cpu": True, "freeze_embeds": True,
        "eval_strategy": "no", "include_num_input_tokens_seen": True, "per_device_train_batch_size": 4, "max_steps": 2,
    },
    "tasks": {"cola": {"tasks": ["cola"]}},
    "variants": {
        "dense": {"num_experts": 1, "moe_type": "none", "mpo_layers": "nompo"},
        "mixture": {"num_experts": 2},
        "slow": {"num_experts": 2, "learning_rate": 1e-6},
    },
    "learning_rates": [1e-3, 1e-2],
    "seeds": [1, 2],
}  # fmt: skip


def write_grid(folder, **changes):
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}))
    return path


@pytest.fixture
def ground(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "WORK", tmp_path / "work")
    tiny_t5().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_cola(tmp_path / "data")
    return tmp_path


def fake(grid, folder, score, metric="matthews", lost=0.0):
    """Write the results of all of a grid's runs; `score` gives those on validation and test rows."""
    folder.mkdir(exist_ok=True)
    for task in grid.tasks:
        for variant in grid.variants:
            for rate in grid.rates(task, variant):
                for seed in grid.seeds:
                    run = grid.run(task, variant, rate, seed)
                    splits = [
                        {metric: value, "cross_entropy": 1 - value, "rows": 9}
                        for value in score(task, variant, rate, seed)
                    ]
                    tasks = {task: dict(zip(("validation", "test"), splits, strict=True))}
                    shuffled = {task: {split: of | {metric: of[metric] - lost} for split, of in tasks[task].items()}}
                    results = {
                        "tasks": tasks, "average": {}, "train_loss": 0.1, "steps": 2, "seconds_per_step": 1.0,
                        "tokens_per_second": 100.0, "peak_memory": 2**30, "trained": [], "gradient_mask": None,
                        "parameters": {
                            "other": 1_000_000, "central": 0, "auxiliary": 0, "router": 0, "trained": 0, "dense": 0,
                            "whole_experts": 0, "active": 0,
                        },
                        "routers": {
                            "one": {"share": [1.0, 0.0], "mean_probability": [], "dropped_fraction": 0, "entropy": 0},
                            "two": {"share": [0.5, 0.5], "mean_probability": [], "dropped_fraction": 0, "entropy": 0},
                        }
                        if variant != "dense"
                        else {},
                        "shuffled": None if variant == "dense" or seed != grid.seeds[0] else shuffled,
                        "adapter_bytes": None, "versions": {},
                    }  # fmt: skip
                    found = {"task": task, "variant": variant, "flags": run.flags, "results": results}
                    (folder / f"{run.name}.{run.key}.json").write_text(json.dumps(found))


def cells(table):
    return {str(column.header): list(column.cells) for column in table.columns}


def test_the_rate_is_the_best_on_validation_and_the_table_is_of_the_test_rows(tmp_path):
    grid = Grid.load(write_grid(tmp_path))

    def score(task, variant, rate, seed):
        base = {"dense": 0.1, "mixture": 0.2, "slow": 0.0}[variant]
        return (base + (rate == 1e-2 and variant == "mixture"), base + seed / 100)

    fake(grid, tmp_path / "out", score)
    table = cells(task_table(grid, "cola", tmp_path / "out"))
    assert table["variant"] == ["dense", "mixture", "slow"]
    assert table["rate"] == ["0.001", "0.01", "1e-06"]
    assert table["matthews"] == ["0.1150 ± 0.0071", "0.2150 ± 0.0071", "0.0150 ± 0.0071"]
    ahead, behind = "+0.1000 ± 0.0000", "-0.1000 ± 0.0000"
    assert table["difference"] == ["0", f"{ahead}; {behind} nats", f"{behind}; {ahead} nats"]
    assert table["usage"][:2] == ["-", "0.5000 ± 0.0000"]
    assert table["lost by shuffling"] == ["-", "0.0000; 0.0000 nats", "0.0000; 0.0000 nats"]
    assert table["parameters, M"][0] == "1.0"


@pytest.mark.parametrize(("metric", "lost"), [("matthews", 0.5), ("perplexity", -0.5)])
def test_what_is_lost_by_shuffling_is_above_0_whichever_way_the_metric_is_better(tmp_path, metric, lost):
    grid = Grid.load(write_grid(tmp_path))
    fake(grid, tmp_path / "out", lambda task, variant, rate, seed: (1.0, 1.0), metric, lost)
    table = cells(task_table(grid, "cola", tmp_path / "out"))
    assert table["lost by shuffling"] == ["-", "0.5000; 0.0000 nats", "0.5000; 0.0000 nats"]


def test_a_row_waits_for_all_rates(tmp_path):
    grid = Grid.load(write_grid(tmp_path))
    fake(grid, tmp_path / "out", lambda *_: (0.1, 0.1))
    grid.run("cola", "mixture", 1e-2, 1)
    (found,) = (tmp_path / "out").glob(f"*.{grid.run('cola', 'mixture', 1e-2, 1).key}.json")
    found.unlink()
    table = cells(task_table(grid, "cola", tmp_path / "out"))
    assert table["seeds"] == ["2", "0", "2"]
    assert table["matthews"][1] == "-"


def test_a_run_is_its_flags_and_not_its_name_or_place(tmp_path):
    grid = Grid.load(write_grid(tmp_path))
    renamed = {**GRID["variants"], "other": GRID["variants"]["mixture"]}
    other = Grid.load(write_grid(tmp_path, variants=renamed))
    assert grid.run("cola", "mixture", 1e-3, 1).key == other.run("cola", "other", 1e-3, 1).key
    keys = {grid.run("cola", v, r, s).key for v in ("dense", "mixture") for r in (1e-3, 1e-2) for s in (1, 2)}
    assert len(keys) == 8
    assert "test_routing" not in grid.run("cola", "dense", 1e-3, 1).flags
    assert grid.run("cola", "mixture", 1e-3, 1).flags["test_routing"]
    assert "test_routing" not in grid.run("cola", "mixture", 1e-3, 2).flags


def test_a_grid_may_stand_on_another(tmp_path):
    base = Grid.load(write_grid(tmp_path))
    path = tmp_path / "other.yaml"
    path.write_text("base: grid.yaml\nvariants: {mixture: , more: {num_experts: 4}}\nseeds: [1]")
    grid = Grid.load(path)
    assert (grid.flags, grid.tasks, grid.learning_rates, grid.seeds) == (base.flags, base.tasks, [1e-3, 1e-2], [1])
    assert grid.variants == {"mixture": {"num_experts": 2}, "more": {"num_experts": 4}}


def test_a_grid_is_run_once_and_its_table_shown(ground, capsys):
    grid = write_grid(ground, learning_rates=[1e-3], seeds=[1])
    command = [str(grid), "--out", str(ground / "out"), "--path", f"model={ground / 'model'}", "--threads", "1"]
    command += ["--path", f"data={ground / 'data'}", "--workers", "2"]
    quality.main([*command, "--variants", "dense", "mixture"])
    shown = capsys.readouterr().out
    assert "2 runs, 0 found finished" in shown
    assert "grid cola: test rows" in shown
    files = sorted((ground / "out").iterdir())
    assert len(files) == 2
    found = json.loads(files[1].read_text())
    assert found["flags"]["model_name_or_path"] == "{model}"
    assert found["results"]["shuffled"]["cola"]["test"].keys() == found["results"]["tasks"]["cola"]["test"].keys()
    assert found["results"]["tokens_per_second"] > 0
    assert not list((ground / "work").rglob("*.safetensors"))
    quality.main([*command, "--variants", "dense", "mixture"])
    assert "runs," not in capsys.readouterr().out
    quality.main([str(grid), "--out", str(ground / "out"), "--table", "--markdown"])
    assert "| dense | 0.001 | 1 |" in capsys.readouterr().out


def test_a_run_that_fails_is_shown_with_its_log(ground, capsys):
    grid = write_grid(ground, flags={**GRID["flags"], "max_source_length": 0}, seeds=[1])
    paths = ["--path", f"model={ground / 'model'}", "--path", f"data={ground / 'data'}"]
    with pytest.raises(SystemExit) as stopped:
        quality.main([str(grid), "--out", str(ground / "out"), "--variants", "slow", *paths])
    assert stopped.value.code == 1
    assert "max_source_length must be >= 1; got 0" in " ".join(capsys.readouterr().err.split())


def test_tables_are_put_into_a_page(tmp_path):
    fake(Grid.load(write_grid(tmp_path)), tmp_path / "out", lambda *_: (0.1, 0.1))
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table grid cola -->\nold\n<!-- end -->\nafter\n<!-- table other cola -->\n<!-- end -->\n"
    )
    command = [str(tmp_path / "grid.yaml"), "--table", "--out", str(tmp_path / "out"), "--update", str(page)]
    quality.main(command)
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", "<!-- table grid cola -->"]
    assert "| mixture | 0.001 | 2 | 0.1000 ± 0.0000 |" in page.read_text()
    assert "old" not in lines
    assert lines[-4:] == ["<!-- end -->", "after", "<!-- table other cola -->", "<!-- end -->"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 1}, "seeds of a grid must be a list of numbers"),
        ({"learning_rates": ["1e-3"]}, "learning_rates of a grid must be a list of numbers (1.0e-3, not 1e-3)"),
        ({"variants": {"dense": 3}}, "variants of a grid must be names with flags"),
        ({"more": 1}, "a grid must have the keys flags, tasks, variants, learning_rates, seeds"),
    ],
)
def test_a_wrong_grid_is_said(tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as stopped:
        quality.main([str(write_grid(tmp_path, **changes))])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml"], "a grid must be a file that can be read; nothing.yaml: No such file"),
        (["notes.txt"], "a grid must be YAML; notes.txt is not"),
        (["grid.yaml"], "needs --path data=FOLDER --path model=FOLDER"),
        (["grid.yaml", "--path", "dat=."], "--path must be NAME=FOLDER, NAME of data, model; got dat"),
        (
            ["grid.yaml", "--path", "data=nowhere", "--path", "model=."],
            "--path data must be a folder with what the grid",
        ),
        (["grid.yaml", "--table", "--path", "model"], "--path must be NAME=FOLDER, NAME of data, model; got model"),
        (["grid.yaml", "--tasks", "rte"], "--tasks must be of ['cola']; got ['rte']"),
        (["grid.yaml", "--table", "--out", "nowhere"], "--out must be a folder with results of runs; nowhere has none"),
        (["grid.yaml", "--update", "page.md", "--variants", "dense"], "leave --variants out"),
        (["grid.yaml", "--update", "page.md"], "--update must be a Markdown file that there is; got page.md"),
        (["grid.yaml", "--update", "notes.txt", "--out", "."], "notes.txt has no line <!-- table GRID TASK -->"),
        (["grid.yaml", "--workers", "0"], "argument --workers: must be a count >= 1; got 0"),
        (
            ["grid.yaml", "other.yaml", "--tasks", "other", "--variants", "dense"],
            "a task of ['other'] and all variants of ['dense']",
        ),
    ],
)
def test_what_a_grid_needs_is_said(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_grid(tmp_path, tasks={"other": {"tasks": ["cola"]}}, variants={"mixture": {}}).rename("other.yaml")
    write_grid(tmp_path)
    (tmp_path / "notes.txt").write_text("a: [")
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        quality.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_of_several_grids_those_that_have_a_task_are_shown(tmp_path, capsys):
    fake(Grid.load(write_grid(tmp_path)), tmp_path / "out", lambda *_: (0.1, 0.1))
    other = write_grid(tmp_path, tasks={"other": {"tasks": ["cola"]}}).rename(tmp_path / "other.yaml")
    command = [str(write_grid(tmp_path)), str(other), "--table", "--out", str(tmp_path / "out"), "--tasks", "cola"]
    quality.main(command)
    shown = capsys.readouterr().out
    assert "grid cola: test rows" in shown
    assert "other" not in shown


@pytest.mark.parametrize("path", sorted((quality.ROOT / "benchmarks" / "quality").glob("*.yaml")), ids=lambda p: p.stem)
def test_grids_in_the_repository_name_flags_that_there_are(path, capsys):
    from mpoe.cli.main import main

    with pytest.raises(SystemExit):
        main(["finetune", "--help_all"])
    known = capsys.readouterr().out
    grid = Grid.load(path)
    runs = [
        grid.run(t, v, r, s) for t in grid.tasks for v in grid.variants for r in grid.rates(t, v) for s in grid.seeds
    ]
    assert {flag for run in runs for flag in run.flags if not re.search(rf"--{flag}\b", known)} == set()
    assert all(math.isfinite(run.flags["learning_rate"]) for run in runs)
    Console().print(task_table(grid, next(iter(grid.tasks)), quality.RESULTS))
