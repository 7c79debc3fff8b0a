import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import mpoe
from mpoe.models import route_text, routers
from tiny import moved, tiny_t5, tiny_tokenizer

TEXT = "the film is  great ."


def mixture(model, **options):
    return moved(mpoe.upcycle(model, mpoe.MPOEConfig(**{"num_experts": 4, **options})))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4))


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))


@pytest.mark.parametrize("make", [gpt2, bert])
@pytest.mark.parametrize("top_k", [1, 2])
def test_tokens_get_the_experts_that_the_routers_choose(make, top_k):
    model = mixture(make(), top_k=top_k, moe_type="switch" if top_k == 1 else "moe")
    tokenizer = tiny_tokenizer()
    (routing,) = route_text(model, tokenizer, TEXT)
    assert "".join(before + piece for before, piece in routing.pieces) == f"{TEXT} </s>"
    assert routing.num_experts == 4
    assert list(routing.layers) == list(routers(model))
    inputs = {}
    for name, router in routers(model).items():
        router.register_forward_pre_hook(lambda router, args, name=name: inputs.__setitem__(name, args[0].detach()))
    with torch.no_grad():
        model(**tokenizer(TEXT, return_tensors="pt"))
    for name, choice in routing.layers.items():
        router = routers(model)[name]
        x = torch.nn.functional.rms_norm(inputs[name], inputs[name].shape[-1:])
        probabilities = (x @ router.weight.T).softmax(-1)
        best = probabilities.topk(top_k)
        assert choice.experts == best.indices.tolist()
        assert choice.probability == pytest.approx(best.values[:, 0].tolist(), abs=2e-3)


def test_an_encoder_decoders_answer_has_experts_too():
    model = mixture(tiny_t5())
    model.generation_config.max_length = None
    text, answer = route_text(model, tiny_tokenizer(), TEXT)
    assert (text.title, answer.title) == ("Text", "Answer")
    assert list(text.layers) == [name for name in routers(model) if name.startswith("encoder")]
    assert list(answer.layers) == [name for name in routers(model) if name.startswith("decoder")]
    assert answer.pieces[0] == (" ", "<pad>"), "what a decoder begins with"
    for routing in (text, answer):
        assert all(len(choice.experts) == len(routing.pieces) for choice in routing.layers.values())
    (text,) = route_text(mixture(tiny_t5(), stacks=("encoder",)), tiny_tokenizer(), TEXT)
    assert text.title == "Text"


def test_an_input_that_is_routed_as_one():
    (text,) = route_text(mixture(tiny_t5(), stacks=("encoder",), routing="sequence"), tiny_tokenizer(), TEXT)
    for choice in text.layers.values():
        assert len(choice.experts) == len(text.pieces)
        assert len({tuple(experts) for experts in choice.experts}) == 1


def test_what_an_expert_has_no_room_for():
    model = mixture(gpt2(), layout="balanced", eval_capacity_factor=0.1)
    for router in routers(model).values():
        router.bias.data = torch.tensor([9.0, 0.0, 0.0, 0.0])
    (routing,) = route_text(model, tiny_tokenizer(), "the film is very good . the film is not bad .")
    choice = next(iter(routing.layers.values()))
    assert [experts for experts in choice.experts if experts] == [[0]] * 4
    assert choice.experts.count([]) == len(routing.pieces) - 4


def test_a_long_text_is_cut_and_says_so():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 6
    (routing,) = route_text(mixture(gpt2()), tokenizer, "the film is very good . the film")
    assert len(routing.pieces) == 6
    assert routing.left_out == 3


def test_nothing_to_route():
    with pytest.raises(ValueError, match="no routers"):
        route_text(tiny_t5(), tiny_tokenizer(), TEXT)
