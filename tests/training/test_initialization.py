"""How memories start: decay rates in a range, gates that are open, what two kinds have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ahn
from ahn.attachment import attachment_of
from ahn.checkpoint.content import memory_tensors
from ahn.errors import CheckpointError
from ahn.memories import memory_names
from ahn.training.initialization import copy_common, set_initial_decay, set_initial_gate
from tests.tiny import text, tiny, with_memory


class TestInitialDecay:
    def test_rates_are_in_the_range(self, memory: str) -> None:
        model = with_memory("llama", memory)
        before = {name: tensor.clone() for name, tensor in memory_tensors(model).items()}
        torch.manual_seed(5)
        state = torch.random.get_rng_state()
        found = set_initial_decay(model, 0.25, 0.5, seed=1)
        assert torch.equal(torch.random.get_rng_state(), state)
        log_rate = attachment_of(model).layers[0].memory.log_rate  # type: ignore[union-attr]
        assert found == (log_rate is not None)
        now = memory_tensors(model)
        changed = [name for name in now if not torch.equal(now[name], before[name])]
        assert changed == [f"layers.{layer}.{log_rate}" for layer in range(3) if found]
        if found:
            rates = torch.cat([now[name].exp() for name in changed])
            assert bool(((rates >= 0.25 - 1e-6) & (rates <= 0.5 + 1e-6)).all())
            assert rates.unique().numel() == rates.numel()

    def test_which_memories_have_such_rates(self) -> None:
        rates = {name: set_initial_decay(with_memory("llama", name), 0.25, 0.5, seed=1) for name in memory_names()}
        assert rates["gated_delta_net"]
        assert rates["mamba2"]
        assert not rates["delta_net"]


class TestInitialGate:
    def test_an_average_token_lets_it_through(self, memory: str) -> None:
        model: Any = tiny("llama")
        ahn.attach(model, ahn.AHNConfig(memory=memory, window=16, sinks=5))
        texts = [text(1, 40, seed=seed)[0] for seed in (1, 2)]
        set_initial_gate(model, 1.0, texts)
        inputs: dict[int, list[torch.Tensor]] = {}
        layers = attachment_of(model).layers
        for layer in layers:
            layer.module.register_forward_pre_hook(
                lambda module, args, kwargs: inputs.setdefault(module.layer_idx, []).append(kwargs["hidden_states"]),
                with_kwargs=True,
            )
        with ahn.mode(model, "full"):
            for ids in texts:
                model(ids[None])
        for layer in layers:
            mean = torch.cat(inputs[layer.index], dim=1).mean(1)
            gates = layer.memory.g_proj(mean)  # type: ignore[union-attr]
            torch.testing.assert_close(gates, torch.ones_like(gates), rtol=1e-4, atol=1e-4)

    def test_of_some_memories_alone(self) -> None:
        model = with_memory("llama")
        first, *others = attachment_of(model).memories
        before = [memory.g_proj.weight.clone() for memory in others]
        set_initial_gate(model, 1.0, [text(1, 40)[0]], [first])
        assert first.g_proj.weight.std(0).max() < 1e-6  # the same row for every gate
        assert all(torch.equal(memory.g_proj.weight, old) for memory, old in zip(others, before, strict=True))

    def test_the_read_out_learns_from_the_first_step_on(self) -> None:
        """An open gate gives the output projection a gradient many times that of a closed one."""
        sizes = {}
        for opening in (None, 1.0):
            model: Any = tiny("llama")
            torch.manual_seed(0)
            ahn.attach(model, ahn.AHNConfig(window=16, sinks=5))
            if opening is not None:
                set_initial_gate(model, opening, [text(1, 64)[0]])
            weights = [tensor for name, tensor in memory_tensors(model).items() if name.endswith("o_proj")]
            for weight in weights:
                weight.requires_grad_(True)
            logits = model(text(1, 64)).logits
            F.cross_entropy(logits[0, 21:-1], text(1, 64)[0, 22:]).backward()
            sizes[opening] = sum(float(weight.grad.norm()) for weight in weights)
        assert sizes[1.0] > 3 * sizes[None]


class TestCommon:
    def test_it_is_taken_and_the_rest_stays(self, tmp_path: Path) -> None:
        ahn.save(with_memory("llama", "gated_delta_net"), tmp_path)
        model = with_memory("llama", "mamba2")
        before = {name: tensor.clone() for name, tensor in memory_tensors(model).items()}
        taken = copy_common(model, str(tmp_path))
        assert taken.parameters == ["A_log", "dt_bias", "g_proj.weight", "o_proj"]
        assert taken.memories == set(attachment_of(model).memories)
        given = memory_tensors(with_memory("llama", "gated_delta_net"))
        for name, tensor in memory_tensors(model).items():
            expected = given[name] if name.split(".", 2)[2] in taken.parameters else before[name]
            assert torch.equal(tensor, expected), name

    @pytest.mark.parametrize("given", ["gated_delta_net", "linearized_attention"])
    def test_gates_of_another_meaning_are_not_copied(self, tmp_path: Path, given: str) -> None:
        """Both have `g_proj` and `o_proj`, of the same shapes."""
        attached = {"gated_delta_net": "linearized_attention", "linearized_attention": "gated_delta_net"}[given]
        ahn.save(with_memory("llama", given), tmp_path)
        with pytest.raises(CheckpointError, match="no weights in common"):
            copy_common(with_memory("llama", attached), str(tmp_path))

    def test_layers_of_another_kind_stay(self, tmp_path: Path) -> None:
        ahn.save(with_memory("llama", "gated_delta_net"), tmp_path)
        model = with_memory("llama", "gated_delta_net+linearized_attention")
        before = {name: tensor.clone() for name, tensor in memory_tensors(model).items()}
        assert copy_common(model, str(tmp_path)).memories == set(attachment_of(model).memories[:2])
        given = memory_tensors(with_memory("llama", "gated_delta_net"))
        for name, tensor in memory_tensors(model).items():
            assert torch.equal(tensor, (before if name.startswith("layers.2.") else given)[name]), name

    def test_nothing_in_common(self, tmp_path: Path) -> None:
        ahn.save(with_memory("llama", "delta_net", layers=(0,)), tmp_path)
        with pytest.raises(CheckpointError, match="no weights in common"):
            copy_common(with_memory("llama", layers=(1, 2)), str(tmp_path))
