"""On a GPU, in one call of less than 8 minutes: is a layer correct there, does it never synchronise, and its times.

    PYTHONPATH=src python benchmarks/gpu.py [--device cpu --tiny --backend aot_eager]

Both data types run, whatever `--dtype` says. Checks come first, then times. A part that fails is a row of the table and
stops nothing else; a part for which no time is left is a row that says so. A failed check makes the exit status 1; a
missed target of time does not. Times are of the host's clock, with the device synchronised around samples of at least
10 ms, so the time to launch short kernels counts, as it does for users. Weights may stay in the GPU's cache.

Shape letters: T tokens, D model width, F FFN width.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from contenders import (
    BASE,
    LAYOUTS,
    MANY,
    TransformersExperts,
    dense_layer,
    forward_of,
    lora_layer,
    our_layer,
    set_apart,
    step_of,
    switch_layer,
)
from definition import plain_layer, probabilities, router_of
from harness import DTYPES, Row, Samples, Target, compare, parse, parser, rows_over, write_results
from mpoe.nn import ExtendedExperts, MoEFeedForward

SIZES = {"full": ((64, 128), BASE), "short": ((64, 128), BASE), "tiny": ((32, 64),)}  # (D, F); the last one is timed
CHECK_TOKENS = {"full": 512, "short": 512, "tiny": 40}
DECODE_TOKENS = (1, 32)
TOKENS = {"full": (16384, 4096, 512), "short": (16384,), "tiny": (5,)}  # the one with targets comes first

OPTIONS: dict[str, dict[str, Any]] = {
    **LAYOUTS,
    "experts with GELU": {"expert_activation": "gelu"},
    "balanced, top-2": {"layout": "balanced", "moe_type": "moe"},
    "dropped tokens": {"layout": "balanced", "capacity_factor": 0.75, "eval_capacity_factor": 0.75},
}
CHECKED = tuple(OPTIONS)
COMPILED_CHECKED = ("extended", "experts with GELU")
TIMED = ("dense", "extended", MANY, "LoRA", "Switch", "Transformers grouped_mm")
COMPILED = ("dense", "extended", "LoRA")
GRAPHED = ("dense", "extended", "LoRA")

# Greatest relative error (Frobenius) of the output or of any gradient, against float64.
TOLERANCES = {"float32": Target(1e-5), "bfloat16": Target(3e-2)}
OVER_DENSE = Target(1.15)  # of the default layout, forward and step, bfloat16 at 16384 tokens
CASE_S = 5.0  # a case stops after the round in which it has taken so long, seconds
RELATIVE_ERROR, ERRORS, SKIPPED = "relative error", "errors", "skipped"  # units of rows that are not times


@dataclass(frozen=True)
class Part:
    """One thing to do, which may fail without harm to the others."""

    case: str
    way: str
    run: Callable[[], list[Row]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print and write.

    Returns:
        The exit status: 1 if a check failed or anything raised, else 0.
    """
    made = parser("Correctness and times of a feed-forward layer on a GPU.")
    made.add_argument("--budget", type=float, default=400, help="what has not begun by then is skipped, seconds")
    made.add_argument("--backend", default="inductor", help="of torch.compile")
    made.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    args = parse(made, arguments)
    start = time.monotonic()
    rows: list[Row] = []
    for part in (*_checks(args), *_timings(args)):
        new = _run(part, start + args.budget)
        rows += new
        outcome = ", ".join(sorted({row.verdict for row in new} - {""}))
        print(f"{time.monotonic() - start:5.0f} s  {part.case}: {part.way} {outcome}", file=sys.stderr, flush=True)
    write_results("gpu", rows, args)
    return int(any(row.verdict == "missed" and row.unit in (RELATIVE_ERROR, ERRORS) for row in rows))


def _run(part: Part, deadline: float) -> list[Row]:
    if time.monotonic() > deadline:
        return [_skipped(part.case, part.way, "no time left")]
    try:
        return part.run()
    except Exception as error:  # whatever it is, it is this part's result
        return [_raised(part.case, part.way, error)]


def _raised(case: str, way: str, error: Exception) -> Row:
    first_line = next(iter(str(error).splitlines()), "")
    return Row(case, way, Samples((1.0,)), target=Target(0), unit=ERRORS, note=f"{type(error).__name__}: {first_line}")


def _skipped(case: str, way: str, why: str) -> Row:
    return Row(case, way, Samples((1.0,)), unit=SKIPPED, note=why)


def _checks(args: argparse.Namespace) -> Iterator[Part]:
    """What must hold on the device."""
    for D, F in SIZES[args.size]:
        for way in CHECKED:
            for dtype in TOLERANCES:
                case = f"against float64, {F}x{D}, {dtype}"
                yield Part(case, way, lambda c=case, w=way, t=dtype, d=D, f=F: [_is_right(c, w, d, f, t, args)])
    for way in CHECKED:
        case = "no synchronisation, bfloat16"
        yield Part(case, way, lambda c=case, w=way: [_never_waits(c, w, args)])
    for tokens in DECODE_TOKENS:
        for way in CHECKED:
            case = f"CUDA graph, bfloat16, {tokens} tokens"
            yield Part(case, way, lambda c=case, w=way, n=tokens: [_replays(c, w, n, args)])
    for way in COMPILED_CHECKED:
        for dtype in TOLERANCES:
            case = f"compiled in one graph, {dtype}"
            yield Part(case, way, lambda c=case, w=way, t=dtype: [_compiles(c, w, t, args)])


def _is_right(case: str, way: str, D: int, F: int, dtype: str, args: argparse.Namespace) -> Row:
    x, dy, expected = _expected(way, D, F, CHECK_TOKENS[args.size])
    layer = copy.deepcopy(_checked_layer(way, D, F)).to(args.device, DTYPES[dtype])
    x, dy = x.to(args.device, DTYPES[dtype]), dy.to(args.device, DTYPES[dtype])
    return _error_row(case, way, dtype, _results(layer, layer, x, dy), expected)


def _never_waits(case: str, way: str, args: argparse.Namespace) -> Row:
    """Forward and backward, with every call that would synchronise an error."""
    if args.device == "cpu":
        return _skipped(case, way, "needs a GPU")
    layer, x = _on_device(_checked_layer, way, "bfloat16", CHECK_TOKENS[args.size], args)
    step = step_of([layer], x)
    step()  # what libraries do once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        forward_of([layer], x)()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Row(case, way, Samples((0.0,)), target=Target(0), unit=ERRORS)


def _replays(case: str, way: str, tokens: int, args: argparse.Namespace) -> Row:
    """A captured forward, replayed on tokens that it was not captured with."""
    if args.device == "cpu":
        return _skipped(case, way, "needs a GPU")
    layer, x = _on_device(_checked_layer, way, "bfloat16", tokens, args)
    replay, y = _captured(layer, x)
    x.copy_(torch.randn_like(x))
    replay()
    return _error_row(case, way, "bfloat16", {"y": y}, {"y": forward_of([layer], x)()})


def _compiles(case: str, way: str, dtype: str, args: argparse.Namespace) -> Row:
    """The whole layer as one graph, against the same layer without."""
    layer, x = _on_device(_checked_layer, way, dtype, CHECK_TOKENS[args.size], args)
    dy = torch.randn_like(x)
    eager = _results(layer, layer, x, dy)
    torch.compiler.reset()
    return _error_row(case, way, dtype, _results(_compiled(layer, args), layer, x, dy), eager)


def _error_row(case: str, way: str, dtype: str, results: dict[str, Tensor], expected: dict[str, Tensor]) -> Row:
    errors = {name: _relative_error(results[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    values = Samples((errors[worst],))
    return Row(case, way, values, target=TOLERANCES[dtype], unit=RELATIVE_ERROR, note=f"worst: {worst}")


def _relative_error(value: Tensor, expected: Tensor) -> float:
    value, expected = value.double().cpu(), expected.double().cpu()
    if not value.isfinite().all():
        raise ArithmeticError("a result has numbers that are not finite")
    tiny = torch.finfo(torch.float64).tiny
    return ((value - expected).norm() / expected.norm().clamp_min(tiny)).item()


def _results(function: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output in training and in evaluation, and all gradients, by name.

    Args:
        function: The layer itself, or another way to compute it.
        layer: Whose parameters get gradients.
        x: (1, T, D).
        dy: Of the output.
    """
    x = x.detach().requires_grad_()
    layer.train()
    layer.zero_grad()
    y = function(x)
    y.backward(dy)
    gradients = {"x": x, **dict(layer.named_parameters())}
    results = {"y": y.detach()} | {f"gradient of {name}": t.grad for name, t in gradients.items() if t.grad is not None}
    layer.eval()
    with torch.no_grad():
        return results | {"y in evaluation": function(x)}


@functools.cache
def _expected(way: str, D: int, F: int, tokens: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Tokens, a gradient of the output, and what `plain_layer` makes of them; all on the CPU in float64.

    Tokens whose experts depend on rounding are left out.
    """
    layer = copy.deepcopy(_checked_layer(way, D, F)).double()
    router = router_of(layer)
    x_TD = torch.randn(2 * tokens, D).bfloat16().double()
    steps = -probabilities(router, x_TD).detach().sort(dim=-1, descending=True).values.diff(dim=-1)
    margin = steps[:, : router.top_k].amin(dim=-1)
    x = x_TD[margin.argsort(descending=True)[:tokens]][None]
    dy = torch.randn(x.shape).bfloat16().double()
    return x, dy, _results(lambda x: plain_layer(layer, x[0])[None], layer, x, dy)


def _timings(args: argparse.Namespace) -> Iterator[Part]:
    """What is measured; what `torch.compile` takes long to prepare comes last."""
    phases = {"step": step_of, "forward": forward_of}
    for dtype in reversed(TOLERANCES):
        for tokens in TOKENS[args.size]:
            for phase, of in phases.items():
                case = f"{phase}, {dtype}, {tokens} tokens"
                yield Part(case, "all", lambda c=case, o=of, t=dtype, n=tokens: _time_eager(c, o, t, n, args))
    for tokens in DECODE_TOKENS:
        case = f"decode, bfloat16, {tokens} tokens"
        yield Part(case, "all", lambda c=case, n=tokens: _time_decode(c, n, args))
    for tokens in TOKENS[args.size]:
        for phase, of in phases.items():
            case = f"{phase} compiled, bfloat16, {tokens} tokens"
            yield Part(case, "all", lambda c=case, o=of, n=tokens: _time_compiled(c, o, n, args))


def _time_eager(case: str, of: Callable, dtype: str, tokens: int, args: argparse.Namespace) -> list[Row]:
    def way(name: str) -> Callable[[], object]:
        layer, x = _on_device(_layer, name, dtype, tokens, args)
        return of([layer], x)

    targets = {("extended", "dense"): OVER_DENSE} if (dtype, tokens) == ("bfloat16", 16384) else {}
    return _time(case, {name: functools.partial(way, name) for name in TIMED}, targets, args)


def _time_decode(case: str, tokens: int, args: argparse.Namespace) -> list[Row]:
    """Forwards of few tokens, where launching kernels takes the time, with and without a CUDA graph."""

    def eager(name: str) -> Callable[[], object]:
        layer, x = _on_device(_layer, name, "bfloat16", tokens, args)
        return forward_of([layer], x)

    def graph(name: str) -> Callable[[], object]:
        return _captured(*_on_device(_layer, name, "bfloat16", tokens, args))[0]

    makers = {name: functools.partial(eager, name) for name in GRAPHED}
    if args.device == "cpu":
        return [*_time(case, makers, {}, args), _skipped(case, "CUDA graphs", "need a GPU")]
    return _time(case, makers | {f"{name}, CUDA graph": functools.partial(graph, name) for name in GRAPHED}, {}, args)


def _time_compiled(case: str, of: Callable, tokens: int, args: argparse.Namespace) -> list[Row]:
    def eager() -> Callable[[], object]:
        layer, x = _on_device(_layer, "dense", "bfloat16", tokens, args)
        return of([layer], x)

    def compiled(name: str) -> Callable[[], object]:
        layer, x = _on_device(_layer, name, "bfloat16", tokens, args)
        return of([_compiled(layer, args)], x)

    torch.compiler.reset()  # it refuses to compile the same code again and again
    makers = {"dense": eager} | {f"{name}, compiled": functools.partial(compiled, name) for name in COMPILED}
    targets = {("extended, compiled", "dense, compiled"): OVER_DENSE} if tokens == 16384 else {}
    return _time(case, makers, targets, args)


def _time(
    case: str,
    makers: dict[str, Callable[[], Callable[[], object]]],
    targets: dict[tuple[str, str], Target],
    args: argparse.Namespace,
) -> list[Row]:
    """Time the ways that can be made and that run once; the others are rows with their error."""
    ways: dict[str, Callable[[], object]] = {}
    failed: list[Row] = []
    for name, make in makers.items():
        try:
            way = make()
            way()
            ways[name] = way
        except Exception as error:  # this way's result; the others shall be timed
            failed.append(_raised(case, name, error))
    return rows_over(case, compare(ways, args.repeats, budget_s=CASE_S), targets) + failed


def _on_device(
    make: Callable[[str, int, int], nn.Module], way: str, dtype: str, tokens: int, args: argparse.Namespace
) -> tuple[nn.Module, Tensor]:
    """A copy of a layer of the size that is timed, from `_layer` or `_checked_layer`, and tokens for it, (1, T, D)."""
    D, F = SIZES[args.size][-1]
    layer = copy.deepcopy(make(way, D, F)).to(args.device, DTYPES[dtype])
    return layer, torch.randn(1, tokens, D, device=args.device, dtype=DTYPES[dtype])


@functools.cache
def _checked_layer(way: str, D: int, F: int) -> MoEFeedForward:
    """A layer in float32 whose numbers bfloat16 can represent, apart from routers and factors; on the CPU.

    With GELU: a rounded number that changes its sign changes ReLU's derivative from 0 to 1. With experts that differ
    much: the gradient of a router of two experts is the difference of two outputs, which rounding would hide.
    """
    layer: Any = copy.deepcopy(_layer(way, D, F))
    layer.activation = nn.GELU()
    for experts in (layer.up, layer.down):
        if isinstance(experts, ExtendedExperts):
            set_apart(experts, std=0.3)
        else:
            experts.add_noise(0.5, torch.Generator().manual_seed(0))
    return layer.bfloat16().float()


@functools.cache
def _layer(way: str, D: int, F: int) -> nn.Module:
    """Any of the layers, on the CPU in float32."""
    if way in OPTIONS:
        return our_layer(_dense(D, F), **OPTIONS[way])
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: _dense(D, F),
        "LoRA": lambda: lora_layer(_dense(D, F)),
        "Switch": lambda: switch_layer(D, F),
        "Transformers grouped_mm": lambda: TransformersExperts(D, F),
    }
    return makers[way]()


_dense = functools.cache(dense_layer)


def _compiled(layer: nn.Module, args: argparse.Namespace) -> Any:
    """A layer as one graph."""
    return torch.compile(layer, fullgraph=True, dynamic=False, backend=args.backend)


def _captured(layer: nn.Module, x: Tensor) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of a forward in evaluation: what replays it, and the output, which every replay overwrites.

    Args:
        layer: On the GPU.
        x: (1, T, D); a replay reads what is in it by then.
    """
    forward = forward_of([layer], x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch.cuda.graph's documentation asks for
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward()
    return graph.replay, y


if __name__ == "__main__":
    sys.exit(main())
