"""Models to a number of parameters, saved and loaded."""

import copy

import pytest
import torch

import mpoe
from mpoe.models import count_parameters
from mpoe.models.compress import LAYOUTS, compress, input_moments
from tiny import V1_0, logits_of, tiny_batch, tiny_t5
from tiny_families import family_batch, tiny_model

ALL = ("mlp", "attention", "word_embed")


def share(result, model):
    return count_parameters(result.model).total / count_parameters(model).total


@pytest.mark.parametrize("layouts", [("balanced",), ("low_rank",), ("balanced", "low_rank")])
@pytest.mark.parametrize("components", [("mlp",), ("mlp", "attention"), ALL])
@pytest.mark.parametrize("version", [V1_0, None])
def test_a_t5_is_within_its_budget_and_comes_back_from_disk(layouts, components, version, tmp_path):
    model = tiny_t5() if version is None else tiny_t5(version)
    before, batch = copy.deepcopy(model.state_dict()), tiny_batch()
    result = compress(model, 0.85, components, layouts)
    assert 0.8 < share(result, model) <= 0.85
    assert result.error <= result.predicted + 1e-6
    assert result.error > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    result.model.save_pretrained(tmp_path / "out")
    loaded = mpoe.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits_of(loaded, batch), logits_of(result.model, batch))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "phi3"])
def test_other_families(family):
    model = tiny_model(family).eval()
    batch = family_batch(family)
    whole = compress(model, 1.0)
    torch.testing.assert_close(logits_of(whole.model, batch), logits_of(model, batch), rtol=1e-4, atol=1e-4)
    smaller = compress(model, 0.8)
    assert share(smaller, model) <= 0.8
    assert torch.isfinite(logits_of(smaller.model, batch)).all()


def test_the_layout_that_loses_less_is_taken_for_every_matrix():
    model = tiny_t5()
    alone = [compress(model, 0.8, layouts=(layout,)).predicted for layout in ("balanced", "low_rank")]
    assert compress(model, 0.8, layouts=("balanced", "low_rank")).predicted <= min(alone) + 1e-3


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_with_the_inputs_moments_the_outputs_are_nearer(layout):
    model, batch = tiny_t5(), tiny_batch(rows=16)
    embedding = model.shared.weight.data
    embedding *= torch.linspace(3, 0.01, embedding.shape[1])  # inputs that are far from white
    with input_moments(model) as moments:
        logits_of(model, batch)
    assert {tuple(moment.shape) for moment in moments.values()} == {(32, 32), (64, 64)}
    with_moments = compress(model, 0.8, layouts=(layout,), moments=moments)

    def distance(result):
        """Of the outputs of the compressed matrices, relative, root mean square."""
        return sum(matrix.error**2 for matrix in result.matrices)

    plain = compress(model, 0.8, layouts=(layout,))
    chosen = {matrix.name: matrix for matrix in with_moments.matrices}
    assert chosen.keys() == {matrix.name for matrix in plain.matrices}
    assert with_moments.error < 1
    if layout == "low_rank":  # the moments are used whole: what is predicted is what is measured
        assert distance(with_moments) == pytest.approx(sum(m.predicted**2 for m in with_moments.matrices), rel=1e-6)


def mixture(**options):
    of = {"num_experts": 4, "layout": "balanced", "expert_noise": 0.05, **options}
    return mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(**of)).eval()


def test_a_mixture_stays_one(tmp_path):
    model, batch = mixture(), tiny_batch()
    whole = compress(model, 1.0)
    torch.testing.assert_close(logits_of(whole.model, batch), logits_of(model, batch), rtol=1e-4, atol=1e-4)
    result = compress(model, 0.85)
    assert share(result, model) <= 0.85
    assert result.model.config.quantization_config.num_experts == 4
    result.model.save_pretrained(tmp_path / "out")
    loaded = mpoe.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits_of(loaded, batch), logits_of(result.model, batch))


def test_experts_have_a_budget_of_their_own():
    model = mixture()
    before = count_parameters(model)
    free, limited = (count_parameters(compress(model, 0.9, expert_budget=share).model) for share in (None, 0.3))
    assert limited.auxiliary <= 0.3 * before.auxiliary < free.auxiliary
    assert limited.total <= 0.9 * before.total


def test_a_compressed_model_trains():
    model = compress(tiny_t5(), 0.8).model.train()
    loss = model(**tiny_batch()).loss
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, r"budget must be a share in \(0, 1\]"),
        ({"budget": 1.5}, r"budget must be a share in \(0, 1\]"),
        ({"budget": 0.01}, "must leave room for bonds of 1"),
        ({"budget": 0.8, "layouts": ("flat",)}, "layouts must be among low_rank, balanced"),
        ({"budget": 0.8, "components": ()}, "components given"),
        ({"budget": 0.8, "components": ("ffn",)}, "mpo_layers must be a list of"),
        ({"budget": 0.8, "expert_budget": 0.5}, "expert_budget is about the experts of a mixture"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compress(tiny_t5(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mpo_layers": ()}, "experts share nothing. Compress its dense base"),
        ({"share_central": False}, "experts share nothing. Compress its dense base"),
        ({"layout": "extended", "expert_noise": 0.0}, "experts extend the matrices of its base. Compress its dense"),
    ],
)
def test_mixtures_without_a_chain_to_cut_are_refused(options, message):
    model = mixture(**options)
    with pytest.raises(ValueError, match=message):
        compress(model, 0.8)
    with pytest.raises(ValueError, match=message), input_moments(model):
        pass
