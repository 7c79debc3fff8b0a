import copy
import hashlib
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import mpoe
from mpoe.models.adapter import active_adapter, load_adapter, save_adapter, set_adapter
from mpoe.nn import ExtendedExperts
from tiny import V1_0, V1_1, logits_of, tiny_batch, tiny_t5

LOAD = """
import sys, torch
from transformers import AutoModelForSeq2SeqLM
from mpoe.models.adapter import load_adapter
for folder in sys.argv[1:]:
    batch, logits = torch.load(folder + "/expected.pt")
    model = load_adapter(AutoModelForSeq2SeqLM.from_pretrained(folder + "/base"), folder + "/adapter").eval()
    assert not any(p.data_ptr() % 64 for p in model.parameters())  # larger matrices' last bits depend on it
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits), folder
"""

CONFIG = mpoe.MPOEConfig(num_experts=3, seed=5)


def mixture_of(base, config=CONFIG, trained=("offsets", "router")):
    """An upcycled copy of a dense base in which only parameters with these words in their names train."""
    model = mpoe.upcycle(copy.deepcopy(base), config).eval()
    for name, p in model.named_parameters():
        p.requires_grad_(any(word in name for word in trained))
    return model


def train(model, batch, steps=3):
    """SGD is enough; every parameter that requires a gradient moves."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def values_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def is_equal(values, others):
    return values.keys() == others.keys() and all(torch.equal(values[name], others[name]) for name in values)


@pytest.fixture
def batch():
    return tiny_batch()


@pytest.fixture
def base():
    return tiny_t5()


@pytest.fixture
def two(tmp_path, base, batch):
    """Two adapters of one base, "a" without and "b" with layer norms, and the logits that they were saved with."""
    expected = {}
    for name, words in (("a", ("offsets", "router")), ("b", ("offsets", "router", "layer_norm"))):
        model = train(mixture_of(base, trained=words), tiny_batch())
        save_adapter(model, tmp_path / name)
        expected[name] = logits_of(model, batch)
    expected[None] = logits_of(mixture_of(base), batch)
    assert not torch.equal(expected["a"], expected["b"])
    assert not torch.equal(expected["a"], expected[None])
    return expected


def test_a_fresh_process_loads_it_onto_the_dense_base_bitwise(tmp_path, batch):
    cases = {
        "plain": (V1_1, {}),
        "tied": (V1_0, {}),
        "balanced": (V1_1, {"layout": "balanced"}),
        "activation": (V1_1, {"expert_activation": "gelu", "stacks": ["encoder"]}),
    }
    for name, (version, options) in cases.items():
        base = tiny_t5(version)
        base.save_pretrained(tmp_path / name / "base")
        model = train(mixture_of(base, mpoe.MPOEConfig(num_experts=3, **options)), batch)
        folder = str(tmp_path / name / "adapter")
        assert save_adapter(model, folder) == tmp_path / name / "adapter"
        torch.save((batch, logits_of(model, batch)), tmp_path / name / "expected.pt")
    subprocess.run([sys.executable, "-c", LOAD, *(str(tmp_path / name) for name in cases)], check=True)


def test_it_holds_what_trained_and_nothing_else(tmp_path, base):
    model = mixture_of(base)
    save_adapter(model, tmp_path)
    model.save_pretrained(tmp_path)
    elements = {}
    for name in ("adapter_model", "model"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            elements[name] = {key: file.get_tensor(key).numel() for key in file.keys()}  # noqa: SIM118
    offsets = 3 * 4 * 3 * 8 * (64 + 32)  # three matrices in four layers; three experts of rank 8
    routers = 4 * (3 * 32 + 3 + 3 + 3 * 32)  # weights; steps, pending and reference of their balancing
    scales = 3 * 4
    assert sum(elements["adapter_model"].values()) == offsets + routers + scales
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert sum(elements["model"].values()) == frozen + offsets + routers + scales
    assert sorted(path.name for path in tmp_path.glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_tied_parameter_is_written_once(tmp_path):
    save_adapter(mixture_of(tiny_t5(V1_0), trained=("shared", "router")), tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        embeddings = [name for name in file.keys() if file.get_slice(name).get_shape() == [64, 32]]  # noqa: SIM118
    assert embeddings == ["shared.weight"]


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_switching_repeats_each_one_and_the_base(tmp_path, base, batch, two, order):
    """In either order: "b" holds layer norms that "a" leaves to the base, also while "b" is active."""
    model = copy.deepcopy(base)
    assert active_adapter(model) is None
    for name in order:
        assert load_adapter(model, tmp_path / name, name) is model
        assert active_adapter(model) == name
        assert torch.equal(logits_of(model, batch), two[name])
    for name in ("a", "b", None, "b", "b", "a", None, "a"):
        set_adapter(model, name)
        assert active_adapter(model) == name
        assert torch.equal(logits_of(model, batch), two[name])


def test_an_adapter_loads_onto_a_mixture_of_the_same_config(tmp_path, base, batch, two):
    model = load_adapter(mixture_of(base), tmp_path / "b")
    assert torch.equal(logits_of(model, batch), two["b"])


def test_exactly_the_adapters_parameters_train(tmp_path, base, batch, two):
    model = load_adapter(copy.deepcopy(base), tmp_path / "b", "b")
    assert trained_names(model) == trained_names(mixture_of(base, trained=("offsets", "router", "layer_norm")))
    model(**batch).loss.backward()
    load_adapter(model, tmp_path / "a", "a")
    assert trained_names(model) == trained_names(mixture_of(base))
    assert all(p.grad is None for p in model.parameters())
    set_adapter(model, None)
    assert trained_names(model) == set()


def test_training_goes_on_and_is_kept_when_switching(tmp_path, base, batch, two):
    straight = train(mixture_of(base), batch, steps=4)
    first = train(mixture_of(base), batch, steps=2)
    save_adapter(first, tmp_path / "half")
    model = load_adapter(copy.deepcopy(base), tmp_path / "half", "half")
    train(model, batch, steps=2)
    assert torch.equal(logits_of(model, batch), logits_of(straight, batch))
    load_adapter(model, tmp_path / "b", "b")  # takes what was trained into memory, as set_adapter does
    set_adapter(model, "half")
    assert torch.equal(logits_of(model, batch), logits_of(straight, batch))
    save_adapter(model, tmp_path / "whole")
    again = load_adapter(copy.deepcopy(base), tmp_path / "whole")
    assert torch.equal(logits_of(again, batch), logits_of(straight, batch))
    set_adapter(model, None)
    assert torch.equal(logits_of(model, batch), two[None])


def test_the_hash_is_of_the_frozen_parameters(tmp_path, base, batch):
    """Training leaves it alone, whatever the optimizer; any bit of the base changes it."""
    model = mixture_of(base)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    save_adapter(model, tmp_path)
    before = config_of(tmp_path)["base_hash"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model.train()(**batch).loss.backward()
    optimizer.step()
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["base_hash"] == before

    digest = hashlib.sha256()
    for name in sorted(frozen):
        digest.update(f"{name} float32 {tuple(frozen[name].shape)}\n".encode() + frozen[name].numpy().tobytes())
    assert before == digest.hexdigest()

    with torch.no_grad():
        model.shared.weight[3, 4] = torch.nextafter(model.shared.weight[3, 4], torch.tensor(1.0))
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["base_hash"] != before


def test_adapters_survive_copies_and_stay_out_of_saved_models(tmp_path, base, batch, two):
    model = load_adapter(copy.deepcopy(base), tmp_path / "b", "b")
    load_adapter(model, tmp_path / "a", "a")
    other = copy.deepcopy(model)
    other._mpoe_adapters = pickle.loads(pickle.dumps(other._mpoe_adapters))
    set_adapter(other, "b")
    assert torch.equal(logits_of(other, batch), two["b"])
    assert torch.equal(logits_of(model, batch), two["a"])
    assert model.state_dict().keys() == mixture_of(base).state_dict().keys()
    model.save_pretrained(tmp_path / "whole")
    saved = mpoe.from_pretrained(tmp_path / "whole")
    assert active_adapter(saved) is None
    assert torch.equal(logits_of(saved, batch), two["a"])


def test_a_model_cast_after_loading_keeps_its_dtype(tmp_path, base, batch, two):
    model = load_adapter(copy.deepcopy(base), tmp_path / "b", "b")
    load_adapter(model, tmp_path / "a", "a")
    model.double()
    set_adapter(model, "b")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    expected = logits_of(load_adapter(copy.deepcopy(base), tmp_path / "b").double(), batch)
    assert torch.equal(logits_of(model, batch), expected)
    set_adapter(model, "a")
    save_adapter(model, tmp_path / "double")
    # the base's layer norms are in memory, in float32; their hash is that of the model's dtype
    again = load_adapter(copy.deepcopy(base).double(), tmp_path / "double")
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))


def test_a_bfloat16_base_has_adapters_of_its_own(tmp_path, batch):
    base = tiny_t5().to(torch.bfloat16)
    model = mixture_of(base)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1 * p.requires_grad)
    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert {p.dtype for name, p in loaded.named_parameters() if name not in trained_names(loaded)} == {torch.bfloat16}
    assert {p.dtype for p in loaded.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


@pytest.mark.parametrize(
    ("options", "trained", "message"),
    [
        ({"mpo_layers": ()}, ("router",), "only a mixture with matrix product operators has an adapter; this T5For"),
        ({"layout": "balanced", "gauge": "sqrt"}, ("offsets",), "DenseReluDense.up has gauge 'sqrt' and bonds"),
        (
            {"layout": "balanced", "max_bond_dim": 4},
            ("offsets",),
            r"has gauge 'identity' and bonds \(1, 4, 4, 4, 4, 1\): save",
        ),
        # the first site is larger than the rest of the matrix, so the full bond behind it is an SVD's
        (
            {"site_dims": {"64x32": [[64, 1, 1], [16, 2, 1]]}, "layout": "balanced"},
            ("offsets",),
            r"no truncated bond, .* bonds \(1, 2, 1, 1\)",
        ),
        ({}, ("offsets", "down.base"), r"that of \S*layer\.1\.DenseReluDense\.down requires a gradient: train with"),
        ({"layout": "balanced"}, ("offsets", "down.central"), r"DenseReluDense\.down requires a gradient: train with"),
        ({}, (), "an adapter holds the parameters that require a gradient; none does"),
    ],
)
def test_what_has_no_adapter_is_refused(tmp_path, base, options, trained, message):
    model = mixture_of(base, mpoe.MPOEConfig(num_experts=3, **options), trained)
    with pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_dense_model_and_a_bad_folder_are_refused(tmp_path, base):
    with pytest.raises(ValueError, match="only a mixture with matrix product operators has an adapter"):
        save_adapter(base, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file must be a folder that can be written; File exists: name another"):
        save_adapter(mixture_of(base), tmp_path / "file")


def test_another_base_is_refused(tmp_path, base, batch, two):
    other = copy.deepcopy(base)
    other.name_or_path = "other"
    with torch.no_grad():
        other.shared.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"wrong base: .*a belongs to '' \(hash \w{12}, float32\); .* 'other' \(hash"):
        load_adapter(other, tmp_path / "a")
    with pytest.raises(ValueError, match=r"float32\); .* bfloat16\); load the base with dtype float32$"):
        load_adapter(copy.deepcopy(base).to(torch.bfloat16), tmp_path / "a")
    with pytest.raises(ValueError, match=r"it holds a .* of shape .*, the model has"):
        load_adapter(tiny_t5(d_model=64), tmp_path / "a")
    with pytest.raises(ValueError, match=r"it holds a decoder\.block\.1\.\S+ of shape .*, the model has none"):
        load_adapter(tiny_t5(num_layers=1), tmp_path / "a")


def test_a_refused_adapter_changes_nothing(tmp_path, base, batch, two):
    model = load_adapter(copy.deepcopy(base), tmp_path / "a", "a")
    save_adapter(mixture_of(base, mpoe.MPOEConfig(num_experts=3, seed=6, expert_scale=0.5)), tmp_path / "config")
    stranger = copy.deepcopy(base)
    nn.init.ones_(stranger.shared.weight)
    save_adapter(mixture_of(stranger), tmp_path / "base")
    before, trained = values_of(model), trained_names(model)
    for folder, name, message in (
        ("config", "new", r"the model's config; expert_scale: 0.5 there, 1.0 here, seed: 6 there, 5 here: load it"),
        ("base", "new", "wrong base"),
        ("a", "a", r"name must be new; 'a' is one of the loaded adapters \['a'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path / folder, name)
    with pytest.raises(ValueError, match=r"one of the loaded adapters \['a'\] or None; got 'c'"):
        set_adapter(model, "c")
    assert is_equal(values_of(model), before)
    assert trained_names(model) == trained
    assert active_adapter(model) == "a"


def test_what_no_adapter_in_memory_holds_may_not_train_away(tmp_path, base, two):
    model = load_adapter(copy.deepcopy(base), tmp_path / "a", "a")
    load_adapter(model, tmp_path / "b", "b")
    set_adapter(model, "a")
    model.shared.weight.requires_grad_(True)
    for switch in (lambda: set_adapter(model, "b"), lambda: load_adapter(model, tmp_path / "b", "c")):
        with pytest.raises(ValueError, match=r"active adapter \('a'\) may train .*; shared.weight requires a gradient"):
            switch()
    save_adapter(model, tmp_path / "more")
    assert "shared.weight" in trained_names(load_adapter(copy.deepcopy(base), tmp_path / "more"))


def test_a_partly_frozen_adapter_is_not_saved(tmp_path, base, two):
    """Its frozen values would count as the base's, which no base has."""
    model = load_adapter(copy.deepcopy(base), tmp_path / "a", "a")
    for name, p in model.named_parameters():
        p.requires_grad_("offsets" in name)
    with pytest.raises(ValueError, match=r"'a' must require a gradient .*router\S* \(and 3 more\) does not: unfreeze"):
        save_adapter(model, tmp_path / "part")


def test_damaged_folders_are_named_in_one_line(tmp_path, base, two):
    folder = tmp_path / "a"
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()
    values = json.loads(good_config)

    def refused(message):
        with pytest.raises(ValueError, match=message) as caught:
            load_adapter(base, folder)
        assert "\n" not in str(caught.value)
        config.write_text(good_config)
        weights.write_bytes(good_weights)

    for text, message in (
        ("{", r"adapter_config\.json must be the JSON file that mpoe wrote; it cannot be read"),
        ("[]", r"adapter_config\.json must hold a JSON object; got list"),
        (json.dumps({"peft_type": "LORA"}), r"adapter_config\.json must have format 'mpoe-adapter'; got None"),
        (json.dumps({**values, "version": 2}), r"adapter_config\.json must have version 1; got 2: update mpoe"),
        (json.dumps({**values, "mpoe": 1}), r"adapter_config\.json must hold the config of a mixture under 'mpoe'"),
        (json.dumps({**values, "mpoe": {"no": 1}}), r"adapter_config\.json must hold the config .* got \['no'\]"),
        (
            json.dumps({**values, "mpoe": {**values["mpoe"], "layout": "balanced", "num_sites": 4}}),
            "a must be an adapter of this kind",
        ),
        (json.dumps({**values, "base_dtypes": 3}), r"adapter_config\.json must be as .*; its base_dtypes is 3"),
        (json.dumps({**values, "base_dtypes": [3]}), r"adapter_config\.json must have names of dtypes .*; got \[3\]"),
        (
            json.dumps({**values, "head": {"id2label": [1]}}),
            r"adapter_config\.json must have a classifier's",
        ),
        (json.dumps({**values, "head": {"num_labels": 10**6, "id2label": {"0": "a"}}}), "must have a classifier's"),
        (json.dumps({k: v for k, v in values.items() if k != "base_hash"}), r"config\.json .* it has no 'base_hash'"),
    ):
        config.write_text(text)
        refused(message)
    config.write_bytes(b"\xff\xfe")
    refused(r"adapter_config\.json must be the JSON")
    flipped = good_weights[:-1] + bytes([good_weights[-1] ^ 1])
    for data in (b"", good_weights[:-8], good_weights[:100], flipped):
        weights.write_bytes(data)
        refused(r"adapter_model\.safetensors must be complete and unchanged; its sha256 is not the weights_hash")
    weights.write_bytes(b"no tensors")
    config.write_text(json.dumps({**values, "weights_hash": hashlib.sha256(b"no tensors").hexdigest()}))
    refused(r"adapter_model\.safetensors must be complete and unchanged; \S+")
    weights.unlink()
    refused(r"a must be a folder that mpoe.save_adapter wrote; it has no adapter_model\.safetensors")
    config.unlink()
    refused(r"a must be a folder that mpoe.save_adapter wrote; it has no adapter_config\.json")
    folder = tmp_path / "missing"
    with pytest.raises(ValueError, match=r"missing must be a folder that mpoe.save_adapter wrote"):
        load_adapter(base, folder)
    assert active_adapter(base) is None
    assert not any(isinstance(module, ExtendedExperts) for module in base.modules())


def test_an_unfinished_write_is_seen(tmp_path, base, two):
    """New tensors under the old config, which is written last."""
    save_file({"x": torch.zeros(1)}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="its sha256 is not the weights_hash"):
        load_adapter(base, tmp_path / "a")
