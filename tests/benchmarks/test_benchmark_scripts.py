import importlib
import json
from argparse import Namespace

import pytest
import torch

import contenders
import harness
import memory
from mpoe.mpo import MPO, site_dims
from reference_style import ReferenceStyleLayer, ReferenceStyleMatrix

SCRIPTS = {
    "layer": {"dense", "Switch", "Transformers grouped_mm", "reference-style", "separable", "narrow", "balanced"},
    "training": {"dense", "Switch", "separable", "narrow", "ends of 64", "balanced"},
    "decode": {"dense", "Switch", "separable", "narrow", "ends of 64", "balanced"},
    "scaling": {"dense", "Switch", "separable", "narrow", "ends of 64"},
}


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    monkeypatch.setattr(harness, "MIN_SAMPLE_S", 1e-6)


def run_tiny(script, folder, *flags):
    importlib.import_module(script).main(["--tiny", "--threads", "1", "--out", str(folder), *flags])
    (path,) = folder.iterdir()
    return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_compares_everybody(script, tmp_path, capsys):
    rows = run_tiny(script, tmp_path)
    assert {row["way"] for row in rows} >= SCRIPTS[script]
    assert all(row["value"]["min"] > 0 for row in rows)
    assert all(row["ratio"]["median"] == 1 for row in rows if row["way"] == "dense")
    assert "results in" in capsys.readouterr().out


def test_only_some_ways(tmp_path):
    rows = run_tiny("training", tmp_path, "--ways", "narrow")
    assert [row["way"] for row in rows] == ["dense", "narrow"]


def test_memory_process_reports_its_peak(capsys):
    memory.main(["--tiny", "--threads", "1", "--train", "ends of 64"])
    assert json.loads(capsys.readouterr().out)["peak_bytes"] > 0


def test_memory_compares_processes(tmp_path, monkeypatch):
    peaks = {"dense": 2.0, "separable": 3.0}
    monkeypatch.setattr(memory, "run_child", lambda _, train, way, *flags: {"peak_bytes": peaks[way]})
    rows = run_tiny("memory", tmp_path, "--ways", "separable")
    assert [(row["way"], row["ratio"]["median"]) for row in rows] == [("dense", 1.0), ("separable", 1.5)]


def test_targets_name_ways_that_are_measured():
    layer = importlib.import_module("layer")
    built = layer.build(Namespace(size="tiny", ways=None, device="cpu", dtype="float32"))
    ways = {*built, "balanced, rebuilt once"}
    assert {name for targets in layer.TARGETS.values() for pair in targets for name in pair} <= ways


def test_reference_style_starts_as_the_dense_layer():
    dense = contenders.dense_layer(24, 48).double()
    layer = ReferenceStyleLayer(dense.wi.weight.detach(), dense.wo.weight.detach(), 3, noise=0.0).double()
    x = torch.randn(1, 40, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))


def test_reference_style_multiplies_out_the_mpo():
    matrices = ReferenceStyleMatrix(torch.randn(48, 24, dtype=torch.float64), 2, noise=0.5)
    dims = site_dims(48, 24, layout="balanced")
    for own, matrix in zip(matrices.auxiliaries, matrices.multiplied_out(), strict=True):
        sites = [*list(own)[: dims.central], matrices.central, *list(own)[dims.central :]]
        torch.testing.assert_close(matrix, MPO(tuple(sites), dims).to_matrix())


def test_reference_style_gives_every_token_to_one_expert_and_gradients_to_all_used():
    dense = contenders.dense_layer(24, 48)
    layer = ReferenceStyleLayer(dense.wi.weight.detach(), dense.wo.weight.detach(), 3, noise=0.5)
    x = torch.randn(1, 50, 24)
    expert = layer.switch(x[0]).argmax(dim=-1)
    ups, downs = layer.up.multiplied_out(), layer.down.multiplied_out()
    expected = torch.stack([downs[e] @ (ups[e] @ token).relu() for e, token in zip(expert, x[0], strict=True)])
    y = layer(x)
    torch.testing.assert_close(y[0], expected)
    y.sum().backward()
    assert len(expert.unique()) == 3
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_switch_layer_drops_no_token():
    layer = contenders.switch_layer(16, 32, num_experts=2).eval()
    x = torch.randn(1, 1, 16).expand(1, 300, 16)  # all to one expert
    y = layer(x)[0]
    torch.testing.assert_close(y, y[:1].expand_as(y))
    assert y.any()


def test_transformers_experts_agree_with_each_other():
    batched = contenders.TransformersExperts(16, 32, "batched_mm", num_experts=3)
    grouped = contenders.TransformersExperts(16, 32, "grouped_mm", num_experts=3)
    grouped.load_state_dict(batched.state_dict())
    x = torch.randn(1, 30, 16)
    torch.testing.assert_close(batched(x), grouped(x))


@pytest.mark.parametrize("implementation", ["reconstructed", "factorized"])
def test_tensorly_layer_computes_the_dense_one(implementation):
    pytest.importorskip("tltorch")
    dense = contenders.dense_layer(24, 48)
    x = torch.randn(1, 9, 24)
    torch.testing.assert_close(contenders.tensorly_layer(dense, implementation)(x), dense(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", contenders.layouts())
def test_our_experts_differ_but_little_from_the_dense_layer(way):
    dense = contenders.dense_layer(24, 48)
    layer = contenders.our_layer(dense, **contenders.layouts()[way])
    x = torch.randn(1, 200, 24)
    error = (layer(x) - dense(x)).norm() / dense(x).norm()
    assert 0.001 < error < 0.2
    assert len(layer.router(x[0]).expert_index.unique()) == 8
