import copy
import importlib
import json
from argparse import Namespace

import pytest
import torch

import contenders
import decode
import definition
import harness
import layer
import memory
from mpoe.mpo import MPO, site_dims
from mpoe.nn import ExtendedExperts
from reference_style import ReferenceStyleLayer, ReferenceStyleMatrix
from training import rows_with_ceiling

END_TO_END = {"dense", "extended", "LoRA", "Switch"}
SCRIPTS = {
    "layer": {
        "dense", *contenders.LAYOUTS, "LoRA of rank 64", "Switch", "Transformers grouped_mm", "all experts",
        "selected experts", "two products", "one product",
    },
    "balanced": {"dense", "balanced", "reference-style", "balanced, materialized once"},
    "training": END_TO_END,
    "decode": END_TO_END,
    "scaling": END_TO_END,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    monkeypatch.setattr(harness, "MIN_SAMPLE_S", 1e-6)
    monkeypatch.setattr(contenders, "MOST_COPIES", 2)


def run_tiny(script, folder, *flags):
    importlib.import_module(script).main(["--tiny", "--threads", "1", "--out", str(folder), *flags])
    (path,) = folder.iterdir()
    return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_compares_everybody(script, tmp_path, capsys):
    rows = run_tiny(script, tmp_path)
    assert {row["way"] for row in rows} == SCRIPTS[script]
    assert all(row["value"]["min"] > 0 for row in rows)
    assert all(row["ratio"]["median"] == 1 for row in rows if row["way"] == row["over"])
    assert "results in" in capsys.readouterr().out


def test_only_some_ways(tmp_path):
    rows = run_tiny("training", tmp_path, "--ways", "LoRA", "--models", "T5-small")
    assert [row["way"] for row in rows] == ["dense", "LoRA"]


def test_a_rate_is_judged_by_its_ceiling():
    rates = {name: harness.Samples((value,)) for name, value in {"dense": 10.0, "extended": 7.5, "Switch": 5.0}.items()}
    dense, extended, switch = rows_with_ceiling("case", rates, {"dense": 80, "extended": 100, "Switch": 90})
    assert (extended.note, str(extended.target), extended.verdict) == ("ceiling 0.800", ">= 0.744", "passed")
    assert (dense.note, dense.target, switch.note, switch.target) == ("", None, "", None)


@pytest.mark.parametrize("way", sorted(END_TO_END))
@pytest.mark.parametrize("name", contenders.MODELS)
def test_decoding_is_what_generate_does(name, way):
    model = contenders.model_contenders(name, "tiny", [] if way == "dense" else [way])[way].eval()
    run = decode.decoding(model, batch=3, new=5)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.config.vocab_size, (3, decode.INPUTS), generator=draw)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[:, -5:]
    assert run().tolist() == expected.tolist()
    assert run().tolist() == expected.tolist()  # the cache is as before


def test_memory_process_reports_its_peak(capsys):
    memory.main(["--tiny", "--threads", "1", "--train", "extended"])
    assert json.loads(capsys.readouterr().out)["peak_bytes"] > 0


def test_memory_compares_processes(tmp_path, monkeypatch):
    found = {
        "dense": {"peak_bytes": 2.0}, "extended": {"peak_bytes": 3.0},
        "float32": {"peak_bytes": 4.0, "adapter_bytes": 2**20, "base_bytes": 2**22},
        "int8": {"peak_bytes": 1.0, "adapter_bytes": 2**20, "base_bytes": 2**21},
    }  # fmt: skip
    monkeypatch.setattr(memory, "run_child", lambda _, flag, way, *flags: found.get(way.rpartition("/")[2], {}))
    rows = run_tiny("memory", tmp_path, "--ways", "extended")
    assert [(row["way"], row["ratio"]["median"]) for row in rows] == [
        ("dense", 1.0), ("extended", 1.5), ("float32", 1.0), ("int8", 0.25),
    ]  # fmt: skip
    assert rows[-1]["note"] == "adapter 1.0 MiB, base 2 MiB"


def test_memory_trains_experts_around_a_frozen_base(tmp_path):
    base = contenders.language_model("SmolLM2-135M", "tiny")
    base.save_pretrained(tmp_path / "float32")
    found = memory.adapt(tmp_path / "float32", Namespace(size="tiny"))
    assert found["base_bytes"] == sum(p.nbytes for p in base.parameters()) + sum(b.nbytes for b in base.buffers())
    assert found["adapter_bytes"] > 0
    assert (tmp_path / "float32-adapter").is_dir()


def test_targets_name_ways_that_are_measured():
    built = layer.build(Namespace(size="tiny", ways=None, device="cpu", dtype="float32"))
    named = {pair for phase, tokens in layer.TARGETS for pair in layer.targets_of(phase, tokens)}
    assert {name for pair in named for name in pair} <= set(built)


@pytest.mark.parametrize("form", layer.FORMS)
def test_both_forms_compute_the_layer(form, monkeypatch):
    called = []
    dispatch = layer.Dispatch.by_expert
    monkeypatch.setattr(layer.Dispatch, "by_expert", lambda route: called.append(form) or dispatch(route))
    mixture = contenders.our_layer(contenders.dense_layer(24, 48), num_experts=16, expert_rank=2)
    x = torch.randn(1, 30, 24)
    expected = definition.plain_layer(mixture, x[0])[None]
    torch.testing.assert_close(layer.OneForm(mixture, layer.FORMS[form])(x), expected)
    assert bool(called) is layer.FORMS[form]


def test_one_product_computes_the_same_with_the_same_gradients():
    one = contenders.gated_layer(24, 48)
    two = copy.deepcopy(one)
    x, dy = torch.randn(2, 1, 30, 24)
    y_one, y_two = layer.OneProduct(one)(x), two(x)
    torch.testing.assert_close(y_one, y_two)
    y_one.backward(dy)
    y_two.backward(dy)
    for ours, expected in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_reference_style_starts_as_the_dense_layer():
    dense = contenders.dense_layer(24, 48).double()
    reference = ReferenceStyleLayer(dense.wi.weight.detach(), dense.wo.weight.detach(), 3, noise=0.0).double()
    x = torch.randn(1, 40, 24, dtype=torch.float64)
    torch.testing.assert_close(reference(x), dense(x))


def test_reference_style_multiplies_out_the_mpo():
    matrices = ReferenceStyleMatrix(torch.randn(48, 24, dtype=torch.float64), 2, noise=0.5)
    dims = site_dims(48, 24)
    for own, matrix in zip(matrices.auxiliaries, matrices.multiplied_out(), strict=True):
        sites = [*list(own)[: dims.central], matrices.central, *list(own)[dims.central :]]
        torch.testing.assert_close(matrix, MPO(tuple(sites), dims).to_matrix())


def test_reference_style_gives_every_token_to_one_expert_and_gradients_to_all_used():
    dense = contenders.dense_layer(24, 48)
    reference = ReferenceStyleLayer(dense.wi.weight.detach(), dense.wo.weight.detach(), 3, noise=0.5)
    x = torch.randn(1, 50, 24)
    expert = reference.switch(x[0]).argmax(dim=-1)
    ups, downs = reference.up.multiplied_out(), reference.down.multiplied_out()
    expected = torch.stack([downs[e] @ (ups[e] @ token).relu() for e, token in zip(expert, x[0], strict=True)])
    y = reference(x)
    torch.testing.assert_close(y[0], expected)
    y.sum().backward()
    assert len(expert.unique()) == 3
    assert all(p.grad is not None and p.grad.any() for p in reference.parameters())


def test_switch_layer_drops_no_token():
    switch = contenders.switch_layer(16, 32, num_experts=2).eval()
    x = torch.randn(1, 1, 16).expand(1, 300, 16)  # all to one expert
    y = switch(x)[0]
    torch.testing.assert_close(y, y[:1].expand_as(y))
    assert y.any()


def test_transformers_experts_agree_with_each_other():
    batched = contenders.TransformersExperts(16, 32, num_experts=3, implementation="batched_mm")
    grouped = contenders.TransformersExperts(16, 32, num_experts=3)
    grouped.load_state_dict(batched.state_dict())
    x = torch.randn(1, 30, 16)
    torch.testing.assert_close(batched(x), grouped(x))


@pytest.mark.parametrize("way", contenders.LAYOUTS)
def test_our_experts_differ_but_little_from_the_dense_layer(way):
    dense = contenders.dense_layer(24, 48)
    mixture = contenders.our_layer(dense, **contenders.LAYOUTS[way])
    x = torch.randn(1, 400, 24)
    error = (mixture(x) - dense(x)).norm() / dense(x).norm()
    assert 0.0005 < error < 0.2
    assert len(mixture.router(x[0]).expert_index.unique()) == mixture.up.num_experts


def test_lora_is_on_both_matrices_and_everything_trains():
    dense = contenders.dense_layer(24, 48)
    lora = contenders.lora_layer(dense, rank=5)
    total = sum(p.numel() for p in lora.parameters())
    assert total == 2 * 24 * 48 + 2 * 5 * (24 + 48)
    assert all(p.requires_grad for p in lora.parameters())


@pytest.mark.parametrize("name", contenders.MODELS)
def test_lora_and_extended_add_as_much_to_the_same_matrices(name):
    models = contenders.model_contenders(name, "tiny", ["extended", "LoRA"])
    counts = {way: sum(p.numel() for p in model.parameters()) for way, model in models.items()}
    routers = sum(p.numel() for key, p in models["extended"].named_parameters() if ".router." in key)
    assert counts["LoRA"] == counts["extended"] - routers > counts["dense"]
    assert sum(isinstance(m, ExtendedExperts) for m in models["extended"].modules()) == {"T5-small": 4}.get(name, 3)


def test_copies_exceed_the_caches_and_fit_into_memory(monkeypatch):
    monkeypatch.setattr(contenders, "MOST_COPIES", 16)
    dense = contenders.dense_layer(32, 64)
    size = 2 * 32 * 64 * 4
    monkeypatch.setattr(contenders, "COLD_BYTES", 7 * size)
    assert len(contenders.cold_copies(dense, dense)) == 7
    monkeypatch.setattr(contenders, "MOST_BYTES", 3 * size)
    copies = contenders.cold_copies(dense, dense)
    assert len({p.data_ptr() for each in copies for p in each.parameters()}) == 3 * 2


def test_every_call_takes_the_next_copy():
    copies = [contenders.dense_layer(8, 16) for _ in range(3)]
    x = torch.randn(1, 4, 8)
    run = contenders.forward_of(copies, x)
    for expected in [*copies, copies[0]]:
        torch.testing.assert_close(run(), expected(x))
