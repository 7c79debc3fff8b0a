"""`mpoe push` as a user types it, to a hub on a local port."""

import json
import socket
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForSeq2SeqLM

import mpoe
from mpoe.cli.main import main
from stub_hub import stub_hub
from tiny import assert_refused, moved, tiny_t5, tiny_tokenizer

# Of huggingface_hub's own upload, where the xet library is not used.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch):
    with stub_hub() as stub:
        template = stub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", stub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
        yield stub


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A mixture in `mixture`, with everything beside it that must not go up."""
    monkeypatch.chdir(tmp_path)
    moved(mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=2))).save_pretrained("mixture")
    tiny_tokenizer().save_pretrained("mixture")
    mixture = tmp_path / "mixture"
    for name in (
        "checkpoint-2/optimizer.pt",
        "checkpoint-2/model.safetensors",
        ".saving/x.json",
        "logs/events",
        "x.log",
    ):
        (mixture / name).parent.mkdir(exist_ok=True)
        (mixture / name).write_text("{}")
    for name in ("training_args.bin", "notes.json"):
        (mixture / name).write_text("{}")
    return tmp_path


MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def metadata(card):
    return yaml.safe_load(card.split("---")[1])


def test_a_mixture_goes_up_and_loads_again(folder, hub, capsys):
    assert main(["push", "mixture", "someone/film", "--license", "apache-2.0", "--commit_message", "first"]) == 0
    files = hub.repositories["someone/film"]["main"]
    assert set(files) == {*MODEL_FILES, "README.md"}
    assert hub.commits == ["first"]
    assert "/someone/film" in capsys.readouterr().out
    downloaded = folder / "downloaded"
    downloaded.mkdir()
    for name, content in files.items():
        (downloaded / name).write_bytes(content)
    again, model = mpoe.from_pretrained(downloaded), mpoe.from_pretrained("mixture")
    assert all((p == q).all() for p, q in zip(again.parameters(), model.parameters(), strict=True))
    card = files["README.md"].decode()
    assert metadata(card) == {
        "library_name": "transformers", "license": "apache-2.0", "pipeline_tag": "text2text-generation",
        "tags": ["mpoe", "mixture-of-experts"],
    }  # fmt: skip
    assert 'mpoe.from_pretrained("someone/film")' in card
    assert str(Path.home()) not in card
    assert str(folder) not in card


def test_options_reach_the_hub(folder, hub):
    flags = ["--private", "--revision", "dev", "--include", "notes.json", "logs/*", "--base_model", "google/t5-small"]
    assert main(["push", "mixture", "org/name", *flags]) == 0
    assert hub.created[0]["visibility"] == "private"
    branches = hub.repositories["org/name"]
    assert branches["main"] == {}
    assert set(branches["dev"]) == {*MODEL_FILES, "README.md", "notes.json", "logs/events"}
    assert metadata(branches["dev"]["README.md"].decode())["base_model"] == "google/t5-small"


def test_cards_that_somebody_wrote_stay(folder, hub, capsys):
    assert main(["push", "mixture", "a/b"]) == 0
    on_hub = hub.repositories["a/b"]["main"]
    on_hub["README.md"] = b"written on the hub"
    assert main(["push", "mixture", "a/b"]) == 0
    assert on_hub["README.md"] == b"written on the hub"
    assert "--new_card replaces it" in capsys.readouterr().out
    (folder / "mixture" / "README.md").write_text("written here")
    assert main(["push", "mixture", "a/b"]) == 0
    assert on_hub["README.md"] == b"written here"
    assert main(["push", "mixture", "a/b", "--new_card"]) == 0
    assert b"A mixture of experts" in on_hub["README.md"]
    assert (folder / "mixture" / "README.md").read_text() == "written here"


def test_card_only_asks_no_network(folder, capsys):
    assert main(["push", "mixture", "a/b", "--card_only", "card.md", "--include", "x.log"]) == 0
    printed = capsys.readouterr().out
    for name in (*MODEL_FILES, "x.log", "README.md"):
        assert f"  {name} " in printed
    assert "checkpoint" not in printed
    card = ModelCard((folder / "card.md").read_text())
    assert card.data.library_name == "transformers"
    assert main(["push", "mixture", "a/b", "--card_only", "card.md"]) == 2
    assert "must be a new file" in capsys.readouterr().err


def test_an_adapter_names_a_base_that_others_have(folder, hub, capsys):
    tiny_t5().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    model = mpoe.upcycle(AutoModelForSeq2SeqLM.from_pretrained(folder / "base"), mpoe.MPOEConfig(num_experts=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".base." not in name)
    mpoe.save_adapter(model, "adapter")
    assert main(["push", "adapter", "a/b"]) == 2
    assert "its base as others can load it" in capsys.readouterr().err
    assert main(["push", "adapter", "a/b", "--base_model", "google/flan-t5-small"]) == 0
    files = hub.repositories["a/b"]["main"]
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "google/flan-t5-small"
    assert (
        'load_adapter(T5ForConditionalGeneration.from_pretrained("google/flan-t5-small")' in files["README.md"].decode()
    )
    assert str(folder) in (folder / "adapter" / "adapter_config.json").read_text(), "the user's own file stays"


def test_places_on_this_machine_do_not_go_up(folder, hub, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/alice")
    file = folder / "mixture" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "name_or_path": "/home/alice/models/t5"}))
    assert main(["push", "mixture", "a/b"]) == 0
    assert b"alice" not in b"".join(hub.repositories["a/b"]["main"].values())
    file = folder / "mixture" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "origin": "/home/alice/x"}))
    assert main(["push", "mixture", "a/b"]) == 2
    assert "generation_config.json must not name your home folder" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "advice"), [(403, "allowed to write there"), (400, "look at its message")])
def test_a_hub_that_refuses_is_one_line(folder, hub, capsys, status, advice):
    hub.refuses = status
    assert_refused(["push", "mixture", "a/b"], advice, folder, capsys)
    assert hub.repositories == {}


def test_a_hub_that_is_not_there_is_one_line(folder, hub, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert_refused(["push", "mixture", "a/b"], "the hub must be reachable; http://127.0.0.1", folder, capsys)


def test_offline_mode_and_no_token_are_said_before_anything_is_loaded(folder, hub, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused(["push", "mixture", "a/b"], "HF_HUB_OFFLINE must not be set", folder, capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert_refused(["push", "mixture", "a/b"], "you must be logged in", folder, capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "a/b"], "there is no folder nowhere"),
        (["mixture", "name"], "the name must be owner/name; got name"),
        (["mixture", "a/b/c"], "the name must be as on the hub"),
        (["mixture", "a/b", "--base_model", "/home/alice/t5"], "--base_model must be as on the hub"),
        (["mixture", "a/b", "--license", "MIT!"], "--license must be an identifier"),
        (["mixture", "a/b", "--include", "../*"], "--include must name files below mixture; '../*' matches none"),
        (["mixture", "a/b", "--include", "/etc/*"], "matches none"),
        (["empty", "a/b"], "it has none: name a finished model"),
        (["mixture", "a/b", "--card_only", "nowhere/card.md"], "must be a new file in a folder that is there"),
        (["mixture", "a/b", "--force"], "unknown flag --force"),
    ],
)
def test_wrong_input_is_one_line(folder, hub, capsys, argv, message):
    (folder / "empty").mkdir()
    assert_refused(["push", *argv], message, folder, capsys)
    assert hub.repositories == {}


def test_damaged_weights_do_not_go_up(folder, hub, capsys):
    weights = folder / "mixture" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(["push", "mixture", "a/b"], "must be complete and undamaged", folder, capsys)
    assert hub.repositories == {}
