"""Code beside a model's weights, or beside a dataset, is not executed."""

import io
import json
import sys

import pytest
import transformers

import mpoe
from mpoe.cli.main import main
from mpoe.models import class_of, load_tokenizer
from tiny import FLAGS, assert_refused, tiny_t5

pytestmark = pytest.mark.filterwarnings("ignore:.*experts got under 1%:UserWarning")

COMMANDS = {
    "finetune": ["finetune", *FLAGS],
    "generate": ["generate", "model", "a text"],
    "inspect": ["inspect", "--config", "model"],
    "perplexity": ["perplexity", "model", "--test_file", "data/CoLA/dev.tsv"],
    "predict": ["predict", "model", "a text"],
}


@pytest.fixture
def marker(ground, monkeypatch):
    """The folder that appears when the code of the model's folder is executed; whoever is asked says yes."""
    path = ground / "executed"
    for name in ("model", "data"):
        (ground / name / "theirs.py").write_text(f"import os\nos.mkdir({str(path)!r})\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    yield path
    assert not path.exists()


def add_code(folder, model_type):
    auto = ("AutoConfig", "AutoModelForSeq2SeqLM", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    for file, changes in (
        ("config.json", {"model_type": model_type, "auto_map": dict.fromkeys(auto, "theirs.Theirs")}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.X", None]}},
        ),
    ):
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_with_code_of_its_own_is_refused(ground, marker, capsys, command):
    add_code(ground / "model", "theirs")
    assert_refused(COMMANDS[command], "and mpoe executes none", ground, capsys)


@pytest.mark.parametrize("command", ["finetune", "inspect", "predict"])
def test_a_known_model_needs_no_code_and_gets_none(ground, marker, command):
    add_code(ground / "model", "t5")
    assert main(COMMANDS[command]) == 0


def test_a_tokenizer_with_code_of_its_own(ground, marker):
    add_code(ground / "model", "theirs")
    with pytest.raises(ValueError, match="and mpoe executes none"):
        load_tokenizer("model")


def test_a_mixture_with_code_of_its_own(ground, marker):
    mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=2)).save_pretrained("model")
    values = json.loads((ground / "model" / "config.json").read_text())
    values |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    (ground / "model" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="and mpoe executes none"):
        mpoe.from_pretrained("model")


@pytest.mark.parametrize("name", ["pipeline", "Trainer", "AutoModel", "__doc__", "logging", "nothing", ""])
def test_an_architecture_is_a_model_of_transformers(ground, name):
    mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=2)).save_pretrained("model")
    values = json.loads((ground / "model" / "config.json").read_text())
    (ground / "model" / "config.json").write_text(json.dumps({**values, "architectures": [name]}))
    assert class_of(transformers.AutoConfig.from_pretrained("model")) is None
    with pytest.raises(ValueError, match="must name a model of Transformers"):
        mpoe.from_pretrained("model")


@pytest.mark.parametrize("hub", ["./data", "./data/theirs.py"])
def test_a_datasets_script_is_refused(ground, marker, capsys, hub):
    (ground / "data" / "data.py").write_text((ground / "data" / "theirs.py").read_text())
    task = {"name": "mine", "template": "{sentence}", "labels": ["0", "1"], "metrics": ["accuracy"], "hub": hub}
    (ground / "mine.yaml").write_text(json.dumps(task))
    flags = ["mine.yaml" if word == "sentiment" else word for word in FLAGS if word not in ("--data_dir", "data")]
    assert_refused(["finetune", *flags], "could not be loaded from the hub", ground, capsys)
