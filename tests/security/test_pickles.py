"""No pickle of a user's folder is executed, whichever command reads it."""

import hashlib
import json
import pickle

import pytest
import torch

import mpoe
from hostile import Plant
from mpoe.cli.main import main
from mpoe.models import save_adapter
from mpoe.models.adapter import WEIGHTS_FILE
from mpoe.training.checkpoint_files import seal
from tiny import FLAGS, assert_refused, run_and_kill, tiny_t5

# Two experts and a dozen tokens: one of them goes hungry.
pytestmark = pytest.mark.filterwarnings("ignore:.*experts got under 1%:UserWarning")

FORMS = {
    "zip": lambda value, path: torch.save(value, path),
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "bare": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
}


@pytest.fixture
def marker(ground):
    """The folder that appears when a planted pickle is executed."""
    path = ground / "executed"
    yield path
    assert not path.exists()


def plant(path, marker, form="zip", beside=None):
    """Write a pickle that would make the marker; the same bytes, executed on purpose, do."""
    written = path.with_suffix(".bin")  # torch goes by the suffix
    FORMS[form]({**(beside or {}), "planted": Plant(marker)}, written)
    if form == "bare":
        pickle.loads(written.read_bytes())
    else:
        torch.load(written, weights_only=False)
    written.rename(path)
    marker.rmdir()  # or the test would prove nothing


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("command", ["finetune", "predict", "generate"])
def test_the_weights_of_a_model(ground, marker, capsys, command, form):
    (ground / "model" / "model.safetensors").unlink()
    plant(ground / "model" / "pytorch_model.bin", marker, form, dict(tiny_t5().state_dict()))
    words = FLAGS if command == "finetune" else ["model", "a text"]
    assert_refused([command, *words], "model/pytorch_model.bin", ground, capsys)
    assert "weights_only" not in capsys.readouterr().err


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_of_a_mixture(ground, marker, form):
    model = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=2))
    model.save_pretrained("mixture")
    (ground / "mixture" / "model.safetensors").unlink()
    plant(ground / "mixture" / "pytorch_model.bin", marker, form, dict(model.state_dict()))
    with pytest.raises(ValueError, match=r"mixture/pytorch_model\.bin") as caught:
        mpoe.from_pretrained("mixture")
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_the_reference(ground, marker, capsys, form):
    plant(ground / "reference.bin", marker, form)
    command = ["import-reference", "reference.bin", "--config", "model", "--output_dir", "out"]
    assert_refused(command, "reference.bin", ground, capsys)


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_of_an_adapter(ground, marker, capsys, form):
    base = tiny_t5().from_pretrained("model")
    mixture = mpoe.upcycle(base, mpoe.MPOEConfig(num_experts=2))
    for name, parameter in mixture.named_parameters():
        parameter.requires_grad_("offset" in name)
    save_adapter(mixture, "adapter")
    plant(ground / "adapter" / WEIGHTS_FILE, marker, form)
    assert_refused(["predict", "adapter", "a text"], WEIGHTS_FILE, ground, capsys)
    config = ground / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text())
    values["weights_hash"] = hashlib.sha256((ground / "adapter" / WEIGHTS_FILE).read_bytes()).hexdigest()
    config.write_text(json.dumps(values))  # so that only the format stands
    assert_refused(["predict", "adapter", "a text"], WEIGHTS_FILE, ground, capsys)


@pytest.fixture
def killed(ground):
    """A run that was killed after its first checkpoint."""
    run_and_kill(FLAGS, 3)
    return ground / "run" / "checkpoint-2"


@pytest.mark.parametrize(
    ("name", "form"),
    [*(("optimizer.pt", form) for form in FORMS), ("scheduler.pt", "zip"), ("rng_state.pth", "zip")],
)
def test_the_files_that_a_run_goes_on_from(killed, ground, marker, capsys, name, form):
    plant(killed / name, marker, form)
    seal(killed)  # so that only the pickle guard stands
    assert main(["finetune", *FLAGS]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: "), error
    assert error.count("\n") == 1
    assert f"run/checkpoint-2/{name}" in error
    assert "weights_only" not in error


def test_nobody_reads_the_arguments_of_a_checkpoint(killed, marker):
    plant(killed / "training_args.bin", marker)
    seal(killed)
    assert main(["finetune", *FLAGS]) == 0
