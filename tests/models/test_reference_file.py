"""Files of reference checkpoints: their forms, damaged ones, and pickles that ask for code."""

import math

import pytest
import safetensors.torch
import torch

from hostile import Plant
from mpoe.models import mixtures
from mpoe.models.reference import import_reference, read_checkpoint
from reference_checkpoint import base, write
from tiny import logits_of, tiny_batch


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_files(tmp_path, name):
    dense, path = base(), tmp_path / name
    tensors = write(dense)
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    found = read_checkpoint(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert len(mixtures(import_reference(path, dense.config))) == 4


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
def test_other_forms_of_the_same_checkpoint(tmp_path, wrapper):
    """Prefixes of DDP, tied tensors under every name, dense matrices that were left beside their products."""
    dense, path = base(), tmp_path / "model.bin"
    tensors = write(dense, parts=("attention",))
    forms = {key.replace(".sffn.", ".DenseReluDense.sffn."): t for key, t in tensors.items()}
    forms |= {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder", "decoder")}
    forms["lm_head.weight"] = tensors["shared.weight"].clone()
    forms["encoder.block.0.layer.1.sffn.experts.0.wi.weight"] = torch.randn(64, 32)
    forms["encoder.block.0.layer.0.SelfAttention.q.weight"] = torch.randn(32, 32)
    forms = {f"module.{key}": t for key, t in forms.items()}
    torch.save({wrapper: forms, "epoch": 3} if wrapper else forms, path)
    batch = tiny_batch()
    assert torch.equal(
        logits_of(import_reference(path, dense.config), batch),
        logits_of(import_reference(tensors, dense.config), batch),
    )
    forms["module.decoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
    torch.save(forms, path)
    with pytest.raises(ValueError, match=r"decoder\.embed_tokens\.weight must equal shared\.weight"):
        read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path, zipped):
    path, marker = tmp_path / "model.bin", tmp_path / "executed"
    torch.save({"a": torch.zeros(1), "b": Plant(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="pickle that needs code to be executed, which is never done"):
        read_checkpoint(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # or the test would prove nothing


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_damaged_files_are_one_line(tmp_path, name, kept):
    path, tensors = tmp_path / name, write(base())
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"must be a complete \.safetensors file, or a file of torch\.save") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match=r"No such file"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.11
def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    for value in ([1, 2], {"a": 1}, {}, {5: torch.ones(2)}):
        torch.save(value, path)
        with pytest.raises(ValueError, match="must hold a state_dict"):
            read_checkpoint(path)
    torch.save({"a": torch.tensor([1.0, math.nan])}, path)
    with pytest.raises(ValueError, match="finite floating-point numbers; a is not"):
        read_checkpoint(path)
    torch.save({"a": torch.eye(3).to_sparse()}, path)
    with pytest.raises(ValueError, match="finite floating-point numbers; a is not"):
        read_checkpoint(path)
