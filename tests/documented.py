"""The code blocks of README.md and docs/, and the commands in them; one that is not run says why in a comment before.

A block runs in a folder that `prepare` makes: tiny models and data under the names that the pages use. So a name on a
hub is a folder there, and `mpoe fetch` finds everything in its cache.

Comments before a block:
    <!-- not run: WHY -->      it is not run; the flags in it are checked all the same
    <!-- first: CODE -->       run before it, in its language: what the reader has already
"""

import itertools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import mpoe
import reference_checkpoint
from mpoe.cli.commands import COMMANDS
from mpoe.cli.finetune import run as finetune
from tiny import V1_0, tiny_t5, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

_BLOCK = re.compile(
    r"(?P<comments>(?:^ *<!--[^\n]*-->\n+)*)^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)
_COMMENT = re.compile(r"<!-- (not run|first): (.*?) -->")
_FETCH = re.compile(r"\"?\$\(mpoe fetch (\w+)\)\"?")
_ASSIGNMENT = re.compile(r'^(\w+)="([^"]*)"$', re.M)
_FILE = re.compile(r"# ([\w./-]+\.\w+)")
_SHELL_COMMENT = re.compile(r"(^| )# [^\n]*$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: The file.
        line: Where the block begins.
        language: What stands behind the fence.
        code: What is in it.
        not_run: Why it is not run; None if it is.
        first: What is run before it.
    """

    page: Path
    line: int
    language: str
    code: str
    not_run: str | None = None
    first: str = ""

    @property
    def name(self) -> str:
        """Page and line, for a person."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page that name a language."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        said = dict(_COMMENT.findall(match["comments"]))
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(Block(page, line, match["language"], code, said.get("not run"), said.get("first", "")))
    return found


def commands(shell: str) -> Iterator[list[str]]:
    """The words behind each `mpoe` of a shell block; those that another program starts, too."""
    for name, value in _ASSIGNMENT.findall(shell):
        shell = re.sub(rf"\"?\${name}\b\"?", " ".join(value.split()), shell)
    for name in _FETCH.findall(shell):
        yield ["fetch", name]
    shell = _ASSIGNMENT.sub("", _FETCH.sub("FETCHED", shell)).replace("\\\n", " ").replace("$'", "'")
    lexer = shlex.shlex(_SHELL_COMMENT.sub("", shell), posix=True, punctuation_chars="&|;<>()\n")
    lexer.whitespace_split, lexer.whitespace, lexer.commenters = True, " \t", ""
    words = list(lexer)
    ends = [place for place, word in enumerate(words) if set(word) <= set("&|;<>()\n")]
    for start, end in itertools.pairwise([-1, *ends, len(words)]):
        command = words[start + 1 : end]
        for place, word in enumerate(command):
            if (word == "mpoe" and place == 0) or word == "mpoe.cli.main":
                yield command[place + 1 :]
            if re.fullmatch(r"(.*/)?scripts/finetune\w*\.sh", word):  # mpoe finetune with a config file in front
                yield ["finetune", *command[place + 1 :]]


def inline(page: Path) -> Iterator[str]:
    """Everything between single backticks in the prose of a page."""
    prose = _BLOCK.sub("", page.read_text())
    prose = re.sub(r"^ *```.*?^ *```$", "", prose, flags=re.M | re.S)
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)


def is_command(words: list[str]) -> bool:
    """Whether words behind `mpoe` are a command with arguments, and not the page's way to speak of it."""
    return bool(words) and words[0] in COMMANDS


def prepare(folder: Path) -> None:
    """Everything that the pages name: models, data, texts, and the repository's own scripts."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "</s>"})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=1024))
    bert = BertModel(BertConfig(**sizes, vocab_size=64))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=1))
    models = {
        **dict.fromkeys(("google/flan-t5-small", "google/flan-t5-base", "DIR"), tiny_t5()),
        **dict.fromkeys(("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"), llama),
        **dict.fromkeys(("gpt2", "MODEL", "FOLDER"), gpt2),
        "bert-base-uncased": bert,
        "t5-base": tiny_t5(V1_0),
        "cache/traceforge-t5-small-0.2.0": tiny_t5(),
        "cache/smollm2-135m-instruct-0.1.2": llama,
        "cache/all-minilm-l6-v2-0.1.0": bert,
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    mpoe.upcycle(llama, mpoe.MPOEConfig(num_experts=4)).save_pretrained(folder / "OUT")
    tokenizer.save_pretrained(folder / "OUT")
    torch.save(reference_checkpoint.write(models["t5-base"]), folder / "pytorch_model.bin")
    models["t5-base"].config.save_pretrained(folder)  # beside it
    _write_tasks(folder)
    _write_texts(folder)
    for name in ("scripts", "configs"):
        (folder / name).symlink_to(ROOT / name)


def finished_runs(*folders: str) -> None:
    """Finished runs of `mpoe finetune`, in a folder of `prepare`."""
    flags = "--objective causal-lm --model_name_or_path gpt2 --corpus book.txt --max_steps 1 --block_size 16 --use_cpu"
    for folder in folders:
        finetune([*flags.split(), "--num_experts", "2", "--eval_strategy", "no", "--output_dir", folder])


def balanced_mixture(folder: str) -> None:
    """A mixture in the paper's layout, which has routed exports."""
    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    config = mpoe.MPOEConfig(num_experts=4, layout="balanced", balancing="loss")
    mpoe.upcycle(model, config).save_pretrained(folder)
    AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M").save_pretrained(folder)


def write_adapters(*folders: str) -> None:
    """Adapters of the folder google/flan-t5-small."""
    for folder in folders:
        model = AutoModelForSeq2SeqLM.from_pretrained("google/flan-t5-small").requires_grad_(False)
        mpoe.save_adapter(mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=2)), folder)


def _write_texts(folder: Path) -> None:
    words = ("good", "very good", "bad", "awful", "great")
    corpus = "".join(f"the film is {word} .\n" for word in words * 600)
    hub = folder / "Salesforce" / "wikitext"
    hub.mkdir(parents=True)
    for name in ("book.txt", "test.txt", "valid.txt", "samples.txt", "texts.txt", "train.txt"):
        (folder / name).write_text(corpus)
    (folder / "prompts.txt").write_text("the film\n\n")
    for name in ("train", "valid", "test"):  # a folder of texts takes the place of a hub's dataset
        (hub / f"{name}.txt").write_text(corpus)


def _write_tasks(folder: Path) -> None:
    rows = [("the film is great .", 1), ("the film is awful .", 0)] * 20
    _table(folder / "glue" / "CoLA", "", [f"x\t{label}\t\t{text}" for text, label in rows])
    for task in ("glue/SST-2", "cache/sentiment-0.5/sentiment"):
        _table(folder / task, "sentence\tlabel", [f"{text}\t{label}" for text, label in rows])
    pairs = [f"{label}\t1\t2\t{text}\t{text}" for text, label in rows]
    _table(folder / "glue" / "MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", pairs)
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    scores = [f"{n}\tg\tf\t2012\t{n}\ts\ts\t{text}\t{text}\t{n % 6}.0" for n, (text, _) in enumerate(rows)]
    _table(folder / "glue" / "STS-B", header, scores)

    hub, configs = folder / "nyu-mll" / "glue", {}
    hub.mkdir(parents=True)
    for task, columns in (("cola", ["sentence"]), ("sst2", ["sentence"]), ("mrpc", ["sentence1", "sentence2"])):
        lines = [json.dumps({**dict.fromkeys(columns, text), "label": label}) for text, label in rows]
        (hub / f"{task}.jsonl").write_text("\n".join(lines))
        configs[task] = dict.fromkeys(("train", "validation", "test"), f"{task}.jsonl")
    _hub_card(hub, configs)

    (folder / "tickets").mkdir()
    for name in ("train", "dev"):
        kinds = ("billing", "technical", "other")
        lines = [f"{kind},the film,{kind}" for kind in kinds * 6]
        (folder / "tickets" / f"{name}.csv").write_text("\n".join(["subject,body,category", *lines]))
    described = "name: {0}\ntemplate: '{{body}}'\nlabel: category\nlabels: [billing, technical, other]\n"
    (folder / "reviews.yaml").write_text(
        described.format("reviews") + "metrics: [accuracy]\ntrain: tickets/train.csv\n"
    )


def _hub_card(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    """What makes a folder a dataset with configurations, as on a hub."""
    listed = [
        {"config_name": name, "data_files": [{"split": split, "path": file} for split, file in files.items()]}
        for name, files in configs.items()
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")


def _table(folder: Path, header: str, lines: list[str]) -> None:
    folder.mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("\n".join([header, *lines] if header else lines) + "\n")


def write_files(page: Path, folder: Path) -> None:
    """The files that a page shows, each under the name in its first line."""
    for block in blocks(page):
        name = _FILE.match(block.code)
        if name and block.language in ("yaml", "json", "text") and not block.not_run:
            path = folder / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code.partition("\n")[2])
