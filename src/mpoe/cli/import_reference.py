"""`mpoe import-reference`: a checkpoint of the method's reference implementation becomes a mixture's folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from transformers import PreTrainedModel

from mpoe.cli.flags import read_flags
from mpoe.files import check_new_folder, new_folder
from mpoe.models import count_parameters, load_tokenizer, mixtures, mpo_experts, mpoe_config, read_config
from mpoe.models.checkpoint import has_tokenizer
from mpoe.models.families import T5_SIZES
from mpoe.models.reference import ORIENTATIONS, import_reference, read_checkpoint
from mpoe.report import PlainConsole


def run(argv: Sequence[str]) -> None:
    """Write the folder and print what is in it.

    Args:
        argv: What follows `mpoe import-reference`.

    Raises:
        ValueError: Wrong input; nothing has been written then.
    """
    parser = argparse.ArgumentParser(
        prog="mpoe import-reference", description="Turn a checkpoint of the reference implementation into a mixture."
    )
    parser.add_argument("checkpoint", type=Path, help=".safetensors, or a .bin or .pt file of torch.save")
    parser.add_argument(
        "--config",
        help=f"the dense base model: {', '.join(T5_SIZES)}, a folder with a config.json, or a name on the hub; "
        "default: the config.json beside the checkpoint",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--is_scale_prob", action="store_true", help="the checkpoint was trained with this flag")
    parser.add_argument(
        "--orientation",
        choices=ORIENTATIONS,
        help="which dimensions come first in the sites of square matrices; default: as in the other matrices",
    )
    args = read_flags(parser, argv)
    if not args.checkpoint.is_file():
        raise ValueError(f"the checkpoint must be a file; {args.checkpoint} is none")
    base = str(args.checkpoint.parent) if args.config is None else args.config
    if args.config is None and not (args.checkpoint.parent / "config.json").is_file():
        raise ValueError(f"no config.json is beside {args.checkpoint}: name the dense base model with --config")
    check_new_folder(args.output_dir)
    config = read_config(base)
    console = PlainConsole()
    console.print(f"Reading {args.checkpoint} ...")  # gigabytes take a while
    tensors = read_checkpoint(args.checkpoint)
    console.print(f"Importing {len(tensors):,} tensors ...")
    model = import_reference(tensors, config, args.orientation, args.is_scale_prob)
    tokenizer = base if has_tokenizer(base) else None
    with new_folder(args.output_dir) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            load_tokenizer(tokenizer).save_pretrained(folder)

    console.print(_table(model, sum(tensor.numel() for tensor in tensors.values())))
    shapes = {(e.dims.out_features, e.dims.in_features) for e in mpo_experts(model).values()}
    square = sorted((rows, columns) for rows, columns in shapes if rows == columns)
    if square:
        how = f"as {args.orientation}" if args.orientation else "like the other matrices"
        sizes = ", ".join(f"{rows}×{columns}" for rows, columns in square)
        console.print(f"Square matrices ({sizes}) were read {how}; --orientation says otherwise.")
    out = args.output_dir
    if tokenizer is not None:
        console.print(f"Go on with mpoe predict {out} 'a text', or in Python with mpoe.from_pretrained('{out}').")
    else:
        console.print(
            f"Go on in Python with mpoe.from_pretrained('{out}'). No tokenizer was at hand: save the base model's into "
            "that folder for mpoe predict."
        )


def _table(model: PreTrainedModel, stored: int) -> Table:
    config, count = mpoe_config(model), count_parameters(model)
    assert config is not None  # nosec B101  # for the type checker: it was just imported as one
    table = Table(title="Imported", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("mixtures", str(len(mixtures(model))))
    table.add_row("experts in each", str(config.num_experts))
    table.add_row("router", config.moe_type)
    table.add_row("matrix product operators", ", ".join(config.mpo_layers))
    table.add_section()
    table.add_row("numbers in the checkpoint, millions", f"{stored / 1e6:,.3f}")
    table.add_row("parameters here, millions", f"{count.total / 1e6:,.3f}", style="bold")
    table.add_row("of these central tensors, stored once", f"{count.central / 1e6:,.3f}")
    table.add_row("auxiliary tensors of all experts", f"{count.auxiliary / 1e6:,.3f}")
    return table
