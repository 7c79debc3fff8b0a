"""On a GPU, in one call of less than 8 minutes: is a layer right there, does it never wait, and what does it cost.

    PYTHONPATH=src python benchmarks/gpu.py [--device cpu --tiny --backend aot_eager]

Both data types are run, whatever `--dtype` says. Checks come first, then times; what fails is a row of the table and
stops nothing else, what the time does not suffice for is a row that says so. A check that fails makes the exit status
1; a time over its target does not. Times are those of a host clock with the device synchronised around samples of
at least 10 ms, so what the host needs to start short kernels counts, as it does for users.

Shape letters: T tokens, K experts per token, D model width, F FFN width, E experts.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from contenders import BASE, TransformersExperts, dense_layer, forward_of, layouts, our_layer, step_of, switch_layer
from harness import DTYPES, Row, Samples, Target, compare, parse, parser, rows_over_dense, write_results
from mpoe.nn import MoEFeedForward, TopKRouter

SIZES = {"full": ((64, 128), BASE), "short": ((64, 128), BASE), "tiny": ((32, 64),)}  # (D, F); the last one is timed
CHECK_TOKENS = {"full": 512, "short": 512, "tiny": 40}
DECODE_TOKENS = (1, 32)
TOKENS = {"full": (16384, 4096, 512), "short": (16384,), "tiny": (5,)}  # what has targets comes first

CHECKED = ("separable", "narrow", "ends of 64", "balanced", "top-2", "dropped tokens")
TIMED = ("dense", "separable", "narrow", "ends of 64", "Switch", "Transformers grouped_mm")
COMPILED = ("dense", "separable", "narrow", "ends of 64")
GRAPHED = ("dense", "separable", "narrow")

# Greatest relative error (Frobenius) of the output or of any gradient, against float64.
TOLERANCES = {"float32": Target(1e-5), "bfloat16": Target(3e-2)}
STEP, FORWARD = Target(1.25), Target(1.15)  # of the separable layout over dense, bfloat16 at 16384 tokens
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
    for way, dtype in (("separable", "float32"), *((way, "bfloat16") for way in ("separable", "balanced", "top-2"))):
        case = f"compiled in one graph, {dtype}"
        yield Part(case, way, lambda c=case, w=way, t=dtype: [_compiles(c, w, t, args)])


def _is_right(case: str, way: str, D: int, F: int, dtype: str, args: argparse.Namespace) -> Row:
    x, dy, expected = _expected(way, D, F, CHECK_TOKENS[args.size])
    layer = _checked_layer(way, D, F).to(args.device, DTYPES[dtype])
    return _error_row(case, way, dtype, _results(layer, layer, x, dy), expected)


def _never_waits(case: str, way: str, args: argparse.Namespace) -> Row:
    """Forward and backward, with every call that would wait for the device an error."""
    if args.device == "cpu":
        return _skipped(case, way, "needs a GPU")
    layer, x = _on_device(_checked_layer, way, "bfloat16", CHECK_TOKENS[args.size], args)
    step = step_of(layer, x)
    step()  # what libraries do once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        forward_of(layer, x)()
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
    return _error_row(case, way, "bfloat16", {"y": y}, {"y": forward_of(layer, x)()})


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
        layer: Whose parameters get gradients, and whose device and dtype x and dy are brought to.
        x: (1, T, D).
        dy: Of the output.
    """
    parameter = next(layer.parameters())
    x = x.detach().to(parameter).requires_grad_()
    layer.train()
    layer.zero_grad()
    y = function(x)
    y.backward(dy.to(parameter))
    gradients = {"x": x, **dict(layer.named_parameters())}
    results = {"y": y.detach()} | {f"gradient of {name}": t.grad for name, t in gradients.items() if t.grad is not None}
    layer.eval()
    with torch.no_grad():
        return results | {"y in evaluation": function(x)}


@functools.cache
def _expected(way: str, D: int, F: int, tokens: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Tokens, a gradient of the output, and what a layer makes of them by `_plain`; all on the CPU in float64.

    Tokens whose experts are a matter of rounding are left out.
    """
    layer = _checked_layer(way, D, F)
    router = _router(layer)
    x_TD = torch.randn(2 * tokens, D).bfloat16().double()
    steps = -_probabilities(router, x_TD).detach().sort(dim=-1, descending=True).values.diff(dim=-1)
    margin = steps[:, : router.top_k].amin(dim=-1)
    x = x_TD[margin.argsort(descending=True)[:tokens]][None]
    dy = torch.randn(x.shape).bfloat16().double()
    return x, dy, _results(lambda x: _plain(layer, x[0])[None], layer, x, dy)


def _router(layer: MoEFeedForward) -> TopKRouter:
    assert layer.router is not None, "layers that are checked have several experts"
    return layer.router


def _probabilities(router: TopKRouter, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
    """The router's, by its definition."""
    mean_square = x_TD.square().mean(dim=-1, keepdim=True)
    unit = x_TD / (mean_square + torch.finfo(torch.float32).eps).sqrt()
    return (unit @ router.weight.T + router.bias).softmax(dim=-1)


def _plain(layer: MoEFeedForward, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
    """A layer by its definition: expert after expert, each with its matrices multiplied out."""
    router = _router(layer)
    seen_TD = x_TD if router.gradient == "all" else x_TD.detach()
    top, index = _probabilities(router, seen_TD).topk(router.top_k, dim=-1)
    weight = top / (top.detach() if router.top_k == 1 else top.sum(dim=-1, keepdim=True))
    kept = _kept(index, router.num_experts, router.capacity_factor)
    y = torch.zeros_like(x_TD)
    for e in range(router.num_experts):
        token, choice = torch.where((index == e) & kept)
        h = layer.activation(x_TD[token] @ layer.up.expert_matrix(e).T)
        y = y.index_add(0, token, h @ layer.down.expert_matrix(e).T * weight[token, choice, None])
    return y


def _kept(index: Int[Tensor, "T K"], num_experts: int, factor: float | None) -> Bool[Tensor, "T K"]:
    """Who finds a place, asked one after the other: first choices before second ones."""
    kept = torch.ones_like(index, dtype=torch.bool)
    if factor is not None:
        places = [max(4, int(factor * len(index) / num_experts))] * num_experts
        for k in range(index.shape[1]):
            for t, e in enumerate(index[:, k].tolist()):
                kept[t, k] = places[e] > 0
                places[e] -= 1
    return kept


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
        return of(*_on_device(_layer, name, dtype, tokens, args))

    targets = {("separable", "dense"): _target(of)} if (dtype, tokens) == ("bfloat16", 16384) else {}
    return _time(case, {name: functools.partial(way, name) for name in TIMED}, targets, args)


def _time_decode(case: str, tokens: int, args: argparse.Namespace) -> list[Row]:
    """Forwards of few tokens, where starting kernels is what takes time, with and without a CUDA graph."""

    def eager(name: str) -> Callable[[], object]:
        return forward_of(*_on_device(_layer, name, "bfloat16", tokens, args))

    def graph(name: str) -> Callable[[], object]:
        return _captured(*_on_device(_layer, name, "bfloat16", tokens, args))[0]

    makers = {name: functools.partial(eager, name) for name in GRAPHED}
    if args.device == "cpu":
        return [*_time(case, makers, {}, args), _skipped(case, "CUDA graphs", "need a GPU")]
    return _time(case, makers | {f"{name}, CUDA graph": functools.partial(graph, name) for name in GRAPHED}, {}, args)


def _time_compiled(case: str, of: Callable, tokens: int, args: argparse.Namespace) -> list[Row]:
    def eager() -> Callable[[], object]:
        return of(*_on_device(_layer, "dense", "bfloat16", tokens, args))

    def compiled(name: str) -> Callable[[], object]:
        layer, x = _on_device(_layer, name, "bfloat16", tokens, args)
        return of(_compiled(layer, args, x), x)

    torch.compiler.reset()  # it refuses to compile the same code again and again
    makers = {"dense": eager} | {f"{name}, compiled": functools.partial(compiled, name) for name in COMPILED}
    targets = {("separable, compiled", "dense, compiled"): _target(of)} if tokens == 16384 else {}
    return _time(case, makers, targets, args)


def _target(of: Callable) -> Target:
    return STEP if of is step_of else FORWARD


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
    return rows_over_dense(case, compare(ways, args.repeats, budget_s=CASE_S), targets) + failed


def _on_device(
    make: Callable[[str, int, int], nn.Module], way: str, dtype: str, tokens: int, args: argparse.Namespace
) -> tuple[nn.Module, Tensor]:
    """A copy of a layer of the size that is timed, from `_layer` or `_checked_layer`, and tokens for it, (1, T, D)."""
    D, F = SIZES[args.size][-1]
    layer = copy.deepcopy(make(way, D, F)).to(args.device, DTYPES[dtype])
    return layer, torch.randn(1, tokens, D, device=args.device, dtype=DTYPES[dtype])


def _checked_layer(way: str, D: int, F: int) -> MoEFeedForward:
    """A copy of a layer in float64 whose numbers all data types can represent, on the CPU.

    With GELU: a rounded number that changes its sign changes ReLU's derivative from 0 to 1. With experts that differ
    much: the gradient of top-2's router is the difference of two outputs, of which rounding would leave little.
    """
    layer = copy.deepcopy(_layer(way, D, F))
    assert isinstance(layer, MoEFeedForward), way
    layer.activation = nn.GELU()
    for experts in (layer.up, layer.down):
        experts.add_noise(0.5, torch.Generator().manual_seed(0))
    return layer.bfloat16().double()


@functools.cache
def _layer(way: str, D: int, F: int) -> nn.Module:
    """Any of the layers, on the CPU in float32; ours start as the dense one."""
    if way == "dense":
        return _dense(D, F)
    if way == "Switch":
        return switch_layer(D, F)
    if way == "Transformers grouped_mm":
        return TransformersExperts(D, F, "grouped_mm")
    options = {
        **layouts(),
        "top-2": {"moe_type": "moe"},
        "dropped tokens": {"capacity_factor": 0.75, "eval_capacity_factor": 0.75},
    }
    return our_layer(_dense(D, F), **options[way])


_dense = functools.cache(dense_layer)


def _compiled(layer: nn.Module, args: argparse.Namespace, x: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A layer as one graph; x, (1, T, D), is for one that has never run and has no counters yet."""
    if x is not None:
        forward_of(layer, x)()
    return torch.compile(layer, fullgraph=True, dynamic=False, backend=args.backend)


def _captured(layer: nn.Module, x: Tensor) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of a forward in evaluation: what replays it, and the output, which every replay overwrites.

    Args:
        layer: On the GPU.
        x: (1, T, D); a replay reads what is in it by then.
    """
    forward = forward_of(layer, x)
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
