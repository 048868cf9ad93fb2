"""The engine: many answers at once, each as if it were written alone."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import torch

from ahn.generation import decode
from ahn.models.text import GrowingText
from ahn.serving.errors import RequestError
from ahn.serving.requests import Generation
from ahn.serving.sampling import Sampling
from tests.serving.common import GREEDY, alone, answers, ids_of, running, take, text_of_all, tiny_model
from tests.tiny import byte_tokenizer, with_memory

BOOK = "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little. " * 2
PROMPTS = [BOOK, "a", "It was the best of times", BOOK[:60], "x" * 17, BOOK[7:150], "Who is there?"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.mark.parametrize("anchors", [0, 4])
def test_answers_written_together_are_those_written_alone(anchors: int) -> None:
    model = tiny_model(anchors=anchors)
    requests = [Generation(ids_of(text), 5 + 4 * number, GREEDY) for number, text in enumerate(PROMPTS)]
    with running(model) as engine:
        got = [text_of_all(increments) for increments in answers(engine, requests)]
    assert got == [alone(model, request.tokens, request.limit) for request in requests]
    assert engine.active == engine.waiting == 0


def test_models_whose_caches_share_no_batch() -> None:
    model = with_memory("gpt2", model={"vocab_size": 259})
    requests = [Generation(ids_of(text), 8, GREEDY) for text in PROMPTS[:3]]
    with running(model) as engine:
        got = [text_of_all(increments) for increments in answers(engine, requests)]
    assert got == [alone(model, request.tokens, 8) for request in requests]


def test_several_answers_to_one_prompt(model: Any) -> None:
    drawn = Sampling(temperature=1.5, seed=5)
    requests = [Generation(ids_of(BOOK), 12, drawn, choices=3) for _ in range(2)]
    with running(model) as engine:
        one, other = (
            [text_of_all(part for part in increments if part.choice == number) for number in range(3)]
            for increments in answers(engine, requests)
        )
    assert one == other  # the same seed
    assert len(set(one)) == 3


def test_a_long_prompt_stops_no_stream_for_longer_than_a_chunk(model: Any) -> None:
    writer, reader = Generation(ids_of("Go on"), 60, GREEDY), Generation(ids_of(BOOK), 1, GREEDY)
    order: list[str] = []
    with running(model, max_sessions=2) as engine:
        step, read = engine._batch.step, engine._read  # type: ignore[has-type]

        def noted_step(*args: Any) -> None:
            order.append("step")
            step(*args)

        def noted_read() -> None:
            if engine._reading:
                order.append("chunk")
            read()

        engine._batch.step, engine._read = noted_step, noted_read  # type: ignore[method-assign]
        answers(engine, [writer, reader])
    during = order[order.index("step") :]
    during = during[: len(during) - during[::-1].index("chunk")]
    assert "chunk chunk" not in " ".join(during)


def test_a_slow_reader_waits_alone(model: Any) -> None:
    slow, quick = Generation(ids_of("Slow"), 200, GREEDY), Generation(ids_of("Quick"), 30, GREEDY)
    with running(model) as engine:

        async def both() -> tuple[str, str]:
            engine.submit(slow)
            while not slow.stream.is_full:
                await asyncio.sleep(0.01)
            engine.submit(quick)
            first = text_of_all(await take(quick))
            assert len(slow.stream._events) <= 70
            return first, text_of_all(await take(slow))

        assert asyncio.run(both()) == tuple(alone(model, each.tokens, each.limit) for each in (quick, slow))


def test_who_goes_away_frees_his_place(model: Any) -> None:
    gone = [Generation(ids_of("Gone"), 100_000, GREEDY) for _ in range(6)]
    with running(model) as engine:
        for each in gone:
            engine.submit(each)
        while not engine.active:
            time.sleep(0.01)
        for each in gone:
            each.cancelled = True
        (after,) = answers(engine, [Generation(ids_of("Here"), 6, GREEDY)])
        assert text_of_all(after) == alone(model, ids_of("Here"), 6)
        assert (engine.active, engine.waiting) == (0, 0)


def test_the_queue_and_the_time_have_an_end(model: Any) -> None:
    with running(model, max_sessions=1, max_queue=1) as engine:
        long = Generation(ids_of("Long"), 10**6, GREEDY, seconds=0.8)
        engine.submit(long)
        while not engine.active:
            time.sleep(0.01)
        engine.submit(Generation(ids_of("Next"), 1, GREEDY))
        with pytest.raises(RequestError, match="busy") as refused:
            engine.submit(Generation(ids_of("Last"), 1, GREEDY))
        assert refused.value.status == 503
        with pytest.raises(RequestError, match="longer than"):
            asyncio.run(take(long))
        with pytest.raises(RequestError, match="at most 1"):
            engine.submit(Generation(ids_of("Two"), 1, GREEDY, choices=2))


def test_closing_finishes_what_was_begun(model: Any) -> None:
    with running(model) as engine:
        request = Generation(ids_of("To the end"), 30, GREEDY)
        engine.submit(request)
        closing = threading.Thread(target=engine.close)
        closing.start()
        assert text_of_all(asyncio.run(take(request))) == alone(model, request.tokens, 30)
        closing.join()
        with pytest.raises(RequestError, match="shutting down"):
            engine.submit(Generation(ids_of("Late"), 1, GREEDY))


def test_an_error_of_the_model_ends_the_answers_and_not_the_engine(model: Any) -> None:
    with running(model) as engine:
        step = engine._batch.step

        def broken(*args: Any) -> None:
            engine._batch.step = step  # type: ignore[method-assign]
            raise MemoryError("no memory left")

        engine._batch.step = broken  # type: ignore[method-assign]
        with pytest.raises(RequestError, match="MemoryError"):
            answers(engine, [Generation(ids_of("One"), 9, GREEDY)])
        assert text_of_all(answers(engine, [Generation(ids_of("Two"), 9, GREEDY)])[0]) == alone(model, ids_of("Two"), 9)


def test_how_likely_the_tokens_were(model: Any) -> None:
    tokens = ids_of(BOOK)
    request = Generation(tokens, 3, Sampling(temperature=0, top_logprobs=2), echo=True)
    with running(model) as engine:
        (increments,) = answers(engine, [request])
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), dim=-1)
    assert [each.token for each in request.token_choices] == tokens
    assert request.token_choices[0].logprob is None
    for place, told in enumerate(request.token_choices[1:]):
        assert told.logprob == pytest.approx(float(expected[place, tokens[place + 1]]), abs=1e-4)
        assert told.top[0][1] == pytest.approx(float(expected[place].max()), abs=1e-4)
    written = [told for increment in increments for told in increment.tokens]
    assert len(written) == 3
    assert written[0].logprob == pytest.approx(float(expected[-1].max()), abs=1e-4)
    assert all(told.top[0] == (told.token, told.logprob) for told in written)


def test_top_p_leaves_the_likeliest() -> None:
    logits = torch.log(torch.tensor([0.05, 0.6, 0.3, 0.05]))
    for top_p, possible in ((0.5, {1}), (0.7, {1, 2}), (1.0, {0, 1, 2, 3})):
        sampling = Sampling(top_p=top_p, seed=1)
        random = sampling.generator(0)
        assert {sampling.choose(logits, random) for _ in range(300)} == possible


@pytest.mark.parametrize(("top_p", "count"), [(0.1, 1), (0.2, 1), (0.5, 3), (0.8, 4), (0.9, 5)])
def test_of_tokens_that_tie_at_the_edge_of_top_p_as_few_as_reach_it_are_left(top_p: float, count: int) -> None:
    sampling = Sampling(top_p=top_p, seed=1)
    random = sampling.generator(0)
    assert len({sampling.choose(torch.zeros(5), random) for _ in range(300)}) == count


def test_a_server_draws_what_the_command_line_draws() -> None:
    class Same:
        logits = torch.linspace(-1, 1, 12).repeat_interleave(3)

        def prefill(self, ids: torch.Tensor, /) -> None:
            """Reads nothing."""

    options = {"temperature": 0.8, "top_p": 0.7, "seed": 4}
    sampling = Sampling(**options)
    random = sampling.generator(0)
    assert [sampling.choose(Same.logits, random) for _ in range(50)] == list(decode(Same(), 50, **options))


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("Hello world", [], "Hello world"),
        ("Hello world", ["wor"], "Hello "),
        ("Hello world", ["xyz", "o w"], "Hell"),
        ("ababac!", ["abac"], "ab"),
        ("Grüße, 日本", ["日x"], "Grüße, 日本"),
        ("abc", ["cd"], "abc"),
    ],
)
def test_text_grows_to_the_whole_or_to_the_stop(text: str, stop: list[str], expected: str) -> None:
    growing = GrowingText(byte_tokenizer(), stop)
    parts = []
    for token in ids_of(text):
        parts.append(growing.add(token))
        if growing.has_stopped:
            break
    assert "".join([*parts, growing.end()]) == expected
    assert "\ufffd" not in "".join(parts)
