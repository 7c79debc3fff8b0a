"""What README.md and docs/ tell a user to type exists; `make docs-test` runs it."""

import ast
import contextlib
import importlib
import re

import pytest

from documented import PAGES, ROOT, blocks, commands, inline, is_command
from mpoe.cli.commands import COMMANDS
from mpoe.cli.complete import describe
from mpoe.cli.parsing import RENAMED, WITHOUT_EFFECT

# Flags that prose names of other programs, or of the benchmarks.
OTHERS = {
    "--version", "--help_all", "--extra-index-url", "--malloc", "--short", "--out", "--path", "--table", "--update",
}  # fmt: skip
ids = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture(scope="module")
def flags():
    """The flags of every command, as they may be written."""
    known = {name: {option for flag in describe(name) for option in flag["options"]} for name in COMMANDS}
    accepted = {f"--{name}" for name in (*RENAMED, *WITHOUT_EFFECT)}
    for name in ("finetune", "perplexity", "inspect"):
        known[name] |= accepted if name == "finetune" else set()
    return known


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_documented_commands_and_flags_exist(page, flags):
    found = [(block.name, words) for block in blocks(page) if block.language == "sh" for words in commands(block.code)]
    for text in inline(page):
        if text.startswith("mpoe ") and " " in text:
            found += [(page.name, words) for words in commands(text) if is_command(words)]
    for where, (command, *words) in found:
        assert command in COMMANDS, f"{where}: mpoe {command}"
        named = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
        wrong = {name for name in named if name not in flags[command] and f"--no_{name[5:]}" not in flags[command]}
        assert not wrong, f"{where}: mpoe {command} has no {sorted(wrong)}"


def test_flags_in_prose_exist(flags):
    known = set().union(*flags.values()) | OTHERS
    known |= {name.replace("--", "--no_") for name in known}
    for page in PAGES:
        for text in inline(page):
            for name in re.findall(r"^--[\w-]+|(?<= )--[\w-]+", text) if text.startswith("--") else ():
                assert name in known, f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_python_blocks_are_python(page):
    for block in blocks(page):
        if block.language == "python":
            with contextlib.suppress(SyntaxError):
                tree = ast.parse(block.code)
                names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
                for name in names:
                    if name.startswith("mpoe"):
                        importlib.import_module(name)
                continue
            pytest.fail(f"{block.name} is no Python")


def test_every_page_is_in_the_table_of_contents():
    listed = set((ROOT / "docs" / "index.md").read_text().split())
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= listed


def test_a_wrong_flag_would_be_found(flags):
    lines = [
        'F="--task cola"',
        "mpoe finetune $F --num_expert 8 \\",
        "  --seed 1   # a note",
        "mpoe predict a 'x --y' && mpoe fetch t5",
    ]
    shell = "\n".join(lines)
    assert list(commands(shell)) == [
        ["finetune", "--task", "cola", "--num_expert", "8", "--seed", "1"],
        ["predict", "a", "x --y"],
        ["fetch", "t5"],
    ]
    assert "--num_expert" not in flags["finetune"]


def messages():
    """The texts of src, what is put into them as an ellipsis; neighbours that Python joins are one."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_that_are_explained_are_the_codes():
    texts = messages()
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    explained = re.findall(r"^### `(.*)`$", page, flags=re.M)
    assert len(explained) > 10
    for message in explained:
        fragments = [part.strip(" ;().") for part in message.split("…")]
        longest = max(fragments, key=len)
        assert any(longest in text for text in texts), message
