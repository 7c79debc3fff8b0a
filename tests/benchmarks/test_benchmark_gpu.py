import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import harness
from mpoe.nn import TopKRouter

gpu = importlib.import_module("gpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(harness, "MIN_SAMPLE_S", 1e-6)
    yield
    gpu._layer.cache_clear()
    gpu._expected.cache_clear()


FLAGS = ("--device", "cpu", "--tiny", "--threads", "1", "--backend", "eager", "--out")


def rows_in(folder):
    (path,) = folder.iterdir()
    return json.loads(path.read_text())["rows"]


def run(folder, *flags):
    return gpu.main([*FLAGS, str(folder), *flags]), rows_in(folder)


def failed(rows):
    return {(row["case"], row["way"]) for row in rows if row.get("verdict") == "missed"}


def test_everything_is_checked_and_timed(tmp_path):
    # in a process of its own: torch.compile cannot look into the checks of annotations that tests run with
    script = Path(gpu.__file__)
    environment = {"PYTHONPATH": str(script.parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *FLAGS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = rows_in(tmp_path)
    assert (done.returncode, failed(rows)) == (0, set())
    checked = {row["way"] for row in rows if row["case"].startswith("against float64") and row["verdict"] == "passed"}
    assert checked == set(gpu.CHECKED)
    assert {row["case"] for row in rows if "compiled in one graph" in row["case"]} == {
        "compiled in one graph, float32",
        "compiled in one graph, bfloat16",
    }
    skipped = [row for row in rows if row["unit"] == "skipped"]
    assert {row["case"].split(",")[0] for row in skipped} == {"no synchronisation", "CUDA graph", "decode"}
    assert all("a GPU" in row["note"] for row in skipped)
    timed = {row["way"] for row in rows if "ratio" in row}
    assert timed == {*gpu.TIMED, *(f"{name}, compiled" for name in gpu.COMPILED)}
    assert "step, float32, 5 tokens: all" in done.stderr


def test_what_the_time_does_not_suffice_for_is_skipped(tmp_path):
    status, rows = run(tmp_path, "--budget", "-1")
    assert status == 0
    assert {row["note"] for row in rows} == {"no time left"}


def test_what_is_wrong_or_raises_stops_nothing_else(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("not here\nat all")

    forward = TopKRouter.forward

    def wrong(router, x, mask=None):
        route = forward(router, x, mask)
        if router.top_k > 1:
            route.weight = route.weight * 1.1
        return route

    monkeypatch.setattr(gpu, "switch_layer", refuse)
    monkeypatch.setattr(gpu, "_time_decode", refuse)
    monkeypatch.setattr(gpu, "_compiled", lambda layer, *_: layer)
    monkeypatch.setattr(TopKRouter, "forward", wrong)
    status, rows = run(tmp_path)
    assert status == 1
    timings = {(f"{phase}, {dtype}, 5 tokens", "Switch") for phase in ("step", "forward") for dtype in gpu.TOLERANCES}
    decoding = {(f"decode, bfloat16, {tokens} tokens", "all") for tokens in gpu.DECODE_TOKENS}
    wrong_ones = {(f"against float64, 64x32, {dtype}", "top-2") for dtype in gpu.TOLERANCES}
    assert failed(rows) == timings | decoding | wrong_ones
    assert {row["note"] for row in rows if row["unit"] == "errors"} == {"RuntimeError: not here"}


def test_results_that_are_not_finite_are_no_results():
    with pytest.raises(ArithmeticError, match="not finite"):
        gpu._error_row("case", "way", "float32", {"y": torch.tensor([1.0, torch.nan])}, {"y": torch.ones(2)})


def test_a_full_expert_takes_first_choices_and_early_tokens():
    index = torch.tensor([[1, 0]] * 3 + [[0, 1]] * 4)  # two experts, 4 places each
    kept = gpu._kept(index, 2, 1.0)
    assert kept[:, 0].all()
    assert kept[:, 1].tolist() == [False, False, False, True, False, False, False]
    assert gpu._kept(index, 2, None).all()


def test_plain_is_the_layer_for_one_expert_per_token():
    layer = gpu._checked_layer("separable", 32, 64)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    expert = layer.router(x[0]).expert_index[:, 0].tolist()
    tokens = zip(expert, x[0], strict=True)
    expected = [layer.down.expert_matrix(e) @ nn.functional.gelu(layer.up.expert_matrix(e) @ t) for e, t in tokens]
    torch.testing.assert_close(gpu._plain(layer, x[0]), torch.stack(expected))
