"""Runs for the tests of the page: numbers of the shape that real ones have."""

import math

from mpoe.models import BondSpectrum, LayerChoice, ParameterCount, TokenRouting
from mpoe.nn import RouterStatistics
from mpoe.report.page import RunReport
from mpoe.training.finetune import FinetuneResult
from mpoe.training.optimizer import TrainedPart

LAYERS = [f"{stack}.block.{n}.layer.{1 + (stack == 'decoder')}.DenseReluDense" for stack in ("encoder", "decoder")
          for n in range(4)]  # fmt: skip
COUNT = {
    "other": 44_000_000, "central": 33_000_000, "auxiliary": 15_700_000, "router": 65_664, "trained": 92_000_000,
    "dense": 77_000_000, "whole_experts": 308_000_000, "active": 79_100_000,
}  # fmt: skip


def result(task="cola", experts=8, layers=LAYERS):
    count = COUNT if experts else {**COUNT, "other": 77_000_000, "central": 0, "auxiliary": 0, "router": 0}
    share = [1 / experts] * experts if experts else []
    gates = [0.5 * mass for mass in share]
    statistics = {name: RouterStatistics(share, share, gates, 0.0, 1.9) for name in layers} if experts else {}
    metrics = {"accuracy": 0.8125, "cross_entropy": 0.4, "rows": 96.0}
    return FinetuneResult(
        {task: {"validation": metrics, "test": metrics}}, {"validation": 0.8125, "test": 0.8125}, 0.5, 120, None, 1.42,
        None, 3 * 2**30, ParameterCount(**count), [TrainedPart("routers", 1_000_000, 2_000_000, 1e-3)], statistics,
        None, None, None, {},
    )  # fmt: skip


def log(experts=8, layers=LAYERS, steps=range(5, 125, 5)):
    lines = []
    for step in steps:
        of_layers = {}
        for n, name in enumerate(layers if experts else ()):
            weights = [1 + math.sin(step / 40 + e * (n + 1)) * step / 150 for e in range(experts)]
            share = [round(weight / sum(weights), 4) for weight in weights]
            of_layers[name] = {
                "share": share, "gate_mass": [round(0.6 * of, 4) for of in share],
                "balance_loss": 1 + step / 900, "entropy": 2 - n / 20 - step / 400,
                "dropped_fraction": 0.0, "divergence": 0.01 * (1 - math.exp(-step / 50)) * (1 + n / 5),
            }  # fmt: skip
        entry = {"step": step, "epoch": step / 120, "loss": 3 * math.exp(-step / 60) + 0.3, "learning_rate": 1e-3}
        lines.append(
            entry | ({"layers": of_layers, "mask": {"drawn": step, "discarded": step // 2}} if experts else {})
        )
        if step % 30 == 0:
            lines.append({"step": step, "eval_loss": 2 * math.exp(-step / 70), "eval_accuracy": 0.5 + step / 400})
    return lines


def spectra(experts=8, layers=LAYERS):
    index = [1, 2, 4, 8, 16, 32, 64]
    values = [[math.exp(-(n - 1) / (30 + e)) for n in index] for e in range(experts)]
    return [
        BondSpectrum(f"{layer}.{matrix}", bond, 64, index, values, [3.5 + e / 100 for e in range(experts)])
        for layer in layers
        for matrix in ("up", "down")
        for bond in (1, 2)
    ]


def texts(words, experts=8, layers=LAYERS):
    return [
        TokenRouting(
            "Text",
            [(" ", word) for word in words],
            experts,
            {
                layer: LayerChoice([[(i + n) % experts] for i in range(len(words))], [0.5] * len(words))
                for n, layer in enumerate(layers)
            },
        )
    ]


def mixture(name="mpoe-8", task="cola", words=("A", "fine", "film", "."), layers=LAYERS, model="google/flan-t5-small"):
    return RunReport(
        name, model, result(task, layers=layers), log(layers=layers),
        {layer: 0.01 * (n + 1) for n, layer in enumerate(layers)}, spectra(layers=layers), texts(words, layers=layers),
    )  # fmt: skip


def dense(name="dense"):
    return RunReport(name, "google/flan-t5-small", result(experts=0), log(experts=0))
