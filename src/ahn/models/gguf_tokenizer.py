"""Tokenizers of GGUF files: byte-level pairs (GPT-2 and its heirs), and SentencePiece (Llama 2, Gemma, Phi-3)."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

from ahn.errors import ModelError, one_line
from ahn.models.gguf_model import GGUFModel
from ahn.models.gguf_splits import SPLIT_RULES, SplitRule
from ahn.models.heap import trim_heap

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4  # gguf.TokenType
_SPACE = "\u2581"  # as which SentencePiece writes a space


def load_gguf_tokenizer(opened: GGUFModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its chat template.

    Args:
        opened: The file.

    Raises:
        ModelError: The file has none, or one that cannot be read.
    """
    from transformers import PreTrainedTokenizerFast

    kind, tokens = opened.field("tokenizer.ggml.model"), opened.field("tokenizer.ggml.tokens")
    if not kind or not tokens:
        raise ModelError(f"'{opened.path}' has no tokenizer: take another file, or a folder of transformers")
    makers = {"gpt2": _byte_pairs, "llama": _sentencepiece}
    if kind not in makers:
        raise ModelError(
            f"'{opened.path}' has a tokenizer of the kind {reprlib.repr(kind)}, which is not read from GGUF; those "
            f"that are: {', '.join(makers)}. Give the model's folder of transformers and quantize instead."
        )
    raw, adds_bos = makers[kind](opened, tokens)
    words = _special_words(opened, tokens)
    _add_ends(raw, opened, words, adds_bos)
    del tokens
    trim_heap()
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=_Whole(raw), clean_up_tokenization_spaces=False, **words
    )
    if template := opened.field("tokenizer.chat_template"):
        tokenizer.chat_template = template
    tokenizer.model_max_length = 10**30  # a memory reads past the trained context
    return tokenizer


class _Whole:
    """Stands for a tokenizer that nobody else has: transformers takes a deep copy, of which two would be one too many.

    Args:
        raw: The tokenizer.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def __deepcopy__(self, memo: Any) -> Any:
        return self.raw


def _byte_pairs(opened: GGUFModel, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """A tokenizer of byte-level pairs, and whether a text begins with a token of its own by default."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    rule = _split_rule(opened)
    same = {token: token for token in tokens}  # so that a merge takes no memory for strings that are there already
    merges = [
        tuple(same.get(part, part) for part in merge.split(" ")) for merge in opened.field("tokenizer.ggml.merges", [])
    ]
    del same
    raw = _pairs(opened, tokens, merges, ignore_merges=rule.whole_words)
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    if rule.composed:
        raw.normalizer = normalizers.NFC()
    raw.decoder = decoders.ByteLevel()
    _add_whole_tokens(raw, opened, tokens, (_CONTROL,))
    return raw, rule.adds_bos


def _split_rule(opened: GGUFModel) -> SplitRule:
    name = opened.field("tokenizer.ggml.pre", "default")
    if name not in SPLIT_RULES:
        raise ModelError(
            f"'{opened.path}' splits texts by the rule {reprlib.repr(name)}, which is not known here; known are "
            f"{', '.join(SPLIT_RULES)}. Give the model's folder of transformers and quantize instead."
        )
    return SPLIT_RULES[name]


def _sentencepiece(opened: GGUFModel, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """As `_byte_pairs`, of a SentencePiece model, which joins the neighbours whose token has the highest score."""
    from tokenizers import decoders, normalizers

    scores = opened.field("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise ModelError(f"The tokenizer of '{opened.path}' does not fit together: it has {len(scores)} scores")
    unknown = opened.field("tokenizer.ggml.unknown_token_id", 0)
    options = {"unk_token": tokens[unknown]} if 0 <= unknown < len(tokens) else {}
    raw = _pairs(opened, tokens, _merges(opened, tokens, scores), fuse_unk=True, byte_fallback=True, **options)
    begins = bool(opened.field("tokenizer.ggml.add_space_prefix", True))
    prefix = [normalizers.Prepend(_SPACE)] if begins else []
    raw.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if begins else [])])
    _add_whole_tokens(raw, opened, tokens, (_CONTROL, _UNKNOWN))
    return raw, True


def _merges(opened: GGUFModel, tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores stand for: every way to make a token of two, the best token first."""
    kinds = opened.field("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    normal = {token for token, kind in zip(tokens, kinds, strict=False) if kind == _NORMAL}
    order = sorted(range(len(tokens)), key=lambda index: -scores[index])
    return [
        (token[:cut], token[cut:])
        for token in (tokens[index] for index in order)
        if token in normal
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]


def _pairs(opened: GGUFModel, tokens: list[str], merges: list[Any], **options: Any) -> Tokenizer:
    from tokenizers import Tokenizer, models

    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:  # tokenizers raises nothing narrower
        said = one_line(error)[:200]
        raise ModelError(f"The tokenizer of '{opened.path}' does not fit together: {said}") from None


def _add_whole_tokens(raw: Tokenizer, opened: GGUFModel, tokens: list[str], special: tuple[int, ...]) -> None:
    """Tokens that are found in a text before it is split: special ones, and those of users."""
    from tokenizers import AddedToken

    added: dict[bool, list[Any]] = {True: [], False: []}
    for token, kind in zip(tokens, opened.field("tokenizer.ggml.token_type", []), strict=False):
        if kind in special or kind == _USER:
            added[kind in special].append(AddedToken(token, normalized=False, special=kind in special))
    raw.add_special_tokens(added[True])
    raw.add_tokens(added[False])


def _special_words(opened: GGUFModel, tokens: list[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: opened.field(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    words = {name: tokens[index] for name, index in ids.items() if index is not None and 0 <= index < len(tokens)}
    return {"pad_token": words["eos_token"], **words} if "eos_token" in words else words


def _add_ends(raw: Tokenizer, opened: GGUFModel, words: dict[str, str], adds_bos: bool) -> None:
    """Tokens that every text begins and ends with."""
    from tokenizers import processors

    def end(name: str, default: bool) -> list[str]:
        wanted = opened.field(f"tokenizer.ggml.add_{name}_token", default)
        return [words[f"{name}_token"]] if wanted and f"{name}_token" in words else []

    before, after = end("bos", adds_bos), end("eos", False)
    if before or after:
        first, second = [*before, "$A", *after], [*before, "$B", *after]
        raw.post_processor = processors.TemplateProcessing(
            single=first,
            pair=[*first, *second],
            special_tokens=[(token, raw.token_to_id(token)) for token in {*before, *after}],
        )
