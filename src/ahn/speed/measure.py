"""How long reading and writing take in every arm, next to what the hardware allows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ahn.attachment import attachment_of
from ahn.cost import Cost, Counting, cost_model
from ahn.evaluation.arm_names import find_arm
from ahn.generation import automatic_chunk
from ahn.quantization import QuantizedLinear
from ahn.speed import llama
from ahn.speed.baselines import ArmBaseline, Baseline, FullBaseline, bare_copy
from ahn.speed.timing import Machine, Spread, interleave, measure_machine, ratio, spread


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one arm takes at one context.

    Attributes:
        arm: Name of the arm.
        context: Tokens read before.
        seconds: Time of one token.
        of_first: Time of the first arm over the time of this one.
        floor: Least time of one token on this hardware: the bytes that must move over the bandwidth, or the FLOPs over
            the rate, whichever is more; in seconds.
        cache_bytes: Bytes that its cache holds.
    """

    arm: str
    context: int
    seconds: Spread
    of_first: Spread
    floor: float
    cache_bytes: int


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        machine: What the hardware can do.
        chunk: Tokens of a forward pass when reading.
        decoding: Timings of writing one token.
        reading: Timings of reading, per token of a chunk.
    """

    machine: Machine
    chunk: int
    decoding: list[Timing]
    reading: list[Timing]

    def find(self, kind: str, arm: str, context: int) -> Timing:
        """One timing of `decoding` or `reading`."""
        rows: list[Timing] = getattr(self, kind)
        return next(row for row in rows if (row.arm, row.context) == (arm, context))


def measure(
    model: Any,
    arms: Sequence[str],
    contexts: Sequence[int],
    rounds: int,
    reading_rounds: int | None = None,
    on_round: Callable[[], None] | None = None,
) -> Speed:
    """Times every arm at every context, all arms taking turns.

    Args:
        model: A model with a memory attached, whose current settings hold.
        arms: Names of the arms, as for `baselines`; the first is what the others are compared with.
        contexts: Numbers of tokens read before.
        rounds: Turns of each arm.
        reading_rounds: Turns of each arm for reading, which takes longer; as many if left out.
        on_round: Called after every round; decoding and reading have one more each that does not count.
    """
    machine = measure_machine(model.device, model.dtype)
    weights = _weight_bytes(model)
    config = dataclasses.replace(
        attachment_of(model).config, window=(now := attachment_of(model).settings).window, sinks=now.sinks
    )
    counted = cost_model(model.config, config, dtype=model.dtype)
    base, chunk = bare_copy(model), automatic_chunk(model)
    decoding: list[Timing] = []
    reading: list[Timing] = []
    for context in contexts:
        compared = baselines(base, model, list(arms), context)
        taken = interleave({arm: baseline.decode for arm, baseline in compared.items()}, rounds, on_round)
        floors = {
            arm: _decoding_floor(counted, machine, arm, baseline, context, weights)
            for arm, baseline in compared.items()
        }
        decoding += _timings(compared, taken, 1, context, floors)
        taken = interleave(
            {arm: _reads(baseline, chunk) for arm, baseline in compared.items()}, reading_rounds or rounds, on_round
        )
        floors = {arm: _reading_floor(counted, machine, arm, context, chunk) for arm in compared}
        reading += _timings(compared, taken, chunk, context, floors)
    return Speed(machine, chunk, decoding, reading)


def baselines(base: Any, model: Any, arms: Sequence[str], context: int) -> dict[str, Baseline]:
    """A baseline for each arm, by its name, `full` being the base model with nothing attached.

    Args:
        base: The base model, as `bare_copy` gives it.
        model: The same with a memory attached.
        arms: Names of the arms, as for `ahn.evaluation.arm_names.find_arm`, or "llama.cpp"; `tail` is none that is
            timed.
        context: Tokens read.

    Raises:
        ModelError: llama.cpp is asked for and cannot read the model.
    """
    by_arm: dict[str, Baseline] = {}
    for arm in arms:
        if arm == llama.NAME:
            by_arm[arm] = llama.LlamaBaseline(llama.find_gguf(model), context, torch.get_num_threads())
        else:
            by_arm[arm] = FullBaseline(base, model, context) if arm == "full" else ArmBaseline(model, arm, context)
    return by_arm


def read_seconds(timings: Sequence[Timing], arm: str, tokens: int) -> float:
    """Seconds to read a text of this length, from the time per token at the measured contexts.

    The time of a token is taken to change linearly between two contexts, and not at all before the first and after
    the last.

    Args:
        timings: Timings of reading.
        arm: Name of the arm.
        tokens: Tokens of the text.
    """
    points = sorted((row.context, row.seconds.median) for row in timings if row.arm == arm)
    points = [(0, points[0][1]), *points, (max(tokens, points[-1][0]), points[-1][1])]
    total = 0.0
    for (start, first), (end, last) in itertools.pairwise(points):
        if (stop := min(end, tokens)) > start:
            reached = first + (last - first) * (stop - start) / (end - start)
            total += (stop - start) * (first + reached) / 2
    return total


def _reads(baseline: Baseline, chunk: int) -> Callable[[], float]:
    return lambda: baseline.read(chunk)


def _timings(
    compared: dict[str, Baseline], taken: dict[str, list[float]], tokens: int, context: int, floors: dict[str, float]
) -> list[Timing]:
    each = {arm: [seconds / tokens for seconds in all_] for arm, all_ in taken.items()}
    first = next(iter(each.values()))
    return [
        Timing(arm, context, spread(own), ratio(first, own), floors[arm], compared[arm].cache_bytes)
        for arm, own in each.items()
    ]


def _weight_bytes(model: Any) -> float:
    """Bytes of a weight of the base model, on average: those of its maps, in few bits or not."""
    numbers = nbytes = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            numbers += module.weight.numel()
            nbytes += sum(buffer.nbytes for buffer in module.stored.buffers())
        elif isinstance(module, torch.nn.Linear):
            numbers += module.weight.numel()
            nbytes += module.weight.nbytes
    return nbytes / max(1, numbers)


def _decoding_floor(
    counted: Counting, machine: Machine, arm: str, baseline: Baseline, context: int, weight_bytes: float
) -> float:
    """Every weight that a token passes, the cache, and what is written of it, once; or the FLOPs."""
    base = counted.base
    weights = base.mixer_weights + base.other_weights + base.vocabulary_weights
    cost = _cost(counted, arm, context)
    moved = weights * weight_bytes + cost.parameters * base.dtype.itemsize + baseline.cache_bytes
    return max(moved / machine.bandwidth, cost.token_flops / machine.flops)


def _reading_floor(counted: Counting, machine: Machine, arm: str, context: int, chunk: int) -> float:
    """FLOPs of a token of a chunk."""
    more, less = (_cost(counted, arm, tokens).prefill_flops for tokens in (context + chunk, context))
    return (more - less) / chunk / machine.flops


def _cost(counted: Counting, arm: str, context: int) -> Cost:
    """What the cost model knows of an arm; anchors, which it does not count, are few against the window."""
    method = "full" if arm == llama.NAME else find_arm(arm).method
    name = {"ahn": counted.base.attachment.config.memory, "ct_max": "ct", "ct_mean": "ct"}.get(method, method)
    return counted.at(context)[name]
