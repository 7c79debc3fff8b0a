"""The model card: what it says, and that nothing in it acts or leaks."""

import dataclasses
import math

import pytest
import yaml
from huggingface_hub import ModelCard

from mpoe.config import MPOEConfig
from mpoe.models import ParameterCount
from mpoe.report.model_card import CardFacts, model_card, public_flags
from mpoe.training.finetune import FinetuneResult

COUNT = ParameterCount(
    other=1000, central=2000, auxiliary=300, router=40, trained=3340, dense=3000, whole_experts=9040, active=3140
)
RESULTS = FinetuneResult(
    tasks={"cola": {"validation": {"matthews": 0.4, "rows": 10}, "test": {"matthews": 0.5, "accuracy": 0.8}}},
    average={"validation": 0.4, "test": 0.5}, train_loss=0.1, steps=20, best_step=None, seconds_per_step=1.0,
    tokens_per_second=None, peak_memory=1, parameters=COUNT, trained=[], routers={}, shuffled=None, gradient_mask=None,
    adapter_bytes=None, versions={"python": "3.11.2", "torch": "2.13.0"},
)  # fmt: skip
FLAGS = {
    "model_name_or_path": "google/flan-t5-small", "tasks": ["cola"], "num_experts": 4, "learning_rate": 3e-4,
    "max_eval_tokens": 100, "hub_token": "hf_secret", "data_dir": "/home/alice/glue", "deepspeed": "/home/alice/d.json",
    "tokenizer_name": "../alice/t5", "bf16": True, "stacks": ["encoder", "decoder"], "api_key": "abc",
    "report_to": ["tensorboard"],
}  # fmt: skip
FACTS = CardFacts(
    "someone/film", "T5ForConditionalGeneration", COUNT, MPOEConfig(num_experts=4), base_model="google/flan-t5-small",
    license="apache-2.0", flags=FLAGS, results=RESULTS, versions={"mpoe": "0.1.0"},
)  # fmt: skip


def metadata(card):
    return yaml.safe_load(card.split("---")[1])


def test_it_says_what_the_model_is_and_what_it_reached():
    card = model_card(FACTS)
    ModelCard(card)
    values = metadata(card)
    assert values["base_model"] == "google/flan-t5-small"
    assert values["license"] == "apache-2.0"
    (entry,) = values["model-index"]
    assert entry["name"] == "film"
    (result,) = entry["results"]
    assert result["task"] == {"type": "text-classification"}
    assert result["dataset"]["type"] == "cola", "rows of a folder are not called the hub's"
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert metrics == {"matthews_correlation": 0.5, "accuracy": 0.8}
    for text in (
        "4 experts of a feed-forward layer share its matrices, and each adds a matrix of rank 8", "to 2 of them",
        "| layout | extended |", "| expert_rank | 8 |",
        "| all | 3,340 |", "| met by one token | 3,140 |", "| the dense model | 3,000 |",
        "| the same mixture of whole experts | 9,040 |", "| cola | test | matthews | 0.5000 |",
        "| cola | validation | rows | 10 |", "20 steps", "| learning_rate | 0.0003 |", "gao-etal-2022-parameter",
        "torch 2.13.0", "mpoe 0.1.0", 'mpoe.from_pretrained("someone/film")',
    ):  # fmt: skip
        assert text in card, text


def test_without_a_folder_of_data_the_rows_are_those_of_the_hub():
    flags = {name: value for name, value in FLAGS.items() if name != "data_dir"}
    (entry,) = metadata(model_card(dataclasses.replace(FACTS, flags=flags)))["model-index"]
    assert entry["results"][0]["dataset"]["type"] == "nyu-mll/glue"
    assert entry["results"][0]["dataset"]["config"] == "cola"


def test_nothing_private_is_in_it():
    assert public_flags(FLAGS) == {
        "tasks": ["cola"], "num_experts": 4, "learning_rate": 3e-4, "max_eval_tokens": 100, "bf16": True,
        "stacks": ["encoder", "decoder"], "report_to": ["tensorboard"],
    }  # fmt: skip
    card = model_card(FACTS)
    for text in ("alice", "hf_secret", "abc", "glue"):
        assert text not in card
    assert "6 more, which name files and folders, are left out" in card


def test_texts_of_others_are_only_texts():
    tasks = {"<b>|[x](http://evil)\n# head": {"test": {"accuracy": math.nan, "perplexity": 5.0, "ro|ws": 1.0}}}
    results = dataclasses.replace(RESULTS, tasks=tasks, versions={"py|thon": "`3`\n---"})
    export = {"how": "<script>\n---\n[a](b)", "logits": {"places": 3, "largest": "<i>", "kl": 0.5}}
    card = model_card(dataclasses.replace(FACTS, results=results, mixture=None, export=export))
    body = card.split("---\n", 2)[2]
    for text in ("<b>", "<script>", "](", "|[", "\n# head", "<i>", "`3`"):
        assert text not in body, text
    assert "| KL divergence, nats a token | 0.5 |" in body
    (entry,) = metadata(card)["model-index"]
    assert [metric["value"] for result in entry["results"] for metric in result["metrics"]] == [5.0]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mixture": None}, "A fine-tuned T5ForConditionalGeneration of google/flan-t5-small."),
        ({"mixture": MPOEConfig(moe_type="none", expert_rank=4)}, "are extended by rank 32, without a router."),
        ({"mixture": MPOEConfig(layout="balanced")}, "share one large central tensor a matrix"),
        (
            {"mixture": MPOEConfig(num_experts=1, layout="balanced", mpo_layers=("mlp", "attention"))},
            "whose mlp, attention are matrix product operators.",
        ),
        ({"mixture": MPOEConfig(mpo_layers=())}, "are whole matrices"),
        ({"mixture": MPOEConfig(share_central=False, layout="balanced")}, "that share nothing"),
        ({"is_adapter": True}, "An adapter that makes a mixture of experts of google/flan-t5-small"),
        ({"mixture": None, "export": {"how": "expert 1 of every layer"}}, "exported by mpoe from a mixture of experts"),
    ],
)
def test_every_kind_of_model_is_called_what_it_is(changes, text):
    assert text in model_card(dataclasses.replace(FACTS, **changes))


def test_what_is_not_known_is_not_said():
    card = model_card(CardFacts("a/b", "ViTForImageClassification", COUNT))
    assert metadata(card) == {
        "library_name": "transformers", "pipeline_tag": "image-classification", "tags": ["mpoe"],
    }  # fmt: skip
    assert "None" not in card
    assert "## Results" not in card
    assert "Citation" not in card
