"""What a memory has kept of a text: gradients of evicted tokens, rank of the state, gates, and how they are shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

import ahn
from ahn.attachment import attachment_of
from ahn.errors import ModelError, ShapeError
from ahn.evaluation import EvaluationError
from ahn.evaluation.probing import effective_rank, gradients, token_gradients, trace_state
from ahn.evaluation.probing.plots import draw
from ahn.evaluation.probing.shading import Scale, coloured_text, show_tokens, strongest, token_texts
from ahn.generation import Reader
from ahn.memories import MemoryShape, build_memory
from ahn.training import distillation_loss
from tests.tiny import FAMILIES, text, tiny, with_memory

WINDOW, SINKS = 16, 5


class TestGradients:
    def test_finite_differences(self, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
        # GPT-2, because the norms of the younger families compute in float32 whatever the model's dtype.
        model = with_memory("gpt2", memory, model={"n_embd": 8, "n_layer": 2, "n_head": 2}).double()
        ids, step, embed = text(1, 50), 1e-5, gradients._embed

        def loss(token: int, place: int, change: float) -> float:
            def moved(*arguments: Any) -> torch.Tensor:
                embedded = embed(*arguments)
                embedded[0, token, place] += change
                return embedded

            with monkeypatch.context() as patch:
                patch.setattr(gradients, "_embed", moved)
                return token_gradients(model, ids).loss

        found = token_gradients(model, ids)
        assert found.norms.dtype == torch.float64
        for token in (7, 30):
            slopes = [(loss(token, place, step) - loss(token, place, -step)) / (2 * step) for place in range(8)]
            assert torch.tensor(slopes).norm() == pytest.approx(float(found.norms[token]), rel=1e-6)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_loss_is_that_of_training(self, family: str) -> None:
        model, ids = with_memory(family), text(1, 60)
        found = token_gradients(model, ids)
        expected = distillation_loss(model, {"input_ids": ids}, {"kl": 1}, WINDOW, SINKS).mean({"kl": 1})
        assert found.loss == pytest.approx(expected.item(), rel=1e-4)
        assert bool((found.norms[list(found.evicted)] > 0).all())

    def test_the_plain_definition(self) -> None:
        model, ids = with_memory("qwen3"), text(1, 60)
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        with ahn.mode(model, "full"):
            expected = model(ids, use_cache=False).logits[0].log_softmax(-1)
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0].log_softmax(-1)
        F.kl_div(logits[21:], expected[21:], reduction="batchmean", log_target=True).backward()
        torch.testing.assert_close(token_gradients(model, ids).norms, embedded.grad[0].norm(dim=-1))

    def test_other_settings_than_attached(self) -> None:
        found = token_gradients(with_memory(), text(1, 60), window=10, sinks=2)
        assert (found.window, found.sinks, found.evicted, found.positions) == (10, 2, range(2, 50), 48)
        assert found.norms.shape == (60,)

    def test_the_last_window_alone(self) -> None:
        """In one layer with a silent memory, a token out of the window of all that counts draws no gradient."""
        model = with_memory("llama", model={"num_hidden_layers": 1})
        served: Any = attachment_of(model).layers[0].memory
        ids, seen = text(1, 60), range(60 - 2 * WINDOW + 1, 60)
        kept = token_gradients(model, ids, positions="last")
        served.o_proj.data.zero_()
        found = token_gradients(model, ids, positions="last")
        assert found.positions == WINDOW
        assert [place for place, norm in enumerate(found.norms.tolist()) if norm] == [*range(SINKS), *seen]
        assert bool((kept.norms[SINKS : seen.start] > 0).all())

    def test_the_model_is_left_as_it_was(self) -> None:
        model, ids = with_memory(), text(1, 60)
        before = model(ids).logits
        token_gradients(model, ids)
        trace_state(model, ids)
        assert torch.equal(model(ids).logits, before)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "memory" not in name)

    @pytest.mark.parametrize("measure", [token_gradients, trace_state], ids=["gradients", "state"])
    def test_wrong_texts(self, measure: Any) -> None:
        model = with_memory()
        with pytest.raises(EvaluationError, match="21 tokens, and sinks \\+ window keep 21 exactly"):
            measure(model, text(1, 21))
        with pytest.raises(EvaluationError, match="trained on texts of up to 4,096"):
            measure(model, text(1, 4097))
        with pytest.raises(ShapeError, match="the tokens of one text"):
            measure(model, text(2, 60))
        with pytest.raises(ModelError, match="no memory is attached"):
            measure(tiny(), text(1, 60))

    def test_a_gradient_that_is_not_finite_is_refused(self) -> None:
        model = with_memory()
        attachment_of(model).layers[0].memory.o_proj.data.fill_(float("nan"))  # type: ignore[union-attr]
        with pytest.raises(ModelError, match="not finite in float32"):
            token_gradients(model, text(1, 60))


class TestEffectiveRank:
    def test_by_hand(self) -> None:
        matrices = torch.stack(
            [torch.eye(4), torch.zeros(4, 4), torch.ones(4, 4), torch.diag(torch.tensor([3.0, 3, 0, 0]))]
        )
        torch.testing.assert_close(effective_rank(matrices), torch.tensor([4.0, 0, 1, 2]))

    def test_shares_of_three_to_one(self) -> None:
        found = effective_rank(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)))
        assert float(found) == pytest.approx(4 / 3**0.75)


class TestState:
    def test_ranks_are_those_of_the_cache(self, memory: str) -> None:
        model, ids = with_memory("qwen3", memory), text(1, 75)
        trace = trace_state(model, ids, snapshots=4)
        assert trace.tokens == (35, 48, 62, 75)
        for place, stop in enumerate(trace.tokens):
            reader = Reader(model, score=False)
            reader.prefill(ids[:, :stop])
            for layer, cascade in enumerate(reader.cache.layers):  # type: ignore[attr-defined]
                state = cascade.state[0]
                if memory == "linearized_attention":  # how values vary with keys, from the sums of both
                    state = state[:, :-1, :-1] / state[:, -1:, -1:] - (
                        state[:, :-1, -1:] * state[:, -1:, :-1] / state[:, -1:, -1:] ** 2
                    )
                torch.testing.assert_close(trace.rank[place, layer], effective_rank(state))
        assert (trace.layers, trace.full_rank) == ((0, 1, 2), (8, 8, 8))
        assert float(trace.fullness.max()) <= 1

    @pytest.mark.parametrize("positions", ["rope", "none"])
    def test_gates_are_those_of_the_evicted_tokens(self, memory: str, positions: str) -> None:
        model, ids, inputs = with_memory("qwen3", memory, memory_positions=positions), text(1, 75), []
        handle = (
            attachment_of(model)
            .layers[1]
            .module.register_forward_pre_hook(
                lambda module, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
            )
        )
        model(ids)
        handle.remove()
        served: Any = attachment_of(model).layers[1].memory
        module = attachment_of(model).layers[1].module
        keys = module.k_norm(module.k_proj(inputs[0]).unflatten(-1, (2, -1)))
        if positions == "rope":
            keys = apply_rotary_pos_emb(keys, keys, *model.model.rotary_emb(keys, torch.arange(75)[None]), 2)[0]
        write, decay = served.writing(keys, served.gates(inputs[0]))
        trace = trace_state(model, ids, snapshots=3)
        torch.testing.assert_close(trace.write[1], write[0, 5:59].mean(-1))
        assert trace.write.shape == (3, 54)
        assert (trace.decay is None) == (decay is None)
        if trace.decay is not None:
            torch.testing.assert_close(trace.decay[1], decay[0, 5:59].mean(-1))

    def test_gating_is_what_the_scan_does(self, memory: str) -> None:
        shape = MemoryShape(hidden_size=12, query_heads=4, kv_heads=2, key_size=6, value_size=5)
        served = build_memory(memory, shape)
        for parameter in served.parameters():
            torch.nn.init.normal_(parameter)
        gates = served.gates(torch.randn(1, 1, 12))
        query, key, value = torch.randn(1, 1, 4, 6), torch.randn(1, 1, 2, 6), torch.randn(1, 1, 2, 5)
        before = torch.randn(1, *served.state_shape())
        write, decay = served.writing(key, gates)
        unwritten = gates.clone()
        unwritten[..., -1, :] = 0
        _, after = served.scan(query, key, value, unwritten, before)
        torch.testing.assert_close(after, before if decay is None else decay[0, 0, :, None, None] * before)
        _, first = served.scan(query, key, value, gates, None)
        length = value.norm(dim=-1)
        if memory == "linearized_attention":  # which writes both with a one at their ends
            length = (length.square() + 1).sqrt() * (key.norm(dim=-1).square() + 1).sqrt()
        length = length.repeat_interleave(2, dim=-1)[0, 0]
        torch.testing.assert_close(first.flatten(2).norm(dim=-1)[0], write[0, 0] * length)

    def test_linearised_attention_weighs_by_the_key_and_reads_by_the_covariance(self) -> None:
        shape = MemoryShape(hidden_size=12, query_heads=1, kv_heads=1, key_size=6, value_size=5)
        served = build_memory("linearized_attention", shape).double()
        for parameter in served.parameters():
            torch.nn.init.normal_(parameter)
        key, value, query = (torch.randn(1, 9, 1, size, dtype=torch.float64) for size in (6, 5, 6))
        gates = served.gates(torch.randn(1, 9, 12, dtype=torch.float64))
        mean_query, offset = served.get_parameter("mean_query"), served.get_parameter("offset")
        expected = ((key * mean_query).sum(-1) / 6**0.5 - offset).exp()
        torch.testing.assert_close(served.writing(key, gates).write_BTH, expected)
        _, state = served.scan(query, key, value, gates, None)
        covariance = torch.cov(torch.cat((value, key), -1)[0, :, 0].T, correction=0, aweights=expected[0, :, 0])
        torch.testing.assert_close(served.linear_maps(state)[0, 0], covariance[:5, 5:])
        assert not served.linear_maps(torch.zeros_like(state)).any()

    def test_figures(self, memory: str) -> None:
        trace = trace_state(with_memory("llama", memory, layers=(0, 2)), text(1, 75))
        drawn = draw(trace, SINKS)
        assert list(drawn) == ["rank", "write"] + ["decay"] * (trace.decay is not None)
        assert [axes.get_title() for axes in drawn["write"][0].axes] == ["layer 0", "layer 2"]


class _Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


class TestTokens:
    def test_a_character_comes_with_its_last_token(self) -> None:
        assert token_texts(_Bytes(), list("né 漢".encode())) == ["n", "", "é", " ", "", "", "漢"]

    def test_a_broken_character_at_the_end_still_shows(self) -> None:
        assert token_texts(_Bytes(), [110, 195]) == ["n", "\ufffd"]

    def test_scale(self) -> None:
        scale = Scale(0.01, 1.0)
        assert [scale.shade(value) for value in (0.0, 0.01, 0.1, 1.0, 7.0)] == pytest.approx([0, 0, 0.5, 1, 1])
        assert Scale.spanning(torch.zeros(3)).shade(0.0) == 0
        assert Scale.spanning(torch.ones(3)).shade(1.0) == 0
        found = Scale.spanning(torch.logspace(-2, 0, 101))
        assert (found.low, found.high) == pytest.approx((10**-1.96, 10**-0.04), rel=1e-5)

    def test_parts_order_and_escaping(self) -> None:
        found = gradients.TokenGradients(torch.tensor([9.0, 1.0, 4.0, 2.0, 9.0]), 0.5, 3, window=1, sinks=1)
        scale = Scale(1.0, 4.0)
        tokens = show_tokens(["a", "<b>", " &", " \n", "e"], found, scale)
        assert [token.part for token in tokens] == ["sinks", "evicted", "evicted", "evicted", "window"]
        assert [token.shade for token in tokens] == pytest.approx([0, 0, 1, 0.5, 0])
        assert [(token.position, words) for token, words in strongest(tokens, 2)] == [
            (2, "a<b>[ &] e"),
            (3, "a<b> &[ ]e"),
        ]
        html = coloured_text(tokens, scale)
        assert '<span class="evicted" title="token 1, evicted: 1">&lt;b&gt;</span>' in html
        assert '<span class="evicted" title="token 2, evicted: 4" style="--s:1.00"> &amp;</span>' in html
        assert "evicted (3): 1<" in html
