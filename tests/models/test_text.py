"""Long texts are tokenised in parts: the tokens are those of the whole, and a tokenizer is never given all at once."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ahn.models import prompts, text

SENTENCE = "the keeper of the lighthouse saw a schooner on the rocks and rang the bells until morning came again"
WORDS = SENTENCE.split()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level tokenizer with merges within words, and within runs of blanks."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([" ".join(WORDS) + "    \n\n\n"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def line(count: int, between: tuple[str, ...]) -> str:
    chance = random.Random(0)
    return "".join(chance.choice(WORDS) + chance.choice(between) for _ in range(count))


RUNS = (" ", "    ", "\n\n\n", " \n")


@pytest.mark.parametrize("between", [(" ",), ("\n",), RUNS], ids=["one line", "lines", "runs"])
def test_the_tokens_are_those_of_the_whole(
    tokenizer: Any, between: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_AT_ONCE", 1000)
    whole = line(20_000, between)
    assert text.text_tokens(whole, tokenizer) == tokenizer(whole)["input_ids"]


def test_a_tokenizer_is_given_parts(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    def note(parts: Any, **options: Any) -> Any:
        given.append(sum(map(len, parts)))
        return tokenizer(parts, **options)

    monkeypatch.setattr(text, "_AT_ONCE", 4000)
    whole = line(40_000, (" ",))
    assert prompts.tokens(note, whole).tolist() == tokenizer(whole)["input_ids"]  # type: ignore[arg-type]
    assert len(whole) > 200_000
    assert max(given) <= 16 * 4000


def test_a_line_without_a_blank_is_cut_anywhere(tokenizer: Any) -> None:
    whole = "x" * 200_000
    assert tokenizer.decode(text.text_tokens(whole, tokenizer)) == whole
