"""`--convention actual` against what real models compute and real caches hold, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import ahn
from ahn.attachment import attachment_of
from ahn.backbone.survey import PROBE, find_backbone, implementation
from ahn.cache.compressive import POOLED
from ahn.cost import Counting, cost_model, read_base
from ahn.cost.counting import slots_read, state_numbers
from ahn.errors import ConfigError, ModelError
from ahn.generation import cache_bytes
from tests.tiny import FAMILIES, MEMORIES, text, tiny

SINKS, WINDOW = 5, 100
EXACT = SINKS + WINDOW
CONTEXTS = (3, 70, EXACT - 1, EXACT, EXACT + 1, 160)
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 1}
DTYPES = (torch.float32, torch.bfloat16)


def config(**changes: Any) -> ahn.AHNConfig:
    return ahn.AHNConfig(**{"window": WINDOW, "sinks": SINKS, **changes})


def held(model: Any, tokens: int) -> int:
    """Bytes of a cache that has read a text in one go."""
    cache = ahn.HippocampalCache(model)
    model(text(1, tokens), cache=cache)
    return cache.nbytes


@torch.no_grad()
def check_bytes(model: Any, counted: Counting, memory: str, contexts: tuple[int, ...] = CONTEXTS) -> None:
    for tokens in contexts:
        costs = counted.at(tokens)
        assert held(model, tokens) == costs[memory].cache_bytes, f"{memory}, {tokens} tokens"
        with ahn.mode(model, "window"):
            assert held(model, tokens) == costs["window"].cache_bytes, f"window, {tokens} tokens"
        with ahn.mode(model, "ct_max"):
            assert held(model, tokens) == costs["ct"].cache_bytes, f"ct, {tokens} tokens"
        with ahn.mode(model, "full"):
            cache = transformers.DynamicCache(config=model.config)
            model(text(1, tokens), cache=cache)
            assert cache_bytes(cache) == costs["full"].cache_bytes, f"full, {tokens} tokens"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_bytes_are_those_of_real_caches(family: str, memory: str, dtype: torch.dtype) -> None:
    model = tiny(family, **({"sliding_window": 40} if family == "gemma2" else {})).to(dtype)
    ahn.attach(model, config(memory=memory))
    check_bytes(model, cost_model(model.config, config(memory=memory), dtype=dtype), memory)


def test_one_kv_head_for_all(memory: str) -> None:
    model = tiny("qwen3", **GROUPED)
    ahn.attach(model, config(memory=memory))
    counted = cost_model(model.config, config(memory=memory))
    check_bytes(model, counted, memory)
    assert counted.base.attachment.layers[0].shape.kv_heads == 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3"])
def test_what_is_kept_to_undo_positions(family: str, memory: str) -> None:
    """A memory without positions keeps where a token stood, in the layers that rotate."""
    settings = config(memory=memory, memory_positions="none")
    model = tiny(family)
    ahn.attach(model, settings)
    counted = cost_model(model.config, settings)
    check_bytes(model, counted, memory)
    served = sum(layer.rotation is not None for layer in attachment_of(model).layers)
    more = counted.at(160)[memory].cache_bytes - cost_model(model.config, config()).at(160)[memory].cache_bytes
    assert more == 4 * EXACT * served
    assert served == (2 if family == "smollm3" else 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_are_kept_where_frequencies_follow_the_length(dtype: torch.dtype) -> None:
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    settings = config(memory_positions="none")
    model = tiny("llama", **dynamic).to(dtype)
    ahn.attach(model, settings)
    check_bytes(model, cost_model(model.config, settings, dtype=dtype), "gated_delta_net")


def test_layers_that_slide_or_keep_full_attention() -> None:
    model = tiny("gemma3_text", sliding_window=40)
    for chosen in (config(), config(layers=(1,)), config(layers=(0, 1))):
        with ahn.attached(model, chosen):
            check_bytes(model, cost_model(model.config, chosen), "gated_delta_net")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_alone_says_what_attaching_finds(family: str) -> None:
    model = tiny(family)
    counted = cost_model(model.config, ahn.AHNConfig(window=16, sinks=5))
    base, costs = counted.base, counted.at(100)
    assert base.parameters == sum(parameter.numel() for parameter in model.parameters())
    for memory in MEMORIES:
        with ahn.attached(model, ahn.AHNConfig(memory, window=16, sinks=5)):
            real = attachment_of(model)
            for mine, theirs in zip(base.attachment.layers, real.layers, strict=True):
                assert (mine.shape, mine.sliding_window) == (theirs.shape, theirs.sliding_window)
                assert (mine.memory is None) == (theirs.memory is None)
            added = sum(
                p.numel() for layer in real.layers if layer.memory is not None for p in layer.memory.parameters()
            )
            assert costs[memory].parameters == added
            assert base.attachment.position_limit == real.position_limit


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gptj", "codegen", "deepseek_v3"}))
def test_layers_that_rotate_are_found_without_weights(family: str) -> None:
    model, settings = tiny(family), ahn.AHNConfig(window=16, sinks=5, memory_positions="none")
    base = read_base(model.config, settings)
    with ahn.attached(model, settings):
        real = [layer.rotation is not None for layer in attachment_of(model).layers]
    assert [layer.rotation is not None for layer in base.attachment.layers] == real


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "phi3", "mixtral", "qwen3_moe", "gpt_oss"])
def test_weights_that_a_token_passes(family: str) -> None:
    """Against the products that torch counts in a real model whose attention does no products of its own."""
    model, tokens = tiny(family), 12
    base = read_base(model.config)
    backbone = find_backbone(model)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    with implementation(backbone, PROBE), FlopCounterMode(display=False) as counter:
        model(text(1, tokens), use_cache=False)
    counts = counter.get_flop_counts()
    rotations = sum(sum(each.values()) for name, each in counts.items() if name.endswith("rotary_emb"))
    weights = base.mixer_weights + base.other_weights + base.vocabulary_weights
    assert counter.get_total_flops() - rotations == 2 * tokens * weights


@pytest.mark.parametrize("tokens", [1, 20, 21, 22, 23, 60, 200])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_flops_token_by_token(family: str, tokens: int) -> None:
    """The closed formulas against a loop over the queries."""
    counted = cost_model(tiny(family).config, ahn.AHNConfig(window=16, sinks=5))
    costs = counted.at(tokens)
    for way, cost in costs.items():
        by_token = [token_flops(counted, way, token) for token in range(tokens + 1)]
        assert cost.mixer_flops == sum(by_token[:tokens])
        others, vocabulary = 2 * counted.base.other_weights, 2 * counted.base.vocabulary_weights
        assert cost.prefill_flops == cost.mixer_flops + tokens * others + vocabulary
        assert cost.token_flops == by_token[tokens] + others + vocabulary


def token_flops(counted: Counting, way: str, token: int) -> int:
    """FLOPs of the attention layers for one token, the first being number 0."""
    total = 2 * counted.base.mixer_weights
    for layer, count in counted.base.layers:
        shape, served = layer.shape, layer.memory is not None and way != "full"
        reach = 21 if served else layer.sliding_window or 10**9
        keys, evicted = min(token + 1, reach), max(0, token + 1 - reach)
        if way == "ct" and served:
            keys += min(evicted // POOLED, counted.slots[0])
        flops = shape.query_heads * 2 * (shape.key_size + shape.value_size) * keys
        memory = counted.base.memories.get((way, shape)) if served else None
        if memory is not None:
            gates = len(memory.projections) * shape.hidden_size * shape.query_heads
            flops += 2 * gates
            if evicted:
                output_gate = shape.hidden_size * shape.query_heads
                scan = memory.state_products * state_numbers(memory) + memory.write_products
                flops += 2 * (scan + output_gate + memory.o_proj.numel())
        total += count * flops
    return total


@pytest.mark.parametrize("slots", [0, 1, 3, 50])
def test_slots_that_queries_read(slots: int) -> None:
    for evicted in range(40):
        assert slots_read(evicted, slots) == sum(min(slots, token // POOLED) for token in range(1, evicted + 1))


@pytest.mark.parametrize(
    ("named", "state"), [("gated_delta_net", 4 * 8 * 8), ("mamba2", 4 * 8 * 8), ("linearized_attention", 4 * 9 * 9)]
)
def test_slots_fill_the_bytes_of_a_state_of_the_memory_named(named: str, state: int) -> None:
    for dtype in DTYPES:
        counted = cost_model(tiny("qwen3").config, config(memory=named), dtype=dtype)
        costs, (slots, _) = counted.at(100_000), counted.slots
        slot = 2 * 2 * 8 * dtype.itemsize
        assert slots == 4 * state // slot
        assert any(f"of {slots} slots" in note and f"a state of {named}." in note for note in counted.notes)
        held_back = POOLED - 1  # tokens that wait for the rest of their group
        assert costs["ct"].cache_bytes - costs["window"].cache_bytes == 3 * (slots + held_back) * slot
        before = counted.at(EXACT)
        assert before["ct"].cache_bytes == before["window"].cache_bytes


def test_the_config_given_is_not_changed() -> None:
    given = tiny("qwen3").config
    before = given.to_dict()
    cost_model(given, config(), dtype="bfloat16").at(10)
    assert given.to_dict() == before


def test_dtype_of_the_config() -> None:
    given = tiny("qwen3").config
    assert cost_model("qwen2.5-3b", config()).base.dtype is torch.bfloat16
    given.dtype = torch.float16
    for dtype in (None, "auto"):
        assert cost_model(given, config(), dtype=dtype).base.dtype is torch.float16
    given.dtype = None
    assert cost_model(given, config()).base.dtype is torch.float32


@pytest.mark.parametrize(
    ("family", "settings", "context", "error", "says"),
    [
        ("llama", {}, 0, ConfigError, "context must be at least 1 token"),
        ("gpt2", {}, 600, ConfigError, "positions for 512 tokens only"),
        ("llama", {"layers": (7,)}, 10, ConfigError, "the model's last layer is 2"),
        ("gemma2", {"layers": (0,), "sinks": 30}, 10, ConfigError, "leave no window in layer 0"),
    ],
)
def test_wrong_settings(family: str, settings: dict[str, Any], context: int, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        cost_model(tiny(family).config, config(**settings)).at(context)


def test_unknown_convention_dtype_and_model() -> None:
    given = tiny("llama").config
    with pytest.raises(ConfigError, match="convention must be one of actual, paper, not 'guess'"):
        cost_model(given, convention="guess")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="'int8' is no dtype for a model"):
        cost_model(given, dtype="int8")
    with pytest.raises(ModelError, match=r"no model named 'qwen2\.5-4b'\. Did you mean 'qwen2\.5-"):
        cost_model("qwen2.5-4b")


@pytest.mark.parametrize("family", ["falcon", "mpt"])
def test_a_model_that_cannot_be_given_a_memory(family: str) -> None:
    given = transformers.AutoConfig.for_model(family)
    with pytest.raises(ModelError, match="no memory can be attached to"):
        cost_model(given)
