"""Files of weights and their configs: saved mixtures, checkpoints of the paper's code, adapters."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

import mpoe
from fuzzing.cases import Case, Property, fresh, mutated_bytes, mutated_json, mutated_json_file, refusal_of, run_command
from mpoe.models.adapter import load_adapter, save_adapter
from reference_checkpoint import base as reference_base
from reference_checkpoint import write as write_reference
from tiny import tiny_t5, tiny_tokenizer

HUGE = (2**31, 2**40, 2**63, 10**30)


def _mutated_safetensors(case: Case, data: bytes) -> bytes:
    """The file with another header, or other bytes; the case says what. A header that is whole fits the data's size."""
    draw = case.random
    (length,) = struct.unpack("<Q", data[:8])
    chance = draw.random()
    if chance < 0.15:
        claimed = draw.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1))
        case.tried += f" header length := {claimed}"
        return struct.pack("<Q", claimed) + data[8:]
    if chance < 0.3:
        return mutated_bytes(case, data)
    if chance < 0.5:
        return data[:8] + mutated_bytes(case, data[8 : 8 + length]) + data[8 + length :]
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    if chance < 0.6:
        header[name]["shape"] = draw.choice((header[name]["shape"][::-1], [], [0], [draw.choice(HUGE)] * 2, [-1]))
        case.tried += f" {name} has shape {header[name]['shape']}"
    elif chance < 0.7:
        header[name]["dtype"] = draw.choice(("F64", "F16", "BF16", "I32", "I8", "BOOL", "F8_E4M3", "C64", "X"))
        case.tried += f" {name} has dtype {header[name]['dtype']}"
    elif chance < 0.8:
        header[f"{name}x"] = header.pop(name)
        case.tried += f" {name} has another name"
    else:
        header = mutated_json(case, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _check_same(model: PreTrainedModel, expected: dict[str, torch.Tensor], raw: bytes, original: bytes) -> None:
    """What loads is what was saved, but for the tensors whose own bytes differ."""
    state = model.state_dict()
    assert state.keys() == expected.keys()
    (length,) = struct.unpack("<Q", raw[:8])
    (before,) = struct.unpack("<Q", original[:8])
    if b'"lm_head.weight"' in original and b'"lm_head.weight"' not in raw:
        return  # Transformers then gives T5 the embedding's, as to a model that has one table for both
    if raw[8 + length :] == original[8 + before :]:  # only then does no tensor have other bytes
        different = [n for n, v in state.items() if not torch.equal(v.nan_to_num(), expected[n].nan_to_num())]
        assert not different, f"it loads with other values of {different[:3]}"


def _mixture() -> PreTrainedModel:
    torch.manual_seed(0)
    model = tiny_t5(num_layers=1, d_model=8, d_ff=16, d_kv=2, num_heads=2)
    return mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=2))


def _classifier(folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, vocab_size=64, max_position_embeddings=64, pad_token_id=0, num_labels=2)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def _mutate_folder(case: Case, source: Path, target: Path, files: tuple[str, ...]) -> str:
    """A copy of a folder with one file mutated or missing; its name."""
    fresh(source, target)
    name = case.random.choice(files)
    case.tried = f"{name}:"
    file = target / name
    if case.random.random() < 0.02:
        file.unlink()
        case.tried += " missing"
        return name
    mutate = _mutated_safetensors if file.suffix == ".safetensors" else mutated_json_file
    file.write_bytes(mutate(case, file.read_bytes()))
    return name


def _saved(folder: Path) -> Callable[[Case], None]:
    _mixture().save_pretrained("good")
    expected = _state(mpoe.from_pretrained("good"))
    weights = "model.safetensors"

    def attempt(case: Case) -> None:
        name = _mutate_folder(
            case, Path("good"), Path("bad"), (weights, weights, "config.json", "generation_config.json")
        )
        loaded: list[PreTrainedModel] = []
        refusal = refusal_of(lambda: loaded.append(mpoe.from_pretrained("bad")), "bad")
        if refusal is None and name == weights:
            _check_same(loaded[0], expected, Path("bad", weights).read_bytes(), Path("good", weights).read_bytes())

    return attempt


def _predicted(folder: Path) -> Callable[[Case], None]:
    mixture = mpoe.upcycle(_classifier(folder / "good"), mpoe.MPOEConfig(num_experts=2))
    mixture.save_pretrained("good")
    command = ["predict", "bad", "the film is great"]
    shutil.copytree("good", "bad")
    _, answer = run_command(command, folder)

    def attempt(case: Case) -> None:
        files = ("model.safetensors", "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
        name = _mutate_folder(case, Path("good"), Path("bad"), files)
        status, said = run_command(command, folder, "bad", "multi_label")
        raw, original = (Path(f, name).read_bytes() if Path(f, name).exists() else b"" for f in ("bad", "good"))
        if status == 0 and name == "model.safetensors":
            _check_same(mpoe.from_pretrained("bad"), _state(mpoe.from_pretrained("good")), raw, original)
        assert status or said.count("\n") == 1 or name != "model.safetensors", (said, answer)

    return attempt


def _imported(folder: Path) -> Callable[[Case], None]:
    torch.manual_seed(0)
    dense = reference_base(num_layers=1)
    for kind in ("switch", "moe"):
        good = folder / kind
        tensors = {name: t.contiguous() for name, t in write_reference(dense, kind, experts=2, sites=3).items()}
        dense.config.save_pretrained(good)
        torch.save(tensors, good / "model.bin")
        save_file({name: t.clone() for name, t in tensors.items()}, good / "model.safetensors")

    def attempt(case: Case) -> None:
        draw = case.random
        file, kind = draw.choice(("model.bin", "model.safetensors")), draw.choice(("switch", "moe"))
        fresh(folder / kind, folder / "bad")
        bad = folder / "bad" / file
        case.tried = f"{kind} {file}:"
        chance = draw.random()
        if chance < 0.3:
            config = folder / "bad" / "config.json"
            case.tried = f"{kind} config.json:"
            config.write_bytes(mutated_json_file(case, config.read_bytes()))
        elif file == "model.safetensors":
            bad.write_bytes(_mutated_safetensors(case, bad.read_bytes()))
        elif chance < 0.6:
            bad.write_bytes(mutated_bytes(case, bad.read_bytes()))
        else:
            torch.save(_mutated_tensors(case, torch.load(bad)), bad)
        shutil.rmtree("out", ignore_errors=True)
        names = ("bad", *(("." if chance >= 0.3 else "config"),))
        command = ["import-reference", str(bad), "--output_dir", "out"]
        status, _ = run_command(command, folder, *names)
        assert status or Path("out", "config.json").is_file()

    return attempt


def _mutated_tensors(case: Case, tensors: dict[Any, Any]) -> Any:
    """What torch.save is given instead."""
    draw = case.random
    name = draw.choice(sorted(tensors))
    old = tensors[name]
    new: Any = draw.choice((
        old.flatten(), old[None], old.T if old.ndim == 2 else old.transpose(0, -1), old[:1], old[:0], old.half(),
        old.double(), old.long(), old + float("nan"), old * 1e38, torch.zeros_like(old), old.new_zeros(()), None,
        3, "x", old.to_sparse(), old.to(torch.complex64), old.to("meta"), [old], {"a": old}, old.bool(),
    ))  # fmt: skip
    way = draw.choice(("value", "value", "value", "name", "delete", "more", "key", "wrap", "list"))
    case.tried += f" {way} {name}"
    if way == "wrap":
        return {
            draw.choice(("state_dict", "model")): draw.choice((tensors, list(tensors), {}, None, {"model": tensors}))
        }
    if way == "list":
        return draw.choice((list(tensors.values()), old, None, 5, {}, [], "x"))
    if way == "value":
        case.tried += f" := {type(new).__name__} {getattr(new, 'dtype', '')} {getattr(new, 'shape', '')}"
        tensors[name] = new
    elif way == "name":
        at = draw.randrange(len(name))
        tensors[name[:at] + draw.choice("0.9_x") + name[at + 1 :]] = tensors.pop(name)
    elif way == "delete":
        del tensors[name]
    elif way == "more":
        tensors[name + draw.choice(("x", ".0", ".weight", "_mpo.0"))] = old
    else:
        tensors[draw.choice((5, None, ("a", "b"), "", b"x"))] = tensors.pop(name)
    return tensors


def _adapters(folder: Path) -> Callable[[Case], None]:
    _classifier(folder / "base")
    load = BertForSequenceClassification.from_pretrained
    model = mpoe.upcycle(load("base"), mpoe.MPOEConfig(num_experts=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("offsets" in name or "router" in name)
    save_adapter(model, "good")
    expected = _state(model)
    files = ("adapter_config.json", "adapter_config.json", "adapter_model.safetensors")

    def attempt(case: Case) -> None:
        name = _mutate_folder(case, Path("good"), Path("bad"), files)
        if case.random.random() < 0.4:
            run_command(["predict", "bad", "the film is great"], folder, "bad", "base", "../..")
            return
        dense, loaded = load("base"), []
        refusal = refusal_of(lambda: loaded.append(load_adapter(dense, "bad")), "bad")
        if refusal is None:
            assert name == "adapter_config.json" or Path("bad", name).read_bytes() == Path("good", name).read_bytes()
            assert all(torch.equal(value, expected[n]) for n, value in loaded[0].state_dict().items())

    return attempt


PROPERTIES = (
    Property("saved mixtures", _saved, 1.2),
    Property("mpoe predict", _predicted, 1.2),
    Property("mpoe import-reference", _imported, 1.2),
    Property("adapters", _adapters, 1.2),
)
