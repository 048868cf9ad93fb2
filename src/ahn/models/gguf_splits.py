"""How tokenizers of byte-level pairs split a text before they merge parts of it, by the names of GGUF files.

The patterns are those of the models' own tokenizer.json, written for the regular expressions of `tokenizers`.
"""

from __future__ import annotations

from typing import NamedTuple

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = """
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5
3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15
1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC
1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D
212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B
A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB
10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""
_MARKS = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"
_EAST_ASIAN = "4E00-9FA5 800-4E00 AC00-D7FF"


class SplitRule(NamedTuple):
    """A rule.

    Attributes:
        patterns: What each of them matches is split off, one pattern after the other.
        whole_words: Whether a part that is a token needs no merges.
        adds_bos: Whether a text begins with a token of its own where the file does not say.
        composed: Whether characters are composed first (NFC).
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False
    composed: bool = False


def _in(ranges: str) -> str:
    """A class of characters given by ranges of code points in hexadecimal."""
    ends = (part.split("-") for part in ranges.split())
    return "[" + "".join("-".join(f"\\x{{{end}}}" for end in pair) for pair in ends) + "]"


def _words(numbers: str) -> str:
    """The rule of Llama 3 and Qwen 2, which differ in how many digits stay together."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"


def _cased_words(numbers: str, contractions: str = "") -> str:
    """The rule of Tekken and GPT-4o, which also split where a capital follows a small letter."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{start}{_UPPER}*{_LOWER}+{contractions}|{start}{_UPPER}+{_LOWER}*{contractions}"
        rf"|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
    )


_LLAMA3 = SplitRule((_words(r"\p{N}{1,3}"),), whole_words=True, adds_bos=True)
_DIGITS = SplitRule((_DIGIT, _GPT2))
SPLIT_RULES = {
    "default": SplitRule((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": SplitRule((_GPT2,)),
    "phi-2": SplitRule((_GPT2,)),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": SplitRule((_words(_DIGIT),), composed=True),
    "deepseek-r1-qwen": SplitRule((_words(_DIGIT),)),
    "deepseek-llm": SplitRule(
        (r"[\r\n]", rf"\s?{_in(_CASED)}+", rf"\s?{_in(_MARKS)}+", r"\s+$", f"{_in(_EAST_ASIAN)}+", _DIGIT)
    ),
    "deepseek-coder": SplitRule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"{_in(_EAST_ASIAN)}+", _DIGIT)),
    "tekken": SplitRule((_cased_words(_DIGIT),), whole_words=True, adds_bos=True),
    "gpt-4o": SplitRule((_cased_words(r"\p{N}{1,3}", rf"{_CONTRACTIONS}?"),)),
}
"""The rules by their names in `tokenizer.ggml.pre`; files without that key are read by "default"."""
