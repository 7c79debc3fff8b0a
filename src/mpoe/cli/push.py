"""`mpoe push`: a finished model to a hub, with a model card; only the model's own files, in one commit."""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id
from transformers import PreTrainedModel

import mpoe
from mpoe.cli.export import EXPORT_FILE
from mpoe.cli.flags import read_flags
from mpoe.cli.loading import base_of, load_finished
from mpoe.files import load_json, read_json, write_bytes
from mpoe.models import class_of, count_parameters, load_whole, mpoe_config, read_config
from mpoe.models.adapter_files import CONFIG_FILE, adapted_model, is_adapter
from mpoe.models.checkpoint import TOKENIZER_FILES
from mpoe.printable import printable
from mpoe.report.model_card import CardFacts, model_card
from mpoe.training.finetune import FinetuneResult
from mpoe.training.run_folder import RESULTS_FILE, RUN_FILE

CARD_FILE = "README.md"
MODEL_FILES = (
    "config.json", "generation_config.json", CONFIG_FILE, "*.safetensors", "*.safetensors.index.json",
    *TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    EXPORT_FILE, CARD_FILE, "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What goes up of a model's folder, by name; never its checkpoints, the states of an optimizer, logs."""

_CONNECT_SECONDS = 15
# Where a tokenizer was loaded from; Transformers writes it down, and nobody reads it.
_PLACES = ("name_or_path", "tokenizer_file", "special_tokens_map_file")


def run(argv: Sequence[str]) -> None:
    """Upload a model, or write its card and list its files.

    Args:
        argv: What follows `mpoe push`.

    Raises:
        ValueError: Wrong input, a hub that cannot be reached or refuses.
    """
    args = read_flags(_parser(), argv)
    folder = Path(args.model)
    _check(folder, args)
    files = _files(folder, args.include)
    has_card = CARD_FILE in files and not args.new_card
    api = HfApi()
    if args.card_only is None:
        _check_hub(api, args.name)
    print(printable(f"Loading {folder}, as those will who download it ..."))
    facts = _facts(folder, args)
    card = model_card(facts).encode()
    contents = {name: _public(file, facts) for name, file in files.items()}
    if args.card_only is not None:
        write_bytes(Path(args.card_only), card)
        _list(contents, files, f"model card written to {args.card_only}; these files would go to {args.name}:")
        return
    if not has_card:
        contents[CARD_FILE] = card
    _upload(api, args, contents, is_generated=not has_card)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpoe push",
        description="Upload a model to the hub with a generated model card. The token is the usual one: of hf auth "
        "login, or HF_TOKEN. A README.md in the folder goes up instead of the generated card.",
    )
    add = parser.add_argument
    add("model", help="folder of a finished run, a saved mixture, an exported model or an adapter")
    add("name", help="of the repository, OWNER/NAME; it is made if it is not there")
    add("--private", action="store_true", help="if the repository is made, only its owners see it")
    add("--revision", help="branch to commit to, made if it is not there (default: main)")
    add("--commit_message", default="Upload model with mpoe", help="default: %(default)s")
    add("--license", help="for the card: an identifier of the hub's list, apache-2.0 (default: not stated)")
    add("--base_model", help="for the card: name of the base on the hub (default: the run's, if it is a hub's name)")
    add("--include", nargs="+", default=[], metavar="GLOB", help="more files of the folder: results.json 'adapter/*'")
    add("--new_card", action="store_true", help="replace a README.md of the folder and of the hub by a generated card")
    add("--card_only", metavar="FILE", help="write the card to FILE, list what would go up, and stop: asks no network")
    return parser


def _check(folder: Path, args: argparse.Namespace) -> None:
    """Refuse what is wrong by itself, before anything is loaded or asked."""
    if not folder.is_dir():
        raise ValueError(f"a model must be a folder; there is no folder {folder}")
    for what, name in (("the name", args.name), ("--base_model", args.base_model)):
        if name is not None and not _is_hub_name(name):
            raise ValueError(f"{what} must be as on the hub, owner/name; got {name}")
    if "/" not in args.name:
        raise ValueError(
            f"the name must be owner/name; got {args.name}: write your own or your organisation's in front"
        )
    if args.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", args.license):
        raise ValueError(f"--license must be an identifier like apache-2.0, mit or other; got {args.license}")
    if args.card_only is not None:
        card = Path(args.card_only)
        if card.exists() or not card.parent.is_dir():
            raise ValueError(f"--card_only must be a new file in a folder that is there; got {card}")


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _files(folder: Path, include: Sequence[str]) -> dict[str, Path]:
    """What goes up, by its name there.

    Raises:
        ValueError: No weights, or a pattern that leads nowhere or out of the folder.
    """
    found = {
        file.name: file
        for file in sorted(folder.iterdir())
        if file.is_file() and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in MODEL_FILES)
    }
    if not any(name.endswith(".safetensors") for name in found):
        raise ValueError(f"{folder} must hold a model's weights, *.safetensors; it has none: name a finished model")
    for pattern in include:
        parts = Path(pattern).parts
        matched = [] if not parts or Path(pattern).is_absolute() or ".." in parts else sorted(folder.glob(pattern))
        matched = [file for file in matched if file.is_file()]
        if not matched:
            raise ValueError(f"--include must name files below {folder}; {pattern!r} matches none")
        found |= {file.relative_to(folder).as_posix(): file for file in matched}
    return found


def _check_hub(api: HfApi, name: str) -> None:
    """One error in seconds, where the client would wait for minutes or say it with a page of HTML."""
    if huggingface_hub.constants.is_offline_mode():
        raise ValueError("HF_HUB_OFFLINE must not be set to push; it is: unset it, or see --card_only")
    if huggingface_hub.get_token() is None:
        raise ValueError(
            f"to push to {name} you must be logged in; there is no token: hf auth login, or set HF_TOKEN to one that "
            "may write"
        )
    try:
        get_session().head(api.endpoint, timeout=_CONNECT_SECONDS)
    except Exception as error:  # the errors of whichever HTTP library the client uses
        raise ValueError(
            f"the hub must be reachable; {api.endpoint} is not ({type(error).__name__}: {error}). Look at the network, "
            "HF_ENDPOINT and proxies, or see --card_only"
        ) from error


def _facts(folder: Path, args: argparse.Namespace) -> CardFacts:
    model = _load(folder)
    finished = (folder / RESULTS_FILE).is_file() and (folder / RUN_FILE).is_file()
    flags = read_json(folder / RUN_FILE) if finished else None
    base = args.base_model
    if base is None:
        named = adapted_model(folder).base_name if is_adapter(folder) else (flags or {}).get("model_name_or_path")
        base = named if isinstance(named, str) and _is_hub_name(named) and not Path(named).exists() else None
    if is_adapter(folder) and base is None:
        raise ValueError(
            f"an adapter must name its base as others can load it, and the base of {folder} is a local folder: push "
            "that first, and name it with --base_model"
        )
    return CardFacts(
        repository=args.name,
        model_class=type(model).__name__,
        parameters=count_parameters(model),
        mixture=mpoe_config(model),
        is_adapter=is_adapter(folder),
        base_model=base,
        license=args.license,
        flags=flags,
        results=FinetuneResult.read(folder / RESULTS_FILE) if finished else None,
        export=read_json(folder / EXPORT_FILE) if (folder / EXPORT_FILE).is_file() else None,
        versions={
            "mpoe": mpoe.__version__, "torch": str(torch.__version__), "transformers": transformers.__version__,
        },
    )  # fmt: skip


def _load(folder: Path) -> PreTrainedModel:
    """The model, so that what goes up is known to be whole."""
    if is_adapter(folder):
        return load_finished(str(folder))[0]
    config = read_config(base_of(str(folder)))
    model_class = class_of(config)
    if model_class is None:
        raise ValueError(f"the config.json in {folder} must name a model of Transformers; got {config.architectures}")
    return load_whole(model_class, folder)


def _public(file: Path, facts: CardFacts) -> Path | bytes:
    """A file, or what goes up in its place: without the places on this machine that libraries write down.

    Raises:
        ValueError: It names the user's home in a place that is not known here.
    """
    if file.suffix != ".json" or file.name.startswith("tokenizer.json"):
        return file
    content, changed = file.read_bytes(), {}
    try:
        values = load_json(content)
    except ValueError as error:
        raise ValueError(f"{file} must be JSON; {error}: copy the model again") from error
    if isinstance(values, dict):
        if file.name == CONFIG_FILE:
            changed = {"base_model_name_or_path": facts.base_model}
        elif file.name == "tokenizer_config.json":
            changed = {name: None for name in _PLACES if name in values}
        changed = {name: value for name, value in changed.items() if values.get(name) != value}
        values = {name: v for name, v in (values | changed).items() if not (name in changed and v is None)}
    if changed:
        content = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    home = str(Path.home())
    if len(home) > 1 and re.search(re.escape(json.dumps(home)[1:-1]) + r"(?![\w.-])", content.decode()):
        raise ValueError(f"{file} must not name your home folder to be pushed, and it does: take {home} out of it")
    return content if changed else file


def _upload(api: HfApi, args: argparse.Namespace, contents: dict[str, Path | bytes], is_generated: bool) -> None:
    try:
        url = api.create_repo(args.name, private=args.private or None, exist_ok=True)
        if args.revision not in (None, "main"):
            api.create_branch(args.name, branch=args.revision, exist_ok=True)
        if is_generated and not args.new_card and api.file_exists(args.name, CARD_FILE, revision=args.revision):
            print(f"The repository has a {CARD_FILE}, which stays; --new_card replaces it.")
            del contents[CARD_FILE]
        print(printable(f"Uploading {len(contents)} files to {url} ..."))
        commit = api.create_commit(
            args.name,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()],
            commit_message=args.commit_message,
            revision=args.revision,
        )
    except HfHubHTTPError as error:
        advice = "look at its message"
        if error.response.status_code in (401, 403):
            advice = "the token must be valid and allowed to write there: hf auth whoami, hf auth login"
        raise ValueError(f"the hub refused to take {args.name}; {_brief(error)}: {advice}") from error
    except Exception as error:  # the errors of whichever HTTP library the client uses
        raise ValueError(
            f"{args.name} must be uploaded as a whole; that broke off ({_brief(error)}), and "
            "nothing was committed: repeat the command, which uploads only what is not there"
        ) from error
    print(printable(f"{commit.commit_url or url}"))


def _brief(error: BaseException) -> str:
    """What it says, and what that comes from."""
    cause = error.__cause__
    told = "" if cause is None or isinstance(error, HfHubHTTPError) else f" ({_brief(cause)})"
    return f"{' '.join(str(error).split())[:300] or type(error).__name__}{told}"


def _list(contents: Mapping[str, Any], files: Mapping[str, Path], title: str) -> None:
    print(printable(title))
    for name, content in contents.items():
        size = len(content) if isinstance(content, bytes) else files[name].stat().st_size
        print(printable(f"  {name:<40} {size / 1e6:>10,.3f} MB"))
    if CARD_FILE not in contents:
        print(printable(f"  {CARD_FILE:<40}  (the card)"))
