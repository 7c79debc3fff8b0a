import pytest
import torch

import mpoe
from mpoe.models import mpo_experts, set_compute
from tiny import moved, tiny_t5

GIB = 2**30


def size_of(experts):
    return experts.num_experts * experts.dims.padded_out * experts.dims.padded_in * 4


def test_what_is_multiplied_out_has_a_cache():
    model = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=3, layout="balanced"))
    layers = list(mpo_experts(model).values())
    caches = {id(experts.cache) for experts in layers}
    assert len(caches) == 1
    assert layers[0].cache.limit_bytes == 2 * GIB


def test_only_layers_that_find_room_are_cached():
    model = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=3, layout="balanced"))
    layers = list(mpo_experts(model).values())
    limit = sum(map(size_of, layers)) - 1
    set_compute(model, mpoe.MPOEConfig(layout="balanced", matrix_cache_gib=limit / GIB, matrix_save_gib=len(layers)))
    assert [experts.cache is not None for experts in layers] == [True] * (len(layers) - 1) + [False]
    assert all(experts.save_bytes == GIB for experts in layers)


@pytest.mark.parametrize("site_dims", [None, {"64x32": [[4, 16, 1], [1, 8, 4]], "32x64": [[8, 4, 1], [1, 64, 1]]}])
def test_every_way_gives_the_same_logits(site_dims):
    config = mpoe.MPOEConfig(num_experts=3, layout="balanced", site_dims=site_dims)
    model = moved(mpoe.upcycle(tiny_t5(), config)).eval()
    batch = {"input_ids": torch.randint(2, 40, (2, 9)), "labels": torch.randint(2, 40, (2, 4))}
    with torch.no_grad():
        expected = model(**batch).logits
        for way in ("apply", "rebuild", "cached"):
            set_compute(model, mpoe.MPOEConfig(layout="balanced", compute=way))
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    # with gradients "cached" is whatever is cheapest
    model(**batch).loss.backward()


def test_cached_matrices_follow_the_parameters():
    model = moved(mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=3, layout="balanced", compute="cached"))).eval()
    batch = {"input_ids": torch.randint(2, 40, (2, 9)), "labels": torch.randint(2, 40, (2, 4))}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.no_grad():
        before = model(**batch).logits
        cache = next(iter(mpo_experts(model).values())).cache
        assert cache.bytes > 0
        assert torch.equal(model(**batch).logits, before)
    model(**batch).loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(**batch).logits
        assert not torch.allclose(after, before)
        set_compute(model, mpoe.MPOEConfig(layout="balanced", compute="rebuild"))
        torch.testing.assert_close(model(**batch).logits, after, rtol=1e-4, atol=1e-4)
