import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import definition
import harness
from mpoe.nn import TopKRouter

gpu = importlib.import_module("gpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(harness, "MIN_SAMPLE_S", 1e-6)
    yield
    gpu._layer.cache_clear()
    gpu._checked_layer.cache_clear()
    gpu._dense.cache_clear()
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

    def wrong(router, *inputs):
        route = forward(router, *inputs)
        if router.top_k > 1 and router.bias is not None:
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
    wrong_ones = {(f"against float64, 64x32, {dtype}", "balanced, top-2") for dtype in gpu.TOLERANCES}
    assert failed(rows) == timings | decoding | wrong_ones
    assert {row["note"] for row in rows if row["unit"] == "errors"} == {"RuntimeError: not here"}


def test_results_that_are_not_finite_are_no_results():
    with pytest.raises(ArithmeticError, match="not finite"):
        gpu._error_row("case", "way", "float32", {"y": torch.tensor([1.0, torch.nan])}, {"y": torch.ones(2)})


def test_a_full_expert_takes_first_choices_and_early_tokens():
    index = torch.tensor([[1, 0]] * 3 + [[0, 1]] * 4)  # two experts, 4 places each
    kept = definition.kept(index, 2, 1.0)
    assert kept[:, 0].all()
    assert kept[:, 1].tolist() == [False, False, False, True, False, False, False]
    assert definition.kept(index, 2, None).all()


def test_plain_is_the_layer_for_one_expert_per_token():
    layer = gpu._checked_layer("balanced", 32, 64)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    expert = layer.router(x[0].float()).expert_index[:, 0].tolist()
    layer.double()
    tokens = zip(expert, x[0], strict=True)
    expected = [layer.down.expert_matrix(e) @ nn.functional.gelu(layer.up.expert_matrix(e) @ t) for e, t in tokens]
    torch.testing.assert_close(definition.plain_layer(layer, x[0]), torch.stack(expected))


def test_plain_adds_every_selected_expert_to_the_shared_matrix():
    layer = gpu._checked_layer("extended", 32, 64).double()
    x = torch.randn(9, 32, dtype=torch.float64)
    probability = (layer.router.weight @ (x / x.square().mean(dim=1, keepdim=True).sqrt()).T).softmax(dim=0).T

    def matrix(experts, gates):
        return experts.base.weight + experts.offset_matrix(gates)

    expected = []
    for token, p in zip(x, probability, strict=True):
        gates = torch.where(p >= p.sort().values[-2], p, 0.0)
        expected.append(matrix(layer.down, gates) @ nn.functional.gelu(matrix(layer.up, gates) @ token))
    torch.testing.assert_close(definition.plain_layer(layer, x), torch.stack(expected), rtol=1e-6, atol=1e-6)
