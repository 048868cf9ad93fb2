"""Tokenizers of GGUF files against tokenizers with the same rule, and SentencePiece against its own algorithm."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, pre_tokenizers
from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

from ahn.errors import ModelError
from ahn.models import load_tokenizer
from ahn.models.gguf_splits import SPLIT_RULES
from tests.models.test_gguf import write

TEXT = "It's 1234 words,\n\n  don't  you\tsee? Ünïcode 你好"
HARD = (
    TEXT,
    "",
    " ",
    "   leading and trailing   ",
    "a  1\n\n1  \r\n\t\n x",
    "3.14159 1,000,000 ½ ² 12345678 ٣٤٥ Ⅷ v2.0-rc1",
    "I'LL we've they'd 'tis o'clock DON'T l’été",
    "日本語のテキスト、中国的「文字」。 한국어 문장 ไทย हिन्दी",
    "👩‍👩‍👧 🎉🎉 emoji🙂mix ❤️ ~`^|<=>+$",
    "HTTPServerError camelCase snake_case __init__(self): x=[1,2]//3;",
    "e\u0301 \u212b \ufb01 \u01c5 \u00df ΑΒγ Жук",
    "\u3000full width！？ “quotes” … — end",
)
Split = Callable[[str], list[tuple[str, Any]]]


def by_pattern(*patterns: str) -> Split:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, to_bytes]).pre_tokenize_str


def known_split(name: str) -> Split:
    """A rule as transformers or tokenizers have it."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in ("gpt-2", "phi-2"):
        return gpt2.pre_tokenize_str
    if name in ("smollm", "starcoder", "refact"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]).pre_tokenize_str
    return by_pattern(theirs.GGUF_PRE_TOKENIZER_SPLITS[name])


def pieces(tokenizer: Any, text: str) -> list[str]:
    """The parts of a text, as text."""
    return [text[start:end] for _, (start, end) in tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(text)]


OWN_RULES = ("default", "deepseek-llm", "deepseek-coder")


@pytest.mark.parametrize("pre", [name for name in SPLIT_RULES if name not in OWN_RULES])
def test_splits_as_others_do(tmp_path: Path, pre: str) -> None:
    write(tmp_path / "m.gguf", pre=pre)
    ours, expected = load_tokenizer(tmp_path / "m.gguf")._tokenizer.pre_tokenizer.pre_tokenize_str, known_split(pre)
    for text in HARD:
        assert ours(text) == expected(text)


# Written by hand from the rules of these models' tokenizer.json and of llama.cpp ("default").
@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("default", "It's 12345, ok?!", ["It", "'", "s", " ", "123", "45", ",", " ok", "?!"]),
        ("default", "a  b\n\n x", ["a", " ", " b", "\n\n", " x"]),
        (
            "deepseek-llm",
            "It's 12 35\n\nok  日本語ab한",
            ["It", "'", "s", " ", "1", "2", " ", "3", "5", "\n", "\n", "ok", "  ", "日本語", "ab", "한"],
        ),
        # Its class of punctuation runs from ":" to "~", so that plain letters leave accented ones.
        ("deepseek-llm", "Ωmega é ſ  ", ["Ω", "mega", " é", " ſ", "  "]),
        ("deepseek-llm", "ა x—“y”", ["ა", " x", "—", "“", "y", "”"]),
        ("deepseek-coder", "def f(x):\n  x1=2", ["def", " f", "(", "x", "):", "\n", " ", " x", "1", "=", "2"]),
    ],
)
def test_splits_by_hand(tmp_path: Path, pre: str, text: str, expected: list[str]) -> None:
    write(tmp_path / "m.gguf", pre=pre)
    assert pieces(load_tokenizer(tmp_path / "m.gguf"), text) == expected


class TestBytePairs:
    @pytest.mark.parametrize("pre", [*SPLIT_RULES, None])
    def test_round_trip(self, tmp_path: Path, pre: str | None) -> None:
        write(tmp_path / "m.gguf", pre=pre)
        tokenizer = load_tokenizer(tmp_path / "m.gguf")
        for text in HARD:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            composed = tokenizer._tokenizer.normalizer.normalize_str(text) if pre == "qwen2" else text
            assert tokenizer.decode(ids) == composed
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == 1

    @pytest.mark.parametrize("pre", SPLIT_RULES)
    def test_digits(self, tmp_path: Path, pre: str) -> None:
        """ "1 2" is a merge, which only rules that keep digits together may apply."""
        write(tmp_path / "m.gguf", pre=pre)
        ids = load_tokenizer(tmp_path / "m.gguf")("12", add_special_tokens=False)["input_ids"]
        together = ("default", "gpt-2", "phi-2", "llama-bpe", "llama3", "llama-v3", "gpt-4o")
        assert len(ids) == (1 if pre in together else 2)

    @pytest.mark.parametrize(("pre", "begins"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)])
    def test_first_token_where_the_file_does_not_say(self, tmp_path: Path, pre: str, begins: bool) -> None:
        write(tmp_path / "m.gguf", pre=pre)
        assert (load_tokenizer(tmp_path / "m.gguf")("ab")["input_ids"][0] == 0) is begins

    @pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", 1), ("gpt-2", 2)])
    def test_words_that_are_tokens_need_no_merges(self, tmp_path: Path, pre: str, expected: int) -> None:
        write(tmp_path / "m.gguf", pre=pre, merges=[])
        assert len(load_tokenizer(tmp_path / "m.gguf")("12", add_special_tokens=False)["input_ids"]) == expected

    def test_composed_characters(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", pre="qwen2")
        tokenizer = load_tokenizer(tmp_path / "m.gguf")
        assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]


class TestRefused:
    def test_merges_of_tokens_that_are_not_there(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", merges=["1 3"])
        with pytest.raises(ModelError, match="does not fit together"):
            load_tokenizer(tmp_path / "m.gguf")

    def test_none(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", tokenizer=False)
        with pytest.raises(ModelError, match="no tokenizer"):
            load_tokenizer(tmp_path / "m.gguf")

    def test_unknown_rule(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", pre="runes")
        with pytest.raises(ModelError, match="'runes'"):
            load_tokenizer(tmp_path / "m.gguf")

    def test_unknown_kind(self, tmp_path: Path) -> None:
        write_sentencepiece(tmp_path / "m.gguf", kind="bert")
        with pytest.raises(ModelError, match="kind 'bert'"):
            load_tokenizer(tmp_path / "m.gguf")

    def test_scores_that_are_not_there(self, tmp_path: Path) -> None:
        write_sentencepiece(tmp_path / "m.gguf", scores=[0.0])
        with pytest.raises(ModelError, match="1 scores"):
            load_tokenizer(tmp_path / "m.gguf")

    def test_text_that_is_no_text(self, tmp_path: Path) -> None:
        write_sentencepiece(tmp_path / "m.gguf")
        data = (tmp_path / "m.gguf").read_bytes()
        at = data.index(b"<0x41>")
        (tmp_path / "m.gguf").write_bytes(data[:at] + b"\xff" + data[at + 1 :])
        with pytest.raises(ModelError, match="damaged") as caught:
            load_tokenizer(tmp_path / "m.gguf")
        assert "\n" not in str(caught.value)


SPACE = "\u2581"


def train_pieces(text: str, rounds: int) -> list[str]:
    """Pieces of two neighbours that are the most frequent, again and again; the first is the best."""
    parts, found = list(text.replace(" ", SPACE)), []
    for _ in range(rounds):
        (left, right), _ = Counter(pairwise(parts)).most_common(1)[0]
        found.append(left + right)
        parts = merge_all(parts, left, right)
    return list(dict.fromkeys(found))


def merge_all(parts: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and merged[-1] == left and part == right:
            merged[-1] = left + right
        else:
            merged.append(part)
    return merged


RARE = set("👩🎉日本\n\r\t")  # characters that no piece has, and that are written as bytes
LETTERS = sorted(set("".join(HARD).replace(" ", SPACE)) - RARE)
CORPUS = "".join(HARD) * 2 + "the cat in the hat and the other thing, then nothing  else   at all  "
PIECES = train_pieces("".join(letter for letter in CORPUS if letter not in RARE), 80)
TOKENS = ["<unk>", "<s>", "</s>", "<|user|>", "  \n", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, *LETTERS]
KINDS = [2, 3, 3, 3, 4, *[6] * 256, *[1] * (len(PIECES) + len(LETTERS))]
SCORES = [*[0.0] * 261, *(-float(rank) for rank in range(len(PIECES))), *[-1e6] * len(LETTERS)]


def write_sentencepiece(path: Path, kind: str = "llama", **changes: Any) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    add_sentencepiece(writer, kind, **changes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sentencepiece(writer: gguf.GGUFWriter, kind: str = "llama", **changes: Any) -> None:
    writer.add_tokenizer_model(kind)
    writer.add_token_list(TOKENS)
    writer.add_token_types(KINDS)
    writer.add_token_scores(changes.get("scores", SCORES))
    for name, index in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(index)
    for key in ("add_space_prefix", "add_bos_token", "add_eos_token"):
        if key in changes:
            writer.add_bool(f"tokenizer.ggml.{key}", changes[key])


def greedy(text: str) -> list[str]:
    """SentencePiece: of all neighbours that make a piece, those of the best one are joined first, from the left."""
    parts, scores = list(text), {piece: -rank for rank, piece in enumerate(PIECES)}
    while unions := [(scores[a + b], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in scores]:
        at = -max(unions)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found: list[str] = []
    for part in parts:
        found += [f"<0x{byte:02X}>" for byte in part.encode()] if part in RARE else [part]
    return found


class TestSentencePiece:
    @pytest.mark.parametrize("prefix", [True, False])
    @pytest.mark.parametrize("text", [text for text in HARD if text])
    def test_is_the_greedy_algorithm(self, tmp_path: Path, text: str, prefix: bool) -> None:
        write_sentencepiece(tmp_path / "m.gguf", add_space_prefix=prefix, add_bos_token=False)
        tokenizer = load_tokenizer(tmp_path / "m.gguf")
        assert "  \n" not in text  # which is a token of users, found before all others
        expected = greedy((SPACE if prefix else "") + text.replace(" ", SPACE))
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == expected
        assert tokenizer.decode(ids) == text

    def test_whole_tokens_and_ends(self, tmp_path: Path) -> None:
        write_sentencepiece(tmp_path / "m.gguf", add_space_prefix=False, add_eos_token=True)
        tokenizer = load_tokenizer(tmp_path / "m.gguf")
        found = tokenizer.convert_ids_to_tokens(tokenizer("<|user|>x  \nx<s>")["input_ids"])
        assert found == ["<s>", "<|user|>", "x", "  \n", "x", "<s>", "</s>"]
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")

    def test_a_space_behind_a_special_token(self, tmp_path: Path) -> None:
        write_sentencepiece(tmp_path / "m.gguf")
        tokenizer = load_tokenizer(tmp_path / "m.gguf")
        found = tokenizer.convert_ids_to_tokens(tokenizer("<|user|>xq")["input_ids"])
        assert found[:2] == ["<s>", "<|user|>"]
        assert "".join(found[2:]) == f"{SPACE}xq"
