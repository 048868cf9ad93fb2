"""`--convention paper` against every cell of the paper's printed tables, and where these contradict themselves."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import pytest
import torch

from ahn.cost import Counting, cost_model
from ahn.cost.counting import Cost, parameters
from ahn.cost.formatting import fixed
from tests.tiny import tiny

CONTEXT, SINKS, WINDOW = 128_000, 128, 32_640
SIZES = ("3b", "7b", "14b")
PUBLISHED = ("mamba2", "delta_net", "gated_delta_net")

# Token mixers and whole model in 1e15 FLOPs with their share of full in percent, cache in GB with its share.
PRINTED: dict[str, dict[str, tuple[str, ...]]] = {
    "3b": {
        "full": ("2.50", "", "3.29", "", "9.44", ""),
        "window": ("1.17", "46.6", "1.95", "59.3", "2.42", "25.6"),
        "ct": ("1.18", "47.1", "1.96", "59.7", "2.45", "26.0"),
        **dict.fromkeys(PUBLISHED, ("1.17", "46.7", "1.95", "59.4", "2.45", "26.0")),
    },
    "7b": {
        "full": ("3.23", "", "4.87", "", "14.7", ""),
        "window": ("1.55", "48.0", "3.19", "65.5", "3.76", "25.6"),
        "ct": ("1.57", "48.5", "3.20", "65.8", "3.81", "26.0"),
        **dict.fromkeys(PUBLISHED, ("1.56", "48.2", "3.19", "65.6", "3.81", "26.0")),
    },
    "14b": {
        "full": ("8.83", "", "11.83", "", "50.33", ""),
        "window": ("4.37", "49.5", "7.38", "62.3", "12.88", "25.6"),
        "ct": ("4.40", "49.8", "7.41", "62.6", "13.01", "25.9"),
        **dict.fromkeys(PUBLISHED, ("4.38", "49.7", "7.39", "62.4", "13.01", "25.9")),
        "gated_delta_net": ("4.38", "49.7", "7.39", "62.5", "13.01", "25.9"),
    },
}
PRINTED_PARAMETERS = {  # millions
    "3b": {"mamba2": "11.9", "delta_net": "11.8", "gated_delta_net": "13.0"},
    "7b": {"mamba2": "18.6", "delta_net": "18.5", "gated_delta_net": "21.3"},
    "14b": {"mamba2": "51.4", "delta_net": "51.1", "gated_delta_net": "61.0"},
}
COLUMNS = ("mixer", "mixer share", "model", "model share", "cache", "cache share")

# What the paper's formula gives where its 7B column holds something else. No sizes that were tried explain it
# (docs/log.md): its FLOPs are 0.92 (mixers) and 0.94 (the rest) of what the 28 layers of this shape take.
CONTRADICTED = {
    ("7b", "full"): {"mixer": "3.50", "model": "5.24"},
    ("7b", "window"): {"mixer": "1.68", "model": "3.42", "model share": "65.2"},
    ("7b", "ct"): {"mixer": "1.70", "model": "3.43", "model share": "65.6"},
    **{
        ("7b", memory): {"mixer": "1.68", "mixer share": "48.1", "model": "3.42", "model share": "65.4"}
        for memory in PUBLISHED
    },
}
CELLS = [
    (size, way, column, printed)
    for size in SIZES
    for way, cells in PRINTED[size].items()
    for column, printed in zip(COLUMNS, cells, strict=True)
    if printed
]


@cache
def model(size: str) -> Counting:
    return cost_model(f"qwen2.5-{size}", convention="paper")


@cache
def costs(size: str) -> dict[str, Cost]:
    return model(size).at(CONTEXT)


def cell(size: str, way: str, column: str, digits: int) -> str:
    """A cell of the table as the cost model has it."""
    quantity, _, share = column.partition(" ")
    name, unit = {
        "mixer": ("mixer_flops", 10**15),
        "model": ("prefill_flops", 10**15),
        "cache": ("cache_bytes", 10**9),
    }[quantity]
    value = getattr(costs(size)[way], name)
    if share:
        return fixed(Fraction(100 * value, getattr(costs(size)["full"], name)), digits)
    return fixed(Fraction(value, unit), digits)


@pytest.mark.parametrize(("size", "way", "column", "printed"), CELLS, ids=[f"{s}-{w}-{c}" for s, w, c, _ in CELLS])
def test_every_printed_cell(size: str, way: str, column: str, printed: str) -> None:
    ours = cell(size, way, column, digits=len(printed.partition(".")[2]))
    contradicted = CONTRADICTED.get((size, way), {}).get(column)
    if contradicted is None:
        assert ours == printed
    else:
        assert ours == contradicted != printed


@pytest.mark.parametrize("size", SIZES)
def test_the_settings_are_those_of_the_paper(size: str) -> None:
    config = model(size).base.attachment.config
    assert (config.sinks, config.window) == (SINKS, WINDOW)
    assert model(size).slots == ({"3b": 512, "7b": 448, "14b": 320}[size],) * 2


@pytest.mark.parametrize("memory", PUBLISHED)
@pytest.mark.parametrize("size", SIZES)
def test_printed_parameters(size: str, memory: str) -> None:
    added, printed = costs(size)[memory].parameters, PRINTED_PARAMETERS[size][memory]
    assert fixed(Fraction(added, 10**6), 1) == printed
    if memory == "gated_delta_net":  # published with a parameter D that nothing reads, which does not show either
        layers = model(size).base.attachment.layers
        stored = added + sum(layer.shape.query_heads for layer in layers)
        assert fixed(Fraction(stored, 10**6), 1) == printed


@pytest.mark.parametrize("size", SIZES)
class TestTable1:
    """The formulas of table 1, per layer: D hidden size, H head size, Nq and Nkv heads, W with the sinks."""

    def test_parameters(self, size: str) -> None:
        D, H, Nq, Nkv = sizes(size)
        base = model(size).base
        assert base.mixer_weights == layers(size) * 2 * D * H * (Nq + Nkv)
        memory = base.memories["gated_delta_net", base.attachment.layers[0].shape]
        vectors = 2 * Nq + H  # decay and step per head, and the norm, which the table leaves out
        assert parameters(memory) == 3 * D * Nq + H**2 * Nq + vectors

    def test_cache(self, size: str) -> None:
        _, H, Nq, Nkv = sizes(size)
        full, memory = (costs(size)[way].cache_bytes for way in ("full", "gated_delta_net"))
        assert full == 4 * layers(size) * 2 * CONTEXT * H * Nkv
        assert memory == 4 * layers(size) * (2 * (SINKS + WINDOW) * H * Nkv + H**2 * Nq)

    def test_flops(self, size: str) -> None:
        D, H, Nq, Nkv = sizes(size)
        L, W = CONTEXT, SINKS + WINDOW
        full, memory = (costs(size)[way].mixer_flops for way in ("full", "gated_delta_net"))
        assert full == layers(size) * (4 * L * D * H * (Nq + Nkv) + 2 * H * Nq * L**2)
        table_1 = (
            4 * L * D * H * (Nq + Nkv)
            + 2 * H * Nq * W**2
            + 2 * (L - W) * (2 * W * H * Nq + H**2 * Nq + 3 * D * Nq + H**2 * Nq)
        )
        output_gate = 2 * (L - W) * D * Nq
        assert memory == layers(size) * (table_1 - output_gate)


def test_the_printed_totals_leave_the_output_gate_out() -> None:
    """With it, as in table 1, three cells of the 14B model would differ; its effect on the others is below a digit."""
    size, full = "14b", costs("14b")["full"]
    D, _, Nq, _ = sizes(size)
    gate = layers(size) * 2 * (CONTEXT - SINKS - WINDOW) * D * Nq
    with_gate = {
        memory: (costs(size)[memory].mixer_flops + gate, costs(size)[memory].prefill_flops + gate)
        for memory in PUBLISHED
    }
    assert fixed(Fraction(with_gate["gated_delta_net"][0], 10**15), 2) == "4.39" != PRINTED[size]["gated_delta_net"][0]
    for memory in ("mamba2", "delta_net"):
        assert fixed(Fraction(100 * with_gate[memory][1], full.prefill_flops), 1) == "62.5" != PRINTED[size][memory][3]


def test_notes_say_where_the_paper_contradicts_itself() -> None:
    notes = {size: " ".join(model(size).notes) for size in SIZES}
    assert "7B: the paper prints other FLOPs" in notes["7b"]
    assert "output gate" in notes["14b"]
    assert "7B" not in notes["3b"] + notes["14b"]


def test_one_further_token_is_the_difference_of_two_contexts() -> None:
    before, after = (model("3b").at(tokens) for tokens in (CONTEXT, CONTEXT + 1))
    for way, cost in before.items():
        assert cost.token_flops == after[way].prefill_flops - cost.prefill_flops


def test_up_to_the_window_all_ways_cost_the_same() -> None:
    short = model("3b").at(SINKS + WINDOW)
    assert {(cost.prefill_flops, cost.cache_bytes) for cost in short.values()} == {
        (short["full"].prefill_flops, short["full"].cache_bytes)
    }


def test_four_bytes_whatever_the_dtype() -> None:
    config = tiny("qwen3").config
    first, second = (cost_model(config, convention="paper", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert first.at(1000) == second.at(1000)


def sizes(size: str) -> tuple[int, int, int, int]:
    """D, H, Nq and Nkv."""
    shape = model(size).base.attachment.layers[0].shape
    return shape.hidden_size, shape.key_size, shape.query_heads, shape.kv_heads


def layers(size: str) -> int:
    return len(model(size).base.attachment.layers)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (Fraction(2595, 100), 1, "26.0"),
        (Fraction(2585, 100), 1, "25.9"),
        (0, 2, "0.00"),
        (Fraction(12345678, 10), 1, "1,234,567.8"),
    ],
)
def test_halves_are_rounded_up(value: Fraction, digits: int, text: str) -> None:
    assert fixed(value, digits) == text
