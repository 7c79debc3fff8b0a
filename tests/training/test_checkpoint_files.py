import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpoe.cli.main import main
from mpoe.training.checkpoint_files import finished_checkpoints, last_checkpoint, seal, unfinished_checkpoints
from tiny import FLAGS


def make_checkpoint(folder, step, sealed=True):
    path = folder / f"checkpoint-{step}"
    (path / "deeper").mkdir(parents=True)
    save_file({"weight": torch.randn(5, 3)}, path / "model.safetensors")
    torch.save({"state": torch.randn(7)}, path / "optimizer.pt")
    (path / "deeper" / "more.txt").write_text("more")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if sealed:
        seal(path)
    return path


def cut(file):
    file.write_bytes(file.read_bytes()[:-3])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path):
    steps = [9, 100, 20]
    paths = {step: make_checkpoint(tmp_path, step) for step in steps}
    (tmp_path / "checkpoint-x").mkdir()
    assert finished_checkpoints(tmp_path) == [paths[step] for step in (100, 20, 9)]
    assert last_checkpoint(tmp_path) == paths[100]
    assert last_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_without_a_seal_a_checkpoint_counts_if_every_file_is_whole(tmp_path, file):
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2, sealed=False)
    assert last_checkpoint(tmp_path) == second
    cut(second / file)
    assert last_checkpoint(tmp_path) == first
    assert unfinished_checkpoints(tmp_path) == [second]
    (second / file).unlink()
    if file == "trainer_state.json":
        assert unfinished_checkpoints(tmp_path) == [second]


@pytest.mark.parametrize(("field", "value"), [(10, 77), (8, 1), (8, 64)])  # compression; password, encryption
def test_without_a_seal_an_archive_that_cannot_be_unpacked_is_not_whole(tmp_path, field, value):
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2, sealed=False)
    data = bytearray((second / "optimizer.pt").read_bytes())
    for magic, place in ((b"PK\x01\x02", field), (b"PK\x03\x04", field - 2)):
        data[data.index(magic) + place] = value
    (second / "optimizer.pt").write_bytes(data)
    assert last_checkpoint(tmp_path) == first


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "deeper/more.txt"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut, "bytes instead of"), (flip, "has not the checksum"), (lambda file: file.unlink(), "is missing")],
)
def test_damage_is_named_with_what_to_do(tmp_path, file, damage, message):
    make_checkpoint(tmp_path, 1)
    second = make_checkpoint(tmp_path, 2)
    damage(second / file)
    with pytest.raises(ValueError, match=message) as error:
        last_checkpoint(tmp_path)
    assert file in str(error.value)
    assert f"(rm -r {second}), and the same command goes on from checkpoint-1" in str(error.value)


def test_damage_of_the_seal_and_of_the_only_checkpoint(tmp_path):
    path = make_checkpoint(tmp_path, 1)
    for text in ("{", "[]", '{"model.safetensors": 3}', '{"a.bin": {"bytes": "x"}}', '{"a.bin": {"bytes": Infinity}}'):
        (path / "checksums.json").write_text(text)
        with pytest.raises(ValueError, match=r"checksums\.json is damaged.* the same command starts anew"):
            last_checkpoint(tmp_path)


def test_a_run_that_died_after_its_last_checkpoint_keeps_as_many_as_an_unbroken_one(ground):
    command = ["finetune", *FLAGS, "--save_total_limit", "1"]
    assert main(command) == 0
    assert [path.name for path in Path("run").glob("checkpoint-*")] == ["checkpoint-4"]
    shutil.copytree("run/checkpoint-4", "run/checkpoint-2")  # killed before it was deleted
    Path("run/results.json").unlink()
    assert main(command) == 0
    assert [path.name for path in Path("run").glob("checkpoint-*")] == ["checkpoint-4"]
