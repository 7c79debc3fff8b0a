"""What a training step costs on n devices: memory, bytes sent, time. Arithmetic from data sheets, nothing measured.

Dense models and MPOE are data parallel: every device has all parameters, or gathers them layer by layer (FSDP, ZeRO-3),
and gradients are summed over devices. Switch can be, or its experts are divided over devices and tokens travel to them.

All of it is the lower bound of an ideal machine: links are full, nothing waits, experts get equally many tokens.

Letters: n devices, g devices of a node, m = n / g nodes (not rounded), p devices that share a set of experts; S bytes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from mpoe.report.variants import Variant


@dataclass(frozen=True)
class Hardware:
    """A cluster. The defaults are data-sheet numbers of H100 SXM nodes with 400 Gb/s InfiniBand a GPU, not measured.

    Attributes:
        device_flops: Peak of a device, FLOP/s; 989e12 is bf16 without sparsity.
        achieved: Share of the peak that training reaches, in (0, 1]. Published for 8,192 and 16,384 H100: 0.38 to 0.43
            (The Llama 3 Herd of Models, 2024, table 4).
        device_memory: Of a device, bytes.
        node_devices: g, count.
        node_bandwidth: What a device can send within its node, B/s; NVLink's 900 GB/s are both directions together.
        network_bandwidth: What a device can send to other nodes, B/s.
    """

    device_flops: float = field(default=989e12, metadata={"help": "Peak of a device, FLOP/s."})
    achieved: float = field(default=0.4, metadata={"help": "Share of the peak that training reaches, in (0, 1]."})
    device_memory: float = field(default=80e9, metadata={"help": "Memory of a device, bytes."})
    node_devices: int = field(default=8, metadata={"help": "Devices of a node."})
    node_bandwidth: float = field(
        default=450e9, metadata={"help": "What a device can send within its node, B/s, one direction."}
    )
    network_bandwidth: float = field(
        default=50e9, metadata={"help": "What a device can send to other nodes, B/s, one direction."}
    )

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.achieved > 1:
            raise ValueError(f"achieved must be in (0, 1]; got {self.achieved}")


@dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        tokens_per_device: Tokens of a device, count; in an encoder-decoder model half of them pass each stack.
        weight_bytes: Of a weight, and of a value of an activation.
        gradient_bytes: Of a gradient.
        optimizer_bytes: Of the optimizer's state for a trained weight. The defaults, 2 + 2 + 12, are bfloat16 with
            Adam's two moments and the weight itself in float32 (ZeRO, Rajbhandari et al., SC 2020, §3.1).
        expert_devices: p, the devices over which Switch's experts are divided, count; None is one an expert.
        extended_overhead: Time of an extended FFN over that of a dense one, divided by the same ratio of FLOPs,
            dimensionless. The default is an estimate for a CPU.
        balanced_overhead: The same for a balanced FFN.
    """

    tokens_per_device: int = field(default=8192, metadata={"help": "Tokens of a device in a step."})
    weight_bytes: float = field(default=2.0, metadata={"help": "Bytes of a weight, and of a value of an activation."})
    gradient_bytes: float = field(default=2.0, metadata={"help": "Bytes of a gradient."})
    optimizer_bytes: float = field(
        default=12.0, metadata={"help": "Bytes of optimizer state for a trained weight; 12 is Adam beside bfloat16."}
    )
    expert_devices: int | None = field(
        default=None, metadata={"help": "Devices over which Switch's experts are divided; one an expert if left out."}
    )
    extended_overhead: float = field(
        default=1.1,
        metadata={"help": "FFN time over dense, by FLOPs over dense, in the extended layout; estimated for a CPU."},
    )
    balanced_overhead: float = field(default=1.2, metadata={"help": "The same in the balanced layout."})

    def __post_init__(self) -> None:
        _require_positive(self)


@dataclass(frozen=True)
class Traffic:
    """What one device sends, bytes.

    Attributes:
        local: Within its node.
        network: To other nodes.
    """

    local: float = 0.0
    network: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.local + other.local, self.network + other.network)

    @property
    def total(self) -> float:
        """Both, bytes."""
        return self.local + self.network

    def seconds(self, hardware: Hardware) -> float:
        """Time on full links, one kind after the other.

        Args:
            hardware: The bandwidths.
        """
        return self.local / hardware.node_bandwidth + self.network / hardware.network_bandwidth


@dataclass(frozen=True)
class StepCost:
    """What a step costs.

    Attributes:
        devices: n, count.
        tokens: Of all devices, count.
        memory: Of a device, bytes.
        reduced: What a device sends to sum gradients and, if sharded, to gather weights.
        exchanged: What a device sends of tokens on their way to experts and back.
        compute_s: Time to compute, seconds.
        communication_s: Time to send, seconds.
    """

    devices: int
    tokens: int
    memory: float
    reduced: Traffic
    exchanged: Traffic
    compute_s: float
    communication_s: float

    @property
    def in_turn(self) -> float:
        """Tokens a second of all devices if nothing is sent while computing."""
        return self.tokens / (self.compute_s + self.communication_s)

    @property
    def at_once(self) -> float:
        """Tokens a second of all devices if everything is sent while computing, as far as that takes long enough."""
        return self.tokens / max(self.compute_s, self.communication_s)


def reduce_scatter(size: float, devices: float, node_devices: float) -> Traffic:
    """What a device sends until each has its part of a sum of S bytes: (n - 1) / n · S. An all-gather sends the same.

    Within the node (g - 1) / g · S; then its g-th part around the m nodes, (m - 1) / m · S / g.

    Args:
        size: S, bytes.
        devices: n.
        node_devices: g.

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, J. Parallel Distrib. Comput. 2009.
    """
    local = min(devices, node_devices)
    nodes = devices / local
    return Traffic((local - 1) / local * size, (nodes - 1) / nodes * size / local)


def all_reduce(size: float, devices: float, node_devices: float) -> Traffic:
    """What a device sends until all have the sum of S bytes: 2 (n - 1) / n · S, a reduce-scatter and an all-gather.

    Args:
        size: S, bytes.
        devices: n.
        node_devices: g.

    Source: As `reduce_scatter`; no algorithm sends less.
    """
    half = reduce_scatter(size, devices, node_devices)
    return half + half


def all_to_all(size: float, devices: float, node_devices: float) -> Traffic:
    """What a device sends if its S bytes are for n devices in equal parts: (n - 1) / n · S, (n - g) / n of it far away.

    Args:
        size: S, bytes.
        devices: n.
        node_devices: g.

    Source: GShard (Lepikhin et al., ICLR 2021), §3.
    """
    local = min(devices, node_devices)
    return Traffic((local - 1) / devices * size, (devices - local) / devices * size)


def step_cost(variant: Variant, devices: int, is_sharded: bool, step: Step, hardware: Hardware) -> StepCost:
    """Memory, bytes and time of a training step.

    Args:
        variant: What is trained.
        devices: n, count, >= 1.
        is_sharded: Weights, gradients and optimizer state divided over all devices (FSDP, ZeRO stage 3) instead of
            copied to all (DDP).
        step: Its tokens and dtypes.
        hardware: The cluster.

    Raises:
        ValueError: No device.
    """
    if devices < 1:
        raise ValueError(f"devices must be >= 1; got {devices}")
    sharing = _sharing(variant, devices, step)
    reduced = _reduced(variant.parameters, variant.trained, devices, hardware.node_devices, is_sharded, step)
    if variant.expert_parameters:
        # each of the p devices that share a set sums its part with its fellows in the other sets
        part, sets, near = variant.expert_parameters / sharing, devices / sharing, hardware.node_devices / sharing
        reduced += _reduced(part, part, sets, max(near, 1), is_sharded, step)
    tokens = step.tokens_per_device
    sent = tokens * variant.exchanged * step.weight_bytes
    exchanged = all_to_all(sent, sharing, hardware.node_devices)
    return StepCost(
        devices=devices,
        tokens=tokens * devices,
        memory=_memory(variant, devices, is_sharded, step),
        reduced=reduced,
        exchanged=exchanged,
        compute_s=compute_seconds(variant, step, hardware),
        communication_s=(reduced + exchanged).seconds(hardware),
    )


def compute_seconds(variant: Variant, step: Step, hardware: Hardware) -> float:
    """FLOPs of a device over the FLOP/s that it achieves, those in matrices that experts share times their overhead.

    Args:
        variant: What is trained.
        step: Its tokens and overheads.
        hardware: The device.
    """
    overhead = step.balanced_overhead if variant.multiplied_out else step.extended_overhead
    shared = step.tokens_per_device * variant.shared_flops + variant.rebuild_flops
    flops = step.tokens_per_device * variant.plain_flops + overhead * shared
    return flops / (hardware.device_flops * hardware.achieved)


def _sharing(variant: Variant, devices: int, step: Step) -> int:
    """p: the devices over which one set of experts is divided, 1 if they are not."""
    return min(step.expert_devices or variant.experts, variant.experts, devices)


def _reduced(
    parameters: float, trained: float, devices: float, node_devices: float, is_sharded: bool, step: Step
) -> Traffic:
    """Copies: an all-reduce of the gradients. Shards: weights gathered for forward and backward, gradients reduced.

    Source: ZeRO, §7: 2 and 3 times the parameters.
    """
    gradients = trained * step.gradient_bytes
    if not is_sharded:
        return all_reduce(gradients, devices, node_devices)
    gathered = reduce_scatter(parameters * step.weight_bytes, devices, node_devices)
    return gathered + gathered + reduce_scatter(gradients, devices, node_devices)


def _memory(variant: Variant, devices: int, is_sharded: bool, step: Step) -> float:
    """Bytes of a device: states, a gathered layer, a multiplied-out layer, and one input of every block for each token.

    Source: ZeRO, §3.1 (states); Korthikanti et al., Reducing Activation Recomputation, 2022, table 2: with full
        recomputation only the blocks' inputs are kept.
    """
    shape, sharing = variant.shape, _sharing(variant, devices, step)
    trained_bytes = step.gradient_bytes + step.optimizer_bytes
    states = variant.parameters * step.weight_bytes + variant.trained * trained_bytes
    experts = variant.expert_parameters * (step.weight_bytes + trained_bytes)
    gathered = 0.0
    if is_sharded and devices > 1:
        gathered = (variant.parameters + variant.expert_parameters / sharing) / shape.blocks * step.weight_bytes
    multiplied_out = variant.multiplied_out * (step.weight_bytes + step.gradient_bytes)
    inputs = step.tokens_per_device * shape.d_model * shape.blocks / len(shape.stacks) * step.weight_bytes
    shards, expert_shards = (devices, devices) if is_sharded else (1, sharing)
    return states / shards + experts / expert_shards + gathered + multiplied_out + inputs


def _require_positive(values: Hardware | Step) -> None:
    for one in dataclasses.fields(values):
        value = getattr(values, one.name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{one.name} must be > 0 and finite; got {value}")
