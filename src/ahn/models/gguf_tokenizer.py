"""Tokenizers of GGUF files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ahn.errors import ModelError, one_line
from ahn.models.gguf_model import GGUFModel
from ahn.models.heap import trim_heap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL_TOKEN, _USER_TOKEN = 3, 4  # gguf.TokenType
_DIGITS = "digits"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is split before its parts are merged, by tokenizer.ggml.pre: GPT-2's way, that after every digit, or a
# pattern. The patterns are those of the models' own tokenizer.json.
_SPLITS = {
    "gpt-2": "",
    "smollm": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}


def load_gguf_tokenizer(opened: GGUFModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its chat template.

    Args:
        opened: The file.

    Raises:
        ModelError: The file has none, or one that cannot be read.
    """
    kind, tokens = opened.field("tokenizer.ggml.model"), opened.field("tokenizer.ggml.tokens")
    if not kind or not tokens:
        raise ModelError(f"'{opened.path}' has no tokenizer: take another file, or a folder of transformers")
    tokenizer = _byte_pairs(opened, tokens) if kind == "gpt2" else _of_transformers(opened)
    if template := opened.field("tokenizer.chat_template"):
        tokenizer.chat_template = template
    tokenizer.model_max_length = 10**30  # a memory reads past the trained context
    del tokens
    trim_heap()
    return tokenizer


def _byte_pairs(opened: GGUFModel, tokens: list[str]) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in opened.field("tokenizer.ggml.merges", [])]
    try:
        raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"The tokenizer of '{opened.path}' does not fit together: {error}") from None
    raw.pre_tokenizer = pre_tokenizers.Sequence(_split(opened))
    raw.decoder = decoders.ByteLevel()
    kinds = opened.field("tokenizer.ggml.token_type", [])
    added = {token: kind for token, kind in zip(tokens, kinds, strict=False) if kind in (_CONTROL_TOKEN, _USER_TOKEN)}
    raw.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in added.items() if k == _CONTROL_TOKEN]
    )
    raw.add_tokens([AddedToken(t, normalized=False) for t, k in added.items() if k == _USER_TOKEN])
    words = _special_words(opened, tokens)
    if opened.field("tokenizer.ggml.add_bos_token", False) and "bos_token" in words:
        bos = words["bos_token"]
        pair = [(bos, tokens.index(bos))]
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=pair
        )
    return PreTrainedTokenizerFast(tokenizer_object=_Whole(raw), clean_up_tokenization_spaces=False, **words)


class _Whole:
    """Stands for a tokenizer that nobody else has: transformers takes a deep copy, of which two would be one too many.

    Args:
        raw: The tokenizer.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def __deepcopy__(self, memo: Any) -> Any:
        return self.raw


def _split(opened: GGUFModel) -> list[Any]:
    """How a text is split before its parts are merged."""
    from tokenizers import Regex, pre_tokenizers

    name = opened.field("tokenizer.ggml.pre", "gpt-2")
    if name not in _SPLITS:
        raise ModelError(
            f"'{opened.path}' splits texts by the rule {name!r}, which is not known here; known are "
            f"{', '.join(_SPLITS)}. Give the model's folder of transformers and quantize instead."
        )
    rule = _SPLITS[name]
    if rule in ("", _DIGITS):
        digits = [pre_tokenizers.Digits(individual_digits=True)] if rule else []
        return [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    by_rule = pre_tokenizers.Split(Regex(rule), behavior="isolated")
    return [by_rule, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def _special_words(opened: GGUFModel, tokens: list[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: opened.field(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    words = {name: tokens[index] for name, index in ids.items() if index is not None and 0 <= index < len(tokens)}
    return {"pad_token": words["eos_token"], **words} if "eos_token" in words else words


def _of_transformers(opened: GGUFModel) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers reads it, for all kinds but byte-level pairs."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            opened.path.parent, gguf_file=opened.path.name
        )
    except Exception as error:  # what transformers raises depends on the part that it could not read
        said = one_line(error)[:200]
        raise ModelError(f"The tokenizer of '{opened.path}' cannot be read: {said}") from None
    return tokenizer
