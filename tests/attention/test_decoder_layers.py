"""Decoder layers left to the kernels: they give what the layers' own code gives, and step back for whatever it does."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import ahn
from ahn import native
from ahn.attention import decoder_layers, decoder_run
from ahn.attention.decoder_layers import KernelForward
from ahn.attention.decoder_run import FastPath
from ahn.attention.recording import record_layers
from ahn.cache.layer_kinds import layer_tensors
from ahn.errors import ShapeError
from ahn.native.layer import DescribedLayer
from ahn.quantization import QUANTIZE, quantize_model
from tests.tiny import awaken, text, tiny

needs_kernels = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")
pytestmark = needs_kernels
WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 40}
SINKS, WINDOW, START, END = 3, 12, 20, 46
JOINED = "gated_delta_net+linearized_attention"
outputs_of_every_kind = pytest.mark.parametrize(
    "memory", ["gated_delta_net", "linearized_attention", JOINED, "linearized_attention+mamba2"]
)


def model_of(family: str = "llama", quantize: str | None = None, memory: str = "gated_delta_net", **sizes: Any) -> Any:
    torch.manual_seed(0)
    model = tiny(family, **{**WIDE, **sizes})
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, 0.7, 0.3)
    if quantize is not None:
        quantize_model(model, quantize)  # type: ignore[arg-type]
    ahn.attach(model, ahn.AHNConfig(memory, window=WINDOW, sinks=SINKS))
    awaken(model)
    for layer in model.model.layers:
        for parameter in layer.self_attn.memory.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn(len(parameter))
    return model


@contextmanager
def own_code(model: Any) -> Iterator[None]:
    """Layers run their own code inside the block; what is known of them stays as it was."""
    layers = [layer for layer in model.modules() if isinstance(vars(layer).get("forward"), KernelForward)]
    forwards = [vars(layer).pop("forward") for layer in layers]
    try:
        yield
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward


def decoded(model: Any, ids: torch.Tensor | None = None, start: int = START, **given: Any) -> tuple[torch.Tensor, Any]:
    """Logits of tokens that are read one by one, and the cache."""
    ids = text(1, END) if ids is None else ids
    cache = ahn.HippocampalCache(model)
    with torch.no_grad():
        model(ids[:, :start], cache=cache)
        tokens = ids[:, start:].split(1, dim=1)
        return torch.cat([model(token, cache=cache, **given).logits for token in tokens], 1), cache


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the layers that the kernels ran."""
    seen: list[int] = []
    run = decoder_layers.run_paths

    def noted(paths: list[FastPath], *args: Any) -> Any:
        seen.extend(path.index for path in paths)
        return run(paths, *args)

    monkeypatch.setattr(decoder_layers, "run_paths", noted)
    return seen


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Indices of the layers of each call of the kernels."""
    seen: list[list[int]] = []
    run = decoder_layers.run_paths

    def noted(paths: list[FastPath], *args: Any) -> Any:
        seen.append([path.index for path in paths])
        return run(paths, *args)

    monkeypatch.setattr(decoder_layers, "run_paths", noted)
    return seen


def check(model: Any, runs: list[int], taken: int, **given: Any) -> None:
    """Both ways give the same, and the kernels run so many layers of every token once they were verified."""
    with own_code(model):
        expected, before = decoded(model, **given)
    assert not runs
    decoded(model, **given)
    runs.clear()
    got, after = decoded(model, **given)
    torch.testing.assert_close(got, expected, atol=2e-5 * float(expected.abs().max()), rtol=2e-5)
    assert len(runs) == taken * (END - START)
    for mine, other in zip(before.layers, after.layers, strict=True):
        expected_tensors = layer_tensors(mine)
        for name, tensor in layer_tensors(other).items():
            torch.testing.assert_close(tensor, expected_tensors[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "quantize"),
    [*(("llama", quantize) for quantize in (None, *QUANTIZE)), ("qwen2", "int8"), ("qwen3", None), ("mistral", "bf16")],
)
@pytest.mark.parametrize("memory", ["gated_delta_net", JOINED])
def test_gives_what_the_layers_give(family: str, quantize: str | None, memory: str, runs: list[int]) -> None:
    check(model_of(family, quantize, memory), runs, taken=3)


def test_every_memory(memory: str, runs: list[int]) -> None:
    model = model_of(memory=memory)
    with ahn.mode(model, "ahn", sink_positions="bounded"):
        check(model, runs, taken=3)


@outputs_of_every_kind
def test_memories_that_share_the_layers(memory: str, runs: list[int], spans: list[list[int]]) -> None:
    model = model_of(memory=memory)
    kinds = {type(layer.self_attn.memory) for layer in model.model.layers}
    assert len(kinds) == 1 + memory.count("+")
    with ahn.mode(model, "ahn", sink_positions="bounded"):
        check(model, runs, taken=3)
    assert spans[-1] == [0, 1, 2]


@pytest.mark.parametrize("settings", [{}, {"sinks": 0}, {"window": 300}, {"window": 1}], ids=str)
@pytest.mark.parametrize("memory", ["gated_delta_net", JOINED])
def test_spans(memory: str, settings: dict[str, Any], runs: list[int]) -> None:
    model = model_of(memory=memory)
    for mode in ("ahn", "window"):
        runs.clear()
        with ahn.mode(model, mode, **settings):  # type: ignore[arg-type]
            check(model, runs, taken=3)


@pytest.mark.parametrize("settings", [{}, {"sink_positions": "bounded"}], ids=str)
@pytest.mark.parametrize("memory", ["gated_delta_net", "linearized_attention", JOINED])
def test_anchors(memory: str, settings: dict[str, Any], runs: list[int]) -> None:
    model = model_of(memory=memory)
    with ahn.mode(model, "ahn", anchors=4, anchor_score="key_norm", anchor_layers=[1], **settings):
        with own_code(model):
            expected, before = decoded(model)
        got, after = decoded(model)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert before.anchor_tokens == after.anchor_tokens
    assert set(runs) == {0, 1, 2}


@outputs_of_every_kind
@torch.no_grad()
def test_float64(memory: str, runs: list[int]) -> None:
    model = model_of("qwen3", memory=memory)
    exact = copy.deepcopy(model).double()
    got, _ = decoded(model)
    expected, _ = decoded(exact)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)
    assert runs


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "relu"])
def test_activations(activation: str, runs: list[int]) -> None:
    check(model_of(hidden_act=activation), runs, taken=3 if activation != "relu" else 0)


@pytest.mark.parametrize(
    ("family", "taken"),
    [("gemma2", 0), ("olmo2", 0), ("granite", 0), ("glm4", 0), ("gpt2", 0), ("phi3", 0), ("smollm3", 2)],
)
def test_layers_of_another_build_run_their_own_code(family: str, taken: int, runs: list[int]) -> None:
    torch.manual_seed(0)
    wide = {} if family in ("gpt2", "gemma2", "glm4") else {**WIDE, "head_dim": None, "num_attention_heads": 4}
    model = tiny(family, **wide)
    ahn.attach(model, ahn.AHNConfig(window=8, sinks=2))
    decoded(model)
    assert len(runs) == taken * (END - START - 2)  # all but those that were compared, the first and that at 32


class TestRunAhead:
    """Layers that follow each other run in one call, and only what the model then really gives them counts."""

    def test_all_layers_at_once(self, spans: list[list[int]]) -> None:
        decoded(model_of())
        assert spans[-1] == [0, 1, 2]

    @pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
    @pytest.mark.parametrize("change", ["replaced", "in place"])
    @pytest.mark.parametrize("memory", ["gated_delta_net", JOINED])
    def test_something_comes_between(self, memory: str, change: str, inference: bool, spans: list[list[int]]) -> None:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output * 1.5 if change == "replaced" else output.mul_(1.5)

        model = model_of(memory=memory)
        decoded(model)
        assert spans[-1] == [0, 1, 2]
        model.model.layers[1].register_forward_hook(hook)
        with torch.inference_mode() if inference else torch.no_grad():
            with own_code(model):
                expected, before = decoded(model)
            got, after = decoded(model)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        for mine, other in zip(before.layers, after.layers, strict=True):
            for name, tensor in layer_tensors(other).items():
                torch.testing.assert_close(tensor, layer_tensors(mine)[name], atol=1e-4, rtol=1e-4)

    @outputs_of_every_kind
    @torch.no_grad()
    def test_a_call_that_fails_in_the_middle(self, memory: str) -> None:
        model, ids = model_of(memory=memory), text(1, END)
        _, cache = decoded(model)
        expected = model(ids[:, :1], cache=cache.fork()).logits
        handle = model.model.layers[0].register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, :1], cache=cache)
        handle.remove()
        assert torch.equal(model(ids[:, :1], cache=cache).logits, expected)

    @pytest.mark.parametrize("score", ["key_norm", "value_norm", "key_diff", "window_attention"])
    @pytest.mark.parametrize("prompt", [4, 30], ids=lambda n: f"{n} read before")
    def test_layers_that_score(self, score: str, prompt: int, spans: list[list[int]]) -> None:
        model = model_of()
        with ahn.mode(model, "ahn", anchors=4, anchor_score=score, anchor_layers=[0, 2]):
            with own_code(model):
                expected, before = decoded(model, start=prompt)
            got, after = decoded(model, start=prompt)
        assert spans[-1] == [0, 1, 2]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert before.anchor_tokens == after.anchor_tokens
        for name, tensor in after.scoreboard.stored.items():
            torch.testing.assert_close(tensor, before.scoreboard.stored[name], atol=1e-4, rtol=1e-4)

    def test_a_model_that_is_gone_takes_its_layers_along(self) -> None:
        model = model_of()
        decoded(model)
        layer = weakref.ref(model.model.layers[1])
        del model
        gc.collect()
        assert layer() is None


class TestStepsBack:
    """What users put on a model acts as it does without kernels."""

    @pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.o_proj", "mlp", "input_layernorm"])
    @pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
    def test_hooks(self, part: str, kind: str, runs: list[int]) -> None:
        model, seen = model_of(), []
        decoded(model)
        runs.clear()
        handle = getattr(model.model.layers[1].get_submodule(part), kind)(lambda *args: seen.append(part))
        decoded(model)
        assert len(seen) == END - START + 1
        assert set(runs) == {0, 2}
        handle.remove()
        runs.clear()
        decoded(model)
        assert set(runs) == {0, 1, 2}

    def test_hooks_on_the_layer_itself(self, runs: list[int]) -> None:
        model = model_of()
        expected, _ = decoded(model)
        runs.clear()
        model.model.layers[1].register_forward_hook(lambda module, args, output: output * 2)
        changed, _ = decoded(model)
        assert set(runs) == {0, 1, 2}
        assert not torch.allclose(changed, expected)

    def test_hooks_on_the_attention_module(self, runs: list[int]) -> None:
        model = model_of()
        decoded(model)
        runs.clear()
        model.model.layers[1].self_attn.register_forward_hook(lambda module, args, output: (output[0] * 2, output[1]))
        runs.clear()
        check(model, runs, taken=2)

    def test_another_module_in_place(self, runs: list[int]) -> None:
        class Doubled(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(x)

        model = model_of()
        decoded(model)
        runs.clear()
        old = model.model.layers[0].self_attn.v_proj
        new = Doubled(old.in_features, old.out_features, bias=False)
        new.load_state_dict(old.state_dict())
        model.model.layers[0].self_attn.v_proj = new
        check(model, runs, taken=2)

    @pytest.mark.filterwarnings("ignore")  # peft asks for names that are deprecated
    def test_an_adapter(self, runs: list[int]) -> None:
        peft = pytest.importorskip("peft")
        model = model_of()
        decoded(model)
        runs.clear()
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        check(model, runs, taken=2)

    def test_other_weights(self, runs: list[int]) -> None:
        model = model_of()
        decoded(model)
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.data = torch.randn_like(layer.mlp.up_proj.weight)
            layer.input_layernorm.weight.data.mul_(1.5)
        runs.clear()
        check(model, runs, taken=3)

    @pytest.mark.parametrize("way", ["parameter", "assign", "data"])
    @pytest.mark.parametrize(
        ("memory", "part"),
        [
            *(("gated_delta_net", part) for part in ("o_norm", "o_proj", "g_proj.weight")),
            *(
                ("linearized_attention", part)
                for part in ("mean_query", "share_key", "size_weight", "match_weight", "exact_weight")
            ),
            ("linearized_attention", "g_proj.bias"),
        ],
    )
    def test_other_weights_of_the_memory(self, memory: str, part: str, way: str, runs: list[int]) -> None:
        model = model_of(memory=memory)
        decoded(model)
        for layer in model.model.layers:
            mine = layer.self_attn.memory
            new = torch.randn_like(mine.get_parameter(part))
            if way == "assign":
                mine.load_state_dict({part: new}, strict=False, assign=True)
            elif way == "data":
                mine.get_parameter(part).data = new
            else:
                owner, _, name = part.rpartition(".")
                setattr(mine.get_submodule(owner), name, nn.Parameter(new))
        runs.clear()
        check(model, runs, taken=3)

    @pytest.mark.parametrize(
        ("memory", "part"), [("gated_delta_net", "o_proj"), *((JOINED, part) for part in ("o_proj", "mean_query"))]
    )
    def test_weights_of_the_memory_that_do_not_lie_dense(self, memory: str, part: str, runs: list[int]) -> None:
        model = model_of(memory=memory)
        mine = model.model.layers[2].self_attn.memory
        setattr(mine, part, nn.Parameter(mine.get_parameter(part).data.mT.contiguous().mT))
        assert not mine.get_parameter(part).is_contiguous()
        check(model, runs, taken=2)

    def test_hooks_on_the_gate_of_linearised_attention(self, runs: list[int]) -> None:
        model, seen = model_of(memory=JOINED), []
        decoded(model)
        runs.clear()
        model.model.layers[2].self_attn.memory.g_proj.register_forward_hook(lambda *args: seen.append(2))
        decoded(model)
        assert seen
        assert not runs

    def test_another_memory_of_a_wrapper(self, runs: list[int]) -> None:
        """As peft's `set_adapter` with `modules_to_save`: the module in the tree stays, another is used."""

        class Wrapper(nn.Module):
            def __init__(self, original: nn.Module) -> None:
                super().__init__()
                self.original_module, self.disable_adapters, self.active_adapters = original, False, ["one"]
                self.modules_to_save = nn.ModuleDict({name: copy.deepcopy(original) for name in ("one", "two")})
                nn.init.normal_(self.modules_to_save["two"].o_proj)

        model = model_of()
        wrappers = [Wrapper(layer.self_attn.memory) for layer in model.model.layers]
        for layer, wrapper in zip(model.model.layers, wrappers, strict=True):
            layer.self_attn.memory = wrapper
        first, _ = decoded(model)
        for wrapper in wrappers:
            wrapper.active_adapters = ["two"]
        runs.clear()
        check(model, runs, taken=3)
        assert (decoded(model)[0] - first).abs().max() > 0.1

    @pytest.mark.parametrize("change", ["attention bias", "mlp bias", "scaling", "epsilon"])
    def test_what_is_set_later(self, change: str, runs: list[int]) -> None:
        model = model_of()
        first, _ = decoded(model)
        layer = model.model.layers[1]
        if change == "attention bias":
            layer.self_attn.o_proj.bias = nn.Parameter(torch.randn(64))
        elif change == "mlp bias":
            layer.mlp.down_proj.bias = nn.Parameter(torch.randn(64))
        elif change == "scaling":
            layer.self_attn.scaling *= 3
        else:
            layer.input_layernorm.variance_epsilon = 1.0
        runs.clear()
        check(model, runs, taken=3)
        assert (decoded(model)[0] - first).abs().max() > 0.1

    def test_a_class_that_computes_otherwise(self, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        model = model_of()
        decoded(model)
        kind = type(model.model.layers[0].mlp)
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda mlp, x: 2 * forward(mlp, x))
        runs.clear()
        check(model, runs, taken=0)

    @pytest.mark.parametrize("place", ["behind", "before"])
    def test_hooks_that_leave_no_trace(self, place: str, spans: list[list[int]], runs: list[int]) -> None:
        def add(x: torch.Tensor) -> None:
            x.data.add_(torch.linspace(-1, 1, 64))

        model = model_of()
        first, _ = decoded(model)
        layers = model.model.layers
        if place == "behind":
            layers[0].register_forward_hook(lambda module, args, output: add(output))
        else:
            layers[1].register_forward_pre_hook(lambda module, args: add(args[0]))
        runs.clear()
        check(model, runs, taken=3)
        assert (decoded(model)[0] - first).abs().max() > 0.1
        spans.clear()
        decoded(model)
        assert {tuple(span) for span in spans} == {(0,), (1, 2)}

    def test_a_hook_that_names_no_module(self, runs: list[int]) -> None:
        model, seen = model_of(), {}
        model.model.layers[1].mlp.register_forward_pre_hook(seen.__setitem__)
        check(model, runs, taken=2)
        assert seen

    def test_positions_that_are_given(self, runs: list[int]) -> None:
        """Sinks are turned by the positions, not by the number of tokens."""
        model, ids, given = model_of(), text(1, 200), torch.arange(200)[None] // 4

        def read() -> torch.Tensor:
            cache, logits = ahn.HippocampalCache(model), []
            with torch.no_grad(), ahn.mode(model, "ahn", sink_positions="bounded"):
                cache = ahn.HippocampalCache(model)
                model(ids[:, :100], position_ids=given[:, :100], cache=cache)
                for token in range(100, 200):
                    step = slice(token, token + 1)
                    logits.append(model(ids[:, step], position_ids=given[:, step], cache=cache).logits)
            return torch.cat(logits, 1)

        with own_code(model):
            expected = read()
        torch.testing.assert_close(read(), expected, atol=2e-5 * float(expected.abs().max()), rtol=2e-5)
        assert runs

    def test_what_begins_later_in_a_text(self, runs: list[int]) -> None:
        """A layer that is as usual up to position 32 is looked at again there."""
        model = model_of(max_position_embeddings=4096)
        kind = type(model.model.layers[1].self_attn)

        class Later(kind):  # type: ignore[misc, valid-type]
            def forward(self, hidden_states: torch.Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
                factor = 2 if int(position_ids.max()) >= 32 else 1
                return super().forward(hidden_states * factor, position_ids=position_ids, **kwargs)

        model.model.layers[1].self_attn.__class__ = Later
        with own_code(model):
            expected, _ = decoded(model)
        got, _ = decoded(model)
        torch.testing.assert_close(got, expected, atol=2e-5 * float(expected.abs().max()), rtol=2e-5)
        assert set(runs) == {0, 1, 2}
        runs.clear()
        check(model, runs, taken=2)

    def test_queries_that_grow_with_the_position(self, runs: list[int]) -> None:
        """Those of Ministral 3, beyond a position that its config names."""
        if not hasattr(transformers, "Ministral3Config"):
            pytest.skip("this transformers has no Ministral 3")
        rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5}
        rope["original_max_position_embeddings"] = 36
        check(model_of("ministral3", rope_parameters=rope, max_position_embeddings=4096), runs, taken=0)

    def test_training(self, runs: list[int]) -> None:
        model = model_of(attention_dropout=0.5)
        model.train()
        decoded(model)
        assert not runs

    def test_autocast_and_rows_and_padding(self, runs: list[int]) -> None:
        model = model_of()
        with torch.autocast("cpu", torch.bfloat16):
            decoded(model)
        decoded(model, text(2, END))
        mask = torch.ones(1, END)
        mask[0, :4] = 0
        cache = ahn.HippocampalCache(model)
        with torch.no_grad():
            model(text(1, START), attention_mask=mask[:, :START], cache=cache)
            model(text(1, 1), attention_mask=mask[:, : START + 1], cache=cache)
        assert not runs

    def test_half_precision(self, runs: list[int]) -> None:
        decoded(model_of().bfloat16())
        assert not runs

    def test_recording(self, runs: list[int]) -> None:
        model, seen = model_of(), set()
        decoded(model)
        runs.clear()
        with record_layers(model, lambda layer: seen.add(layer.layer.index)):
            decoded(model)
        assert seen == {0, 1, 2}
        assert not runs

    def test_kernels_switched_off(self, runs: list[int]) -> None:
        model = model_of()
        decoded(model)
        runs.clear()
        with native.switched_off():
            decoded(model)
        assert not runs

    def test_detached(self, runs: list[int]) -> None:
        model = model_of()
        ahn.detach(model)
        assert not any("forward" in vars(module) for module in model.modules())


def test_hidden_states_are_given(runs: list[int]) -> None:
    model, ids = model_of(), text(1, START + 2)
    given = []
    for taken in (False, True):
        cache = ahn.HippocampalCache(model)
        with torch.no_grad():
            model(ids[:, :START], cache=cache)
            model(ids[:, START : START + 1], cache=cache)
            here = own_code(model) if not taken else torch.no_grad()
            with here, torch.no_grad():
                given.append(model(ids[:, -1:], cache=cache, output_hidden_states=True).hidden_states)
    assert len(given[0]) == len(given[1]) == 4
    for mine, other in zip(*given, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    runs.clear()
    decoded(model)
    assert set(runs) == {0, 1, 2}


@outputs_of_every_kind
def test_a_kernel_that_differs_is_not_used(memory: str, monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    model = model_of(memory=memory)
    run = decoder_run.run_layers

    def wrong(layers: Any, tokens: Any) -> None:
        for token in tokens:
            token.cos, token.sin = token.sin, token.cos
        run(layers, tokens)

    monkeypatch.setattr(decoder_run, "run_layers", wrong)
    check(model, runs, taken=0)


@outputs_of_every_kind
@torch.no_grad()
def test_a_failed_call_leaves_the_cache(memory: str, runs: list[int]) -> None:
    model, ids = model_of(memory=memory), text(1, END)
    _, cache = decoded(model)
    expected = model(ids[:, :1], cache=cache.fork()).logits
    tensors = {
        f"{n}.{name}": t.clone() for n, layer in enumerate(cache.layers) for name, t in layer_tensors(layer).items()
    }
    handle = model.model.norm.register_forward_hook(lambda *args: 1 / 0)
    runs.clear()
    with pytest.raises(ZeroDivisionError):
        model(ids[:, :1], cache=cache)
    assert set(runs) == {0, 1, 2}
    handle.remove()
    for number, layer in enumerate(cache.layers):
        for name, tensor in layer_tensors(layer).items():
            assert torch.equal(tensor, tensors[f"{number}.{name}"])
    assert torch.equal(model(ids[:, :1], cache=cache).logits, expected)


@outputs_of_every_kind
@torch.no_grad()
def test_saved_forked_and_copied(memory: str, tmp_path: Path) -> None:
    model, ids = model_of(memory=memory), text(1, END)
    _, cache = decoded(model)
    cache.save(tmp_path / "cache")
    twin, twin_cache = copy.deepcopy(model), None
    expected = model(ids[:, :1], cache=cache.fork()).logits
    twin_cache = ahn.HippocampalCache.load(tmp_path / "cache", twin)
    for each in (ahn.HippocampalCache.load(tmp_path / "cache", model), cache):
        assert torch.equal(model(ids[:, :1], cache=each).logits, expected)
    torch.testing.assert_close(twin(ids[:, :1], cache=twin_cache).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_threads_share_a_model() -> None:
    model = model_of()
    texts = [text(1, END, seed=seed) for seed in range(4)]
    expected = [decoded(model, ids)[0] for ids in texts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda ids: decoded(model, ids)[0], texts * 2))
    for mine, other in zip(got, expected * 2, strict=True):
        assert torch.equal(mine, other)


class TestRefused:
    def weights(self) -> tuple[Any, Any]:
        model = model_of()
        decoded(model)
        path = model.model.layers[0].forward.path
        memory = path._attention_layer.memory
        assert path._parts is not None
        assert memory is not None
        return path._parts.weights, memory.output_weights()

    @pytest.mark.parametrize("sizes", [(4, 3, 16), (4, 2, 8), (8, 2, 16)])
    def test_heads_of_other_sizes(self, sizes: tuple[int, int, int]) -> None:
        with pytest.raises(ShapeError, match="cannot take"):
            DescribedLayer(*self.weights(), *sizes, 0.25)

    def test_maps_that_do_not_fit_together(self) -> None:
        weights, memory = self.weights()
        with pytest.raises(ShapeError, match="cannot take"):
            DescribedLayer(weights._replace(down=weights.up), memory, 4, 2, 16, 0.25)
