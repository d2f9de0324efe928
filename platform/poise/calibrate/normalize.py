"""Normalisation of answers, so that two spellings of one answer are equal and different answers stay different.

As in SQuAD (Rajpurkar et al., EMNLP 2016), case, punctuation, articles and spacing are removed. Unlike SQuAD, symbols
with a meaning stay: signs, decimal points, exponents, fractions, ranges, times, currencies, C++ and C#.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

__all__ = ["normalised"]

_ARTICLES = frozenset({"a", "an", "the"})
_TRADEMARKS = frozenset("\u2122\u00ae\u00a9\u2120")
_EQUIVALENT = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("\u2044\u2215", "/"),
        **dict.fromkeys("\u2018\u2019\u02bc\u2032", "'"),
        "\u22c5": "\u00b7",
        "&": " and ",
    }
)
_CURRENCY = "$\u00a3\u20ac\u00a5\u20b9\u20bd"

_FORMULA = re.compile(r"\$(?=\S)([^$]+)(?<=\S)\$(?!\d)")  # by the rule of Pandoc, so not $5-$6
_THOUSANDS = re.compile(r"(?<![\d.,'])[1-9]\d{0,2}(?:([,'])\d{3})(?:\1\d{3})*(?![\d']|,\d)")
_SPACED_DIGITS = re.compile(r"(?<=\d)\s*([-/])\s*(?=\d)")
_SPACED_SIGN = re.compile(r"(?<=\w)\s*([=<>\u00d7\u00f7^])\s*(?=[\w-])")
_SPACED_UNIT = re.compile(rf"(?<=\d)\s+(?=[%\u00b0])|(?<=[{_CURRENCY}])\s+(?=\d)")
_BARE_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_FIRST_NUMBER = re.compile(rf"([-{_CURRENCY}]*\d+)\.(\d+)(?=[^\d.,:/'-]|$)")
_SEPARATORS = re.compile(r"(?<=\w)[,;:!?()\[\]{}]+(?=\w)")
_MEANINGFUL = re.compile(
    r"(?<=\d)[^\w\s]+(?=\d)"  # 1/2, 10-12, 1,5, 10:30, 3.5
    rf"|(?<![\w)%])-(?=[{_CURRENCY}]?\d)"  # a sign
    r"|(?<=[^\W\d_])#"  # C#
    r"|(?<=\d)%"
    r"|(?<=\w)\^(?=[\w-])|(?<=\^)-(?=\d)"  # an exponent
    r"|(?<=\w)@(?=\w)"
)
_SYMBOLS = "`|~^"
"""Symbols that count as punctuation here, though not in Unicode. The others, + < = > and currencies, stay."""


@lru_cache(maxsize=65_536)
def normalised(answer: str) -> str:
    """The answer without case, punctuation, articles, extra spaces and invisible characters.

    Each number has one form: 1,000 is 1000, .50 is 0.5, a half sign is 1/2, 10 with a raised 2 is 10^2, digits of other
    scripts are 0-9. An `a` that is the last word or stands before a single letter is not an article, so that Hepatitis
    A and the choices A, B do not change. Trailing zeros of decimals are removed only from a number that begins the
    answer: Python 3.10 is not Python 3.1. In an answer of articles or punctuation only, nothing is removed. The time is
    linear in the length of the answer.
    """
    text = _fold(answer).translate(_EQUIVALENT).replace("''", '"')
    text = _FORMULA.sub(r"\1", text)
    text = _THOUSANDS.sub(_without_separators, text)
    text = _SPACED_DIGITS.sub(r"\1", text)
    text = _SPACED_SIGN.sub(r"\1", text)
    text = _SPACED_UNIT.sub("", text)
    text = _BARE_POINT.sub("0.", text)
    plain = " ".join(text.split())
    words = _without_punctuation(plain).split()
    result = " ".join(word for index, word in enumerate(words) if not _is_article(words, index)) or plain
    if _FIRST_NUMBER.match(result):
        result = _FIRST_NUMBER.sub(_without_zeros, result, count=1)
    return result


def _fold(text: str) -> str:
    """NFKC and case folding that keep exponents and fractions apart from the digits before them."""
    if not text.isascii():
        text = "".join(
            _decompose(character, text[index - 1 : index], text[index + 1 : index + 2])
            for index, character in enumerate(text)
        )
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return text.casefold()


def _decompose(character: str, before: str = "", after: str = "") -> str:
    """A character with its compatibility form replaced by plain characters, given its neighbours ('' at an end)."""
    category = unicodedata.category(character)
    if category == "Cf" or character in _TRADEMARKS or "\ufe00" <= character <= "\ufe0f":
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    form = unicodedata.decomposition(character)
    if not form.startswith("<"):
        return character
    kind, *codes = form.split()
    inner = "".join(chr(int(code, 16)) for code in codes)
    if kind == "<super>" and (inner.isdigit() or inner in "+-\u2212"):
        is_first = not before or unicodedata.decomposition(before)[:7] != "<super>"
        return ("^" if is_first else "") + inner
    if kind == "<fraction>":
        return (" " if before.isdigit() else "") + inner
    if kind == "<sub>" and inner.isdigit():  # log of base 2 of 8 is not log 28, and H2O is H2O
        return (" " if before.isdigit() else "") + inner + (" " if after.isdigit() and after.isascii() else "")
    return "".join(map(_decompose, inner))


def _without_punctuation(text: str) -> str:
    """The text without punctuation that has no meaning; punctuation between two words becomes a space."""
    meaningful = {place for match in _MEANINGFUL.finditer(text) for place in range(*match.span())}
    separators = {place for match in _SEPARATORS.finditer(text) for place in range(*match.span())}
    characters = []
    for place, character in enumerate(text):
        if place in meaningful or not _is_punctuation(character):
            characters.append(character)
        elif place in separators:
            characters.append(" ")
    return re.sub(r"(?<!\w)\+(?=\d)", "", "".join(characters))  # a plus sign before a number


def _is_article(words: list[str], index: int) -> bool:
    if words[index] != "a":
        return words[index] in _ARTICLES
    following = words[index + 1] if index + 1 < len(words) else "."
    return len(following) > 1 or following.isdigit()


def _is_punctuation(character: str) -> bool:
    return character in _SYMBOLS or unicodedata.category(character).startswith("P")


def _without_separators(number: re.Match[str]) -> str:
    """A number without its thousands separators."""
    return re.sub(r"[,']", "", number[0])


def _without_zeros(number: re.Match[str]) -> str:
    """A decimal number without trailing zeros."""
    decimals = number[2].rstrip("0")
    return f"{number[1]}.{decimals}" if decimals else number[1]
