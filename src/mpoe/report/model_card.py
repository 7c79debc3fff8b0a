"""The model card that goes to a hub with a model: what it is, what it costs, what it reached, how to load it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mpoe.config import MPOEConfig
from mpoe.models import ParameterCount
from mpoe.printable import markdown
from mpoe.report.results import COUNTS
from mpoe.training.finetune import FinetuneResult
from mpoe.training.tasks import TASKS

# The hub's names of our metrics; what has no name there is in the table alone.
_METRICS = {
    "accuracy": "accuracy", "f1": "f1", "matthews": "matthews_correlation", "pearson": "pearsonr",
    "spearman": "spearmanr", "bleu": "bleu", "perplexity": "perplexity",
}  # fmt: skip
_PIPELINES = {
    "ForConditionalGeneration": "text2text-generation", "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation", "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
}  # fmt: skip
# Words in the name of a flag whose value is nobody's business: places on the user's machine, and secrets.
_PRIVATE = {"dir", "path", "file", "folder", "url", "token", "key", "secret", "password", "hub", "user"}
_HARMLESS = re.compile(r"[\w.+-]{1,80}")

CITATION = """```bibtex
@inproceedings{gao-etal-2022-parameter,
  title     = {Parameter-Efficient Mixture-of-Experts Architecture for Pre-trained Language Models},
  author    = {Gao, Ze-Feng and Liu, Peiyu and Zhao, Wayne Xin and Lu, Zhong-Yi and Wen, Ji-Rong},
  booktitle = {Proceedings of the 29th International Conference on Computational Linguistics},
  year      = {2022},
  pages     = {3263--3273},
  url       = {https://aclanthology.org/2022.coling-1.288}
}
```"""


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        repository: On the hub, "owner/name".
        model_class: Of Transformers.
        parameters: Counts.
        mixture: What the model was upcycled with; None for a dense one.
        is_adapter: Whether what goes up is an adapter, to be put on its base.
        base_model: The base's name on a hub; None if it has none.
        license: An identifier that the hub knows; None is not said.
        flags: What the user asked for when the model was fine-tuned, as in run.json; None if it was not by mpoe.
        results: What that reached; None as for `flags`.
        export: What export.json says; None for a model that was not exported.
        versions: Of the libraries that wrote the card, by name.
    """

    repository: str
    model_class: str
    parameters: ParameterCount
    mixture: MPOEConfig | None = None
    is_adapter: bool = False
    base_model: str | None = None
    license: str | None = None
    flags: Mapping[str, Any] | None = None
    results: FinetuneResult | None = None
    export: Mapping[str, Any] | None = None
    versions: Mapping[str, str] | None = None


def model_card(facts: CardFacts) -> str:
    """README.md for a model's repository: metadata in YAML, then Markdown in which texts of others are only texts.

    Args:
        facts: What is said. Flags that name places or secrets are left out, and so is every text that is no plain word.
    """
    results = _eval_results(facts)
    data = ModelCardData(
        base_model=facts.base_model,
        license=facts.license,
        library_name="transformers",
        pipeline_tag=next((tag for end, tag in _PIPELINES.items() if facts.model_class.endswith(end)), None),
        tags=_tags(facts),
        model_name=facts.repository.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    parts = [
        f"# {markdown(facts.repository.rpartition('/')[2])}",
        _summary(facts),
        _section("How to load it", [_loading(facts)]),
        _section("Parameters", [_parameters(facts)]),
        _section("Results", [] if facts.results is None else [_results(facts.results)]),
        _section("Against the mixture that it was exported from", [_export(facts.export)]),
        _section("How it was made", _making(facts)),
        _section("Citation", ["The method is MPOE:", CITATION] if _is_ours(facts) else []),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"))


def _section(title: str, parts: Sequence[str]) -> str:
    parts = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *parts]) if parts else ""


def _is_ours(facts: CardFacts) -> bool:
    return facts.mixture is not None or facts.export is not None


def _tags(facts: CardFacts) -> list[str]:
    tags = ["mpoe"]
    if facts.mixture is not None:
        tags += ["matrix-product-operator"] if facts.mixture.mpo_layers and not facts.mixture.is_extended else []
        tags += ["mixture-of-experts"] if facts.mixture.is_mixture else []
    return tags


def _summary(facts: CardFacts) -> str:
    config, base = facts.mixture, facts.base_model
    of = f" of {markdown(base)}" if base else ""
    if facts.export is not None:
        return (
            f"A {markdown(facts.model_class)}, exported by mpoe from a mixture of experts: "
            f"{markdown(str(facts.export.get('how')))}. It loads without mpoe."
        )
    if config is None:
        return f"A fine-tuned {markdown(facts.model_class)}{of}."
    if not config.is_mixture:
        kind = (
            f"feed-forward matrices are extended by rank {config.num_experts * config.expert_rank}, without a router"
            if config.is_extended
            else f"{', '.join(config.mpo_layers)} are matrix product operators"
        )
        return f"A {markdown(facts.model_class)}{of} whose {kind}."
    experts = (
        f"share its matrices, and each adds a matrix of rank {config.expert_rank} to each of them"
        if config.is_extended
        else "share one large central tensor a matrix, and each owns small auxiliary tensors: the matrices are matrix "
        "product operators (MPOE)"
    )
    if "mlp" not in config.mpo_layers:
        experts = "are whole matrices"
    elif not config.share_central:
        experts = "are matrix product operators that share nothing"
    kind = "An adapter that makes a mixture of experts" if facts.is_adapter else "A mixture of experts"
    return (
        f"{kind}{of}: a {markdown(facts.model_class)} in which {config.num_experts} experts of a feed-forward layer "
        f"{experts}. A router sends each token to {config.experts_per_token} of them."
    )


def _loading(facts: CardFacts) -> str:
    name, kind = facts.repository, facts.model_class
    if facts.is_adapter:
        base = facts.base_model or "..."
        lines = [
            "import mpoe",
            "from huggingface_hub import snapshot_download",
            f"from transformers import AutoTokenizer, {kind}",
            "",
            f'model = mpoe.load_adapter({kind}.from_pretrained("{base}"), snapshot_download("{name}"))',
            f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        ]
    elif facts.mixture is not None:
        lines = [
            "import mpoe",
            "from transformers import AutoTokenizer",
            "",
            f'model = mpoe.from_pretrained("{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ]
    else:
        lines = [
            f"from transformers import AutoTokenizer, {kind}",
            "",
            f'model = {kind}.from_pretrained("{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ]
    note = ""
    if facts.mixture is not None and not facts.is_adapter:
        note = (
            "\n\nThe package mpoe must be installed and imported first; then `AutoModel*.from_pretrained` loads it "
            "too. Without it Transformers fills the experts with random numbers."
        )
    return "```python\n" + "\n".join(lines) + "\n```" + note


def _parameters(facts: CardFacts) -> str:
    count = facts.parameters
    rows = {"all": count.total}
    if facts.mixture is not None:
        rows |= {
            "met by one token": count.active,
            "central tensors, shared by the experts": count.central,
            "auxiliary tensors of all experts": count.auxiliary,
            "routers": count.router,
            "the dense model": count.dense,
        }
        if facts.mixture.is_mixture:
            rows["the same mixture of whole experts"] = count.whole_experts
    return _table(["", "parameters"], [[name, f"{number:,}"] for name, number in rows.items()])


def _results(results: FinetuneResult) -> str:
    rows = [
        [task, split, name.replace("_", " "), f"{value:,.{0 if name in COUNTS else 4}f}"]
        for task, splits in results.tasks.items()
        for split, metrics in splits.items()
        for name, value in metrics.items()
    ]
    return _table(["task", "rows", "metric", "value"], rows) + "\n\nCross-entropy is in nats."


def _export(export: Mapping[str, Any] | None) -> str:
    logits = (export or {}).get("logits")
    if not isinstance(logits, dict):
        return ""
    shown = {
        "places": "tokens compared", "largest": "largest difference of logits", "mean": "mean absolute difference",
        "kl": "KL divergence, nats a token", "same_choice": "share with the same most probable token",
    }  # fmt: skip
    rows = [[title, f"{logits[key]:,.4g}"] for key, title in shown.items() if isinstance(logits.get(key), int | float)]
    return _table(["", ""], rows)


def _making(facts: CardFacts) -> list[str]:
    parts = []
    if facts.mixture is not None:
        values = facts.mixture.to_dict()
        of_layout = "expert_rank" if facts.mixture.is_extended else "gauge"
        chosen = {name: values[name] for name in ("num_experts", "layout", of_layout, "mpo_layers")}
        parts += ["The mixture:", _flags(chosen | facts.mixture.to_diff_dict(), "setting")]
    if facts.flags is not None and facts.results is not None:
        flags, steps = public_flags(facts.flags), facts.results.steps
        parts += [
            f"Fine-tuned with `mpoe finetune`, {steps:,} steps; its flags that are not the defaults:",
            _flags(flags),
        ]
        if left_out := len(facts.flags) - len(flags):
            parts.append(f"{left_out} more, which name files and folders, are left out.")
    versions = {**(facts.results.versions if facts.results else {}), **(facts.versions or {})}
    if versions:
        parts.append("Versions: " + ", ".join(f"{markdown(n)} {markdown(v)}" for n, v in versions.items()) + ".")
    return parts


def public_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's flags those that say something about the model and nothing about who made it, and where.

    Args:
        flags: Names and JSON values.

    Returns:
        Numbers, truths, plain words and lists of these, but for flags whose name says that they are a place or secret.
    """

    def is_public(value: Any) -> bool:
        if isinstance(value, list):
            return all(map(is_public, value))
        return isinstance(value, int | float) or (isinstance(value, str) and bool(_HARMLESS.fullmatch(value)))

    return {name: v for name, v in flags.items() if not _PRIVATE & set(name.split("_")) and is_public(v)}


def _flags(values: Mapping[str, Any], what: str = "flag") -> str:
    def shown(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return _table([what, "value"], [[name, shown(value)] for name, value in values.items()])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """Of the test rows, or the validation rows where there are none; they are this library's own split of a task."""
    found = []
    for name, splits in (facts.results.tasks if facts.results else {}).items():
        split = "test" if "test" in splits else "validation"
        task, is_local = TASKS.get(name), bool(facts.flags and facts.flags.get("data_dir"))
        on_hub = task is not None and bool(task.hub) and not is_local
        kind = "text-generation"
        if task is not None:
            kind = "text2text-generation" if task.kind == "text" else "text-classification"
        found += [
            EvalResult(
                task_type=kind,
                dataset_type=task.hub if task is not None and on_hub else name,
                dataset_name=f"{name}, {split} rows of mpoe",
                dataset_config=task.hub_config if task is not None and on_hub else None,
                metric_type=_METRICS[metric],
                metric_value=value,
            )
            for metric, value in splits[split].items()
            if metric in _METRICS and math.isfinite(value)
        ]
    return found
