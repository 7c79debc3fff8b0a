import errno
import json
import re

import pytest
from safetensors import SafetensorError

from mpoe.training.run_folder import RunFolder
from tiny import files

ARGUMENTS = {"task": "cola", "num_experts": 8}


def make_checkpoint(folder, step, complete=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if complete:
        (path / "trainer_state.json").write_text("{}")
    return path


def claimed(path, arguments):
    run = RunFolder.open(path, arguments)
    run.claim()
    return run


def test_a_new_folder_is_claimed(tmp_path):
    run = RunFolder.open(tmp_path / "deep" / "run", ARGUMENTS)
    assert (run.checkpoint, run.results) == (None, None)
    assert not run.path.exists()
    run.claim()
    assert json.loads((run.path / "run.json").read_text()) == ARGUMENTS


def test_the_same_command_finds_its_last_complete_checkpoint(tmp_path):
    run = claimed(tmp_path / "run", ARGUMENTS)
    make_checkpoint(run.path, 20)
    complete = make_checkpoint(run.path, 100)
    make_checkpoint(run.path, 120, complete=False)
    assert RunFolder.open(run.path, dict(ARGUMENTS)).checkpoint == complete


def test_a_finished_run_is_found(tmp_path):
    run = claimed(tmp_path / "run", ARGUMENTS)

    def write_model(folder):
        from pathlib import Path

        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"weights")

    run.save(write_model, {"score": 1})
    found = RunFolder.open(run.path, ARGUMENTS)
    assert found.results == {"score": 1}
    assert sorted(path.name for path in run.path.iterdir()) == ["model.safetensors", "results.json", "run.json"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: claimed(p, {**ARGUMENTS, "num_experts": 4}), r"another run \(num_experts: 4 there, 8 now\)"),
        (lambda p: claimed(p, {**ARGUMENTS, "seed": 1}), r"another run \(seed: 1 there, the default now\)"),
        (lambda p: (p.mkdir(), (p / "thesis.tex").write_text("dear reader")), "holds other files and no run.json"),
        (lambda p: p.write_text("a file"), "is a file; name another"),
        (lambda p: (p.mkdir(), (p / "run.json").write_text("{")), "cannot be read"),
        (lambda p: (p.mkdir(), (p / "run.json").write_text("[]")), "must hold a JSON object; got list"),
    ],
)
def test_what_is_there_is_refused_and_left_alone(tmp_path, prepare, message):
    prepare(tmp_path / "run")
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message):
        RunFolder.open(tmp_path / "run", ARGUMENTS)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_error_and_leaves_what_was_complete(tmp_path, error):
    run = claimed(tmp_path / "run", ARGUMENTS)
    for step, message in ((None, "starts anew"), (20, "goes on from checkpoint-20")):
        kept = step and make_checkpoint(run.path, step)
        unfinished = make_checkpoint(run.path, 40, complete=False)
        (run.path / ".saving").mkdir()
        with pytest.raises(ValueError, match=f"must have room .* is full.*{message}"), run.guard():
            raise error
        assert not unfinished.exists()
        assert not (run.path / ".saving").exists()
        assert run.checkpoint is None
        assert RunFolder.open(run.path, ARGUMENTS).checkpoint == kept


def test_other_errors_pass_the_guard(tmp_path):
    run = claimed(tmp_path / "run", ARGUMENTS)
    unfinished = make_checkpoint(run.path, 40, complete=False)
    for error in (OSError(errno.EACCES, "denied"), RuntimeError("out of memory"), SafetensorError("header")):
        with pytest.raises(type(error), match=re.escape(str(error))), run.guard():
            raise error
    assert unfinished.exists()


def test_nobody_else_trains_in_the_folder(tmp_path):
    run = claimed(tmp_path / "run", ARGUMENTS)
    with run.guard():
        with pytest.raises(ValueError, match="another process trains in"), run.guard():
            pytest.fail("it was let in")
        with run.guard(is_main=False):  # another process of the same distributed run
            pass
    with run.guard():  # it is free again, and nothing is left of it
        pass
    assert {str(name) for name in files(run.path)} == {"run.json"}


def test_a_run_that_is_not_known_any_more_names_its_checkpoints(tmp_path):
    run = claimed(tmp_path / "run", ARGUMENTS)
    kept = make_checkpoint(run.path, 20)
    (run.path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=rf"run\.json .* --load_experiment {kept} takes the weights"):
        RunFolder.open(run.path, ARGUMENTS)
    (run.path / "run.json").unlink()
    with pytest.raises(ValueError, match=rf"no run\.json; name another, into which --load_experiment {kept} takes"):
        RunFolder.open(run.path, ARGUMENTS)


def test_another_number_of_rows_a_step_says_what_that_is(tmp_path):
    claimed(tmp_path / "run", {"rows_a_step": 8})
    with pytest.raises(
        ValueError, match=r"rows_a_step: 8 there, 6 now.*is per_device_train_batch_size times processes"
    ):
        RunFolder.open(tmp_path / "run", {"rows_a_step": 6})
