"""The distance of two models' logits, against sums by hand."""

import pytest
import torch

from mpoe.models.difference import IGNORED, logit_difference
from tiny import logits_of, moved
from tiny_families import family_batch, tiny_model


@pytest.mark.parametrize("name", ["t5-v1.1", "llama", "bert"])
def test_it_is_the_sum_by_hand(name):
    first = tiny_model(name)
    second = moved(tiny_model(name))
    batches = [family_batch(name), family_batch(name, rows=2, length=7)]
    if name == "t5-v1.1":
        batches[0]["labels"][0, -2:] = IGNORED
    elif name == "llama":
        for batch in batches:
            del batch["labels"]
    pairs = []
    for batch in batches:
        p, q = logits_of(first, batch).double(), logits_of(second, batch).double()
        for row in range(len(p)):
            for place in range(p.shape[1]) if p.ndim == 3 else [None]:
                counts = True
                if name == "t5-v1.1":
                    counts = batch["labels"][row, place] != IGNORED
                elif name == "llama":
                    counts = batch["attention_mask"][row, place] == 1
                if counts:
                    pairs.append((p[row], q[row]) if place is None else (p[row, place], q[row, place]))
    found = logit_difference(first, second, batches)
    assert found.places == len(pairs)
    assert found.largest == pytest.approx(max((p - q).abs().max().item() for p, q in pairs))
    assert found.mean == pytest.approx(sum((p - q).abs().mean().item() for p, q in pairs) / len(pairs))
    kl = [torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in pq)) for pq in pairs]
    assert found.kl == pytest.approx(sum(kl).item() / len(pairs))
    assert found.same_choice == sum(bool(p.argmax() == q.argmax()) for p, q in pairs) / len(pairs)


def test_a_model_is_no_way_from_itself_and_nan_is_no_difference():
    model = tiny_model("llama")
    found = logit_difference(model, model, [family_batch("llama")])
    assert (found.largest, found.kl, found.same_choice) == (0, 0, 1)
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="those of the second model are not"):
        logit_difference(model, broken, [family_batch("llama")])
    with pytest.raises(ValueError, match="must have a token"):
        logit_difference(model, model, [])
