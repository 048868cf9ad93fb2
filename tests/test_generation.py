"""Reading in chunks scores every token as one forward pass does, in every mode, and never holds all logits."""

import math

import pytest
import torch
import transformers
from torch.nn import functional

import ahn
from ahn.backbone.compat import CACHE
from ahn.errors import ConfigError, ShapeError
from ahn.generation import Progress, Reader, automatic_chunk, cache_bytes, decode, full_cache_bytes, read
from tests.tiny import text, tiny, with_memory

TOKENS = 75
MODES = ("full", "window", "ahn")


@pytest.fixture(scope="module")
def model():
    return with_memory()


@torch.no_grad()
def one_pass(model, ids):
    logits = model(ids, use_cache=False).logits[0]
    return functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none"), logits[-1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [1, 7, 74, None])
def test_any_chunk_scores_as_one_pass(model, mode, chunk):
    ids = text(tokens=TOKENS)
    with ahn.mode(model, mode):
        expected, last = one_pass(model, ids)
        reading = read(model, ids, chunk=chunk)
    assert reading.tokens == TOKENS
    assert reading.nll.shape == (TOKENS - 1,)
    assert reading.nll.dtype == torch.float32
    assert reading.nll.device.type == "cpu"
    torch.testing.assert_close(reading.nll, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reading.logits, last, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_oss", "qwen2"])
@pytest.mark.parametrize("mode", MODES)
def test_families(family, mode):
    model, ids = with_memory(family), text(tokens=40)
    with ahn.mode(model, mode):
        expected, _ = one_pass(model, ids)
        torch.testing.assert_close(read(model, ids, chunk=9).nll, expected, atol=1e-4, rtol=1e-4)


def test_without_a_memory_attached():
    model, ids = tiny(), text(tokens=30)
    expected, _ = one_pass(model, ids)
    reading = read(model, ids, chunk=8)
    assert isinstance(reading.cache, transformers.DynamicCache)
    torch.testing.assert_close(reading.nll, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_goes_on_with_its_cache(model, mode):
    ids = text(tokens=TOKENS)
    with ahn.mode(model, mode):
        whole = read(model, ids, chunk=16)
        first = read(model, ids[0, :40], chunk=16)
    second = read(model, ids[0, 40:], cache=first.cache, chunk=16)  # the cache knows its mode
    torch.testing.assert_close(torch.cat((first.nll, whole.nll[39:40], second.nll)), whole.nll, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second.logits, whole.logits, atol=1e-4, rtol=1e-4)


def test_generate_goes_on_with_its_cache(model):
    """What was read is no inference tensor, which later writes into the ring buffer would refuse."""
    ids = text(tokens=40)
    cache = read(model, ids[:, :-1], score=False).cache
    new = model.generate(ids, **{CACHE: cache}, max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(new, model.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("mode", MODES)
def test_without_scores(model, mode, monkeypatch):
    ids, kept = text(tokens=TOKENS), []
    with ahn.mode(model, mode):
        expected = read(model, ids, chunk=10)
        head = model.lm_head.forward
        monkeypatch.setattr(model.lm_head, "forward", lambda hidden: kept.append(hidden.size(1)) or head(hidden))
        reading = read(model, ids, chunk=10, score=False)
    assert reading.nll.numel() == 0
    assert set(kept) == {1}
    torch.testing.assert_close(reading.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_no_logits_of_the_whole_text(model, monkeypatch):
    sizes, head = [], model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: sizes.append(hidden.size(1)) or head(hidden))
    read(model, text(tokens=TOKENS), chunk=10)
    assert max(sizes) == 10


@pytest.mark.parametrize("mode", MODES)
def test_progress(model, mode):
    seen: list[Progress] = []
    with ahn.mode(model, mode):
        reading = read(model, text(tokens=60), chunk=25, on_progress=seen.append)
    assert [each.tokens for each in seen] == [25, 50, 60]
    assert seen[-1].cache_bytes == cache_bytes(reading.cache)
    assert seen[-1].seconds == reading.seconds > seen[0].seconds > 0
    assert seen[-1].nll == pytest.approx(float(reading.nll.mean()), rel=1e-5)
    if mode != "full":
        assert seen[-1].cache_bytes == seen[-2].cache_bytes


def test_progress_before_anything_was_scored(model):
    reader = Reader(model)
    reader.prefill(text(tokens=1))
    assert math.isnan(reader.progress.nll)
    reader.prefill(text(tokens=1))
    assert reader.progress.nll == pytest.approx(float(reader.nll.mean()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_full_cache_bytes(family):
    model = with_memory(family)
    with ahn.mode(model, "full"):
        for tokens in (3, 40):
            assert full_cache_bytes(model, tokens) == cache_bytes(read(model, text(tokens=tokens)).cache)


def test_two_readers_in_lockstep(model):
    ids = text(tokens=60)
    readers = {}
    for mode in MODES:
        with ahn.mode(model, mode):
            readers[mode] = Reader(model)
    for piece in ids[0].split(20):
        for mode, reader in readers.items():
            with ahn.mode(model, mode):
                reader.prefill(piece)
    for mode, reader in readers.items():
        with ahn.mode(model, mode):
            torch.testing.assert_close(reader.nll, read(model, ids).nll, atol=1e-4, rtol=1e-4)


def test_automatic_chunk(model):
    assert automatic_chunk(model) == 512
    assert automatic_chunk(tiny(vocab_size=200_000, hidden_size=4, num_attention_heads=1, head_dim=4)) == 167


@pytest.mark.parametrize("shape", [(1, 0), (0,), (2, 5), (1, 1, 5), ()], ids=str)
def test_refuses(model, shape):
    with pytest.raises(ShapeError, match="tokens of one text"):
        read(model, torch.ones(shape, dtype=torch.long))


def test_refuses_a_chunk_of_nothing(model):
    with pytest.raises(ConfigError, match="chunk"):
        read(model, text(), chunk=0)


def test_has_no_result_before_the_first_piece(model):
    with pytest.raises(ShapeError, match="nothing has been read"):
        _ = Reader(model).logits


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_decoding_takes_the_likeliest_token(model, mode):
    ids = text(tokens=TOKENS)
    with ahn.mode(model, mode):
        reader = Reader(model)
        reader.prefill(ids)
        written = list(decode(reader, 6))
        for number, token in enumerate(written):
            seen = torch.cat((ids, torch.tensor([written[:number]], dtype=torch.long)), dim=1)
            assert token == int(model(seen, use_cache=False).logits[0, -1].argmax())
        again = Reader(model)
        again.prefill(ids)
        stop = written.index(written[3])
        assert list(decode(again, 6, stop=[written[3]])) == written[:stop]
    assert reader.tokens == TOKENS + 6
    assert again.tokens == TOKENS + stop


def test_drawn_tokens_are_those_of_the_seed(model):
    reader = Reader(model)
    with pytest.raises(ShapeError, match="nothing has been read yet"):
        next(decode(reader, 1))
    reader.prefill(text(tokens=TOKENS))
    drawn = [list(decode(reader.fork(), 8, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
