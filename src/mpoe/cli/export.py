"""`mpoe export`: a mixture as a checkpoint that loads without mpoe, and how far its logits are from the mixture's."""

from __future__ import annotations

import argparse
import dataclasses
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpoe import __version__
from mpoe.cli.flags import read_flags
from mpoe.cli.loading import base_of, check_tokens, kind_of, load_finished
from mpoe.cli.score import read_lines
from mpoe.files import check_new_folder, new_folder, write_json
from mpoe.models import class_of, load_tokenizer, load_whole, merge, mixtures, mpoe_config, read_config
from mpoe.models.difference import IGNORED, LogitDifference, logit_difference
from mpoe.models.routed_export import differences, to_sparse
from mpoe.models.router_inputs import RouterInputs, measured_inputs
from mpoe.report import PlainConsole
from mpoe.report.plain import TITLE, plain

EXPORT_FILE = "export.json"
"""What an exported folder says of itself."""

SENTENCES = (
    "The committee will meet again on Thursday to decide whether the bridge can be repaired before winter.",
    "She had read the letter twice, and still did not know what her brother wanted her to do.",
    "In 1869 Mendeleev arranged the known elements by their weights and left gaps for those not yet found.",
    "This film is a warm and clever comedy that never talks down to its audience.",
    "I would not recommend this phone: its battery lasts half a day and the screen cracked in a week.",
    "To make the dough, mix flour, water, salt and yeast, and let it rise for two hours in a warm place.",
    "What is the capital of Australia, and how many people live there?",
    "The boys was running to the shop when it start to rain.",
)
"""The text that logits are compared over where the user gives none: news, stories, facts, reviews, a bad sentence."""

_LONGEST_TEXT, _BATCH_TOKENS = 512, 512


def run(argv: Sequence[str]) -> LogitDifference:
    """Write the exported model, print how far its logits are from the mixture's, and return that.

    Args:
        argv: What follows `mpoe export`.

    Raises:
        ValueError: Wrong input.
    """
    args = read_flags(_parser(), argv)
    output = Path(args.output)
    check_new_folder(output)
    if args.approximate and not args.routed:
        raise ValueError("--approximate is about --routed; leave it out")
    if args.max_tokens < 1:
        raise ValueError(f"--max_tokens must be >= 1; got {args.max_tokens}")
    kind = kind_of(args.model)
    texts = list(SENTENCES) if args.text_file is None else _texts(Path(args.text_file))
    text = f"{len(texts)} built-in sentences" if args.text_file is None else Path(args.text_file).name
    console = PlainConsole()
    console.print(f"Loading {args.model} ...")
    model, tokenizer = load_finished(args.model)
    _check(model, args)
    rows = _rows(model, tokenizer, texts, args.max_tokens)
    with new_folder(output) as folder:
        console.print(f"Writing {_how(args, model)} ...")
        _exported(model, tokenizer, rows, kind, args).save_pretrained(folder)
        load_tokenizer(base_of(args.model)).save_pretrained(folder)
        console.print("Loading it again as Transformers does ...")
        reloaded = load_whole(class_of(read_config(str(folder))), folder).to(model.device).eval()
        found = logit_difference(model, reloaded, _shown(_batches(rows, tokenizer, kind), "Comparing logits"))
        write_json(folder / EXPORT_FILE, _record(args, model, reloaded, found, text))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    place = "text" if kind == "classification" else "token"
    console.print(_table(found, f"Logits, {args.model} and {output}: {found.places:,} {place}s of {text}", place))
    count = sum(parameter.numel() for parameter in reloaded.parameters())
    console.print(
        f"{output}: a {type(reloaded).__name__} of {count / 1e6:,.1f} M parameters, {size / 1e6:,.1f} MB; it loads "
        "without mpoe"
    )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpoe export",
        description="Write a mixture as an ordinary checkpoint of Transformers, which loads without mpoe: dense, of "
        "one expert or of the mean of all, or with its routers as a Switch, Mixtral or Qwen3-MoE. How far its logits "
        "are from the mixture's is measured with what was written.",
    )
    add = parser.add_argument
    add("model", help="folder of a mixture or a finished run; an adapter's folder; a name on a hub")
    add("-o", "--output", required=True, metavar="OUT", help="folder to write, new or empty")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--average",
        action="store_true",
        help="dense, the mean of all experts (default); layout extended: with the gates' mean over --text_file",
    )
    how.add_argument(
        "--expert", type=int, metavar="N", help="dense, every layer as its expert N has it, from 0; layout balanced"
    )
    how.add_argument("--routed", action="store_true", help="sparse, experts and routers in Transformers' own format")
    add(
        "--approximate",
        action="store_true",
        help="with --routed: also where the format cannot do what the mixture does",
    )
    add("--text_file", metavar="FILE", help="compare logits over these texts, one a line (default: built-in sentences)")
    add("--max_tokens", type=int, default=8192, help="compare over the first so many at most (default: 8192)")
    return parser


def _how(args: argparse.Namespace, model: PreTrainedModel) -> str:
    if args.routed:
        return "experts and routers"
    if args.expert is not None:
        return f"expert {args.expert} of every layer"
    config = mpoe_config(model)
    return "mean gates" if config is not None and config.is_extended else "the mean of all experts"


def _check(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """Refuse what cannot be exported before anything is computed."""
    config = mpoe_config(model)
    if config is None:
        raise ValueError(f"{args.model} is a dense model: it loads without mpoe as it is")
    if args.routed and (reasons := differences(model)) and not args.approximate:
        raise ValueError(
            f"--routed must compute what the mixture computes, and here cannot: {'; '.join(reasons)}. --approximate "
            "exports what comes closest and says how far that is; --average and --expert N make it dense"
        )


def _texts(file: Path) -> list[str]:
    texts = [line for line in read_lines(file) if line.strip()]
    if not texts:
        raise ValueError(f"{file} must hold a text a line; it holds none")
    return texts


def _rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int
) -> list[list[int]]:
    """The texts' tokens, each text cut to what a model takes, and the last one to `max_tokens` of all."""
    positions = getattr(model.config, "max_position_embeddings", None) or _LONGEST_TEXT
    longest = min(_LONGEST_TEXT, positions, tokenizer.model_max_length)
    rows, left = [], max_tokens
    for text in texts:
        row = cast(Any, tokenizer)(text, truncation=True, max_length=min(longest, left))["input_ids"]
        if row:
            rows.append(row)
        left -= len(row)
        if left < 1:
            break
    if not rows:
        raise ValueError("the text that logits are compared over must have a token; it has none: give another file")
    check_tokens(model, max(map(max, rows)))
    return rows


def _batches(
    rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, kind: str
) -> Iterator[dict[str, Tensor]]:
    """Rows of similar length, padded at their ends; an encoder-decoder also writes the text that it has read."""
    waiting: list[Sequence[int]] = []
    for row in sorted(rows, key=len):
        if waiting and (len(waiting) + 1) * len(row) > _BATCH_TOKENS:
            yield _batch(waiting, tokenizer, kind)
            waiting = []
        waiting.append(row)
    yield _batch(waiting, tokenizer, kind)


def _batch(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, kind: str) -> dict[str, Tensor]:
    padded = cast(Any, tokenizer).pad({"input_ids": list(rows)}, padding_side="right", return_tensors="pt")
    batch = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}
    if kind == "seq2seq":
        batch["labels"] = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), IGNORED)
    return batch


def _exported(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], kind: str,
    args: argparse.Namespace,
) -> PreTrainedModel:  # fmt: skip
    config = mpoe_config(model)
    if not args.routed:
        measured = config is not None and config.is_extended and config.is_mixture
        batches = _shown(_batches(rows, tokenizer, kind), "Measuring mean gates") if measured else None
        return merge(model, args.expert, batches)
    batches = _shown(_batches(rows, tokenizer, kind), "Measuring routers' inputs")
    return to_sparse(model, _router_inputs(model, batches), args.approximate)


def _shown(batches: Iterator[dict[str, Tensor]], title: str) -> Iterable[dict[str, Tensor]]:
    return tqdm(list(batches), desc=title, unit=" batches", delay=2)


@torch.inference_mode()
def _router_inputs(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> Mapping[str, RouterInputs]:
    with measured_inputs(model) as inputs:
        for batch in batches:
            cast(Any, model)(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    return inputs


def _record(
    args: argparse.Namespace, model: PreTrainedModel, exported: PreTrainedModel, found: LogitDifference, text: str
) -> dict[str, Any]:
    experts = next((layer.up.num_experts for layer in mixtures(model).values()), 1)
    return {
        "how": _how(args, model),
        "from": f"{type(model).__name__} of {experts} experts",
        "to": type(exported).__name__,
        "logits": {"text": text, **dataclasses.asdict(found)},
        "versions": {
            "mpoe": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }


def _table(found: LogitDifference, title: str, place: str) -> Table:
    table = Table(title=plain(title, TITLE), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("largest absolute difference", f"{found.largest:.3g}")
    table.add_row("mean absolute difference", f"{found.mean:.3g}")
    table.add_row(f"KL divergence, nats a {place}", f"{found.kl:.3g}")
    table.add_row("same most probable choice", f"{found.same_choice:.2%}")
    if found.losses is not None:
        table.add_row("loss, nats a token, before and after", "{:.4f}, {:.4f}".format(*found.losses))
    return table
