"""JSON as TorchServe's Gson reads it: quotes may be single or left out, comments are skipped, `=` and `;` separate too.

Source: com.google.gson.stream.JsonReader (lenient), com.google.gson.Gson (fromJson), both in model-server.jar.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
WORD = re.compile(r"[^/\\;#=\t\n\f\r {}\[\]:,]+")
SPACE = re.compile(r"[ \t\r\n]+|/\*.*?\*/|(?://|#)[^\r\n]*", re.DOTALL)
ESCAPES = {"t": "\t", "b": "\b", "n": "\n", "r": "\r", "f": "\f"} | {letter: letter for letter in "\n'\"\\/"}
KEYWORDS = {"true": True, "false": False, "null": None}


class GsonError(ValueError):
    """Gson throws here; the message says why."""


class Number(str):
    """A number as it is written; a quoted one is a plain string."""

    __slots__ = ()


class Pairs(list[tuple[str, Any]]):
    """An object with its names in order, each as often as it is written."""


def parse(text: str) -> Any:
    """Return what Gson makes of ``text``: Pairs, lists, str, Number, bool or None, which an empty text is too.

    Raises:
        GsonError: it is no JSON, even so.
    """
    reader = _Reader(text)
    if reader.ended():
        return None
    value = reader.value()
    rest = text[reader.at :].strip(" \t\r\n")
    if rest and value is not None:
        raise GsonError(f"there is more behind its end: {rest[:20]!r}")
    return value


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self._skip()
        if text.startswith(")]}'\n", self.at):
            self.at += 5

    def _skip(self) -> None:
        while space := SPACE.match(self.text, self.at):
            self.at = space.end()

    def ended(self) -> bool:
        self._skip()
        return self.at >= len(self.text)

    def _next(self) -> str:
        """Return the next letter that is no space, without taking it."""
        if self.ended():
            raise GsonError("it ends too early")
        return self.text[self.at]

    def value(self) -> Any:
        letter = self._next()
        if letter in "{[":
            self.at += 1
            return self._object() if letter == "{" else self._array()
        if letter in "'\"":
            return self._quoted()
        word = self._word("a value")
        if word.lower() in KEYWORDS:
            return KEYWORDS[word.lower()]
        return Number(word) if NUMBER.fullmatch(word) else word

    def _take(self, letters: str, problem: str) -> str:
        """Take the next letter that is no space, which must be one of these."""
        if self._next() not in letters:
            raise GsonError(problem)
        self.at += 1
        return self.text[self.at - 1]

    def _object(self) -> Pairs:
        pairs = Pairs()
        if self._next() == "}":
            self.at += 1
            return pairs
        while True:
            name = self._quoted() if self._next() in "'\"" else self._word("a name")
            if self._take(":=", f"there is no ':' behind {name!r}") == "=" and self.text.startswith(">", self.at):
                self.at += 1
            pairs.append((name, self.value()))
            if self._take(",;}", f"there is no ',' or '}}' behind the value of {name!r}") == "}":
                return pairs

    def _array(self) -> list[Any]:
        elements: list[Any] = []
        if self._next() == "]":
            self.at += 1
            return elements
        while True:
            elements.append(None if self._next() in ",;]" else self.value())
            if self._take(",;]", "there is no ',' or ']' behind an element of a list") == "]":
                return elements

    def _word(self, wanted: str) -> str:
        word = WORD.match(self.text, self.at)
        if word is None:
            raise GsonError(f"{wanted} is missing before {self.text[self.at : self.at + 20]!r}")
        self.at = word.end()
        return word[0]

    def _quoted(self) -> str:
        quote = self.text[self.at]
        letters: list[str] = []
        self.at += 1
        while self.at < len(self.text):
            letter = self.text[self.at]
            self.at += 1
            if letter == quote:
                return "".join(letters)
            letters.append(self._escaped() if letter == "\\" else letter)
        raise GsonError(f"a {quote} is never closed")

    def _escaped(self) -> str:
        letter = self.text[self.at : self.at + 1]
        self.at += 1
        if letter == "u":
            code = self.text[self.at : self.at + 4]
            self.at += 4
            if not re.fullmatch(r"[0-9a-fA-F]{4}", code):
                raise GsonError(f"\\u{code} is no character")
            return chr(int(code, 16))
        if letter not in ESCAPES:
            raise GsonError(f"\\{letter} means nothing")
        return ESCAPES[letter]


def strict(value: Any) -> Any:
    """Return a parsed value as Python's json has it; of names that are there twice the last counts."""
    if isinstance(value, Number):
        return json.loads(value)
    if isinstance(value, Pairs | dict):
        return {name: strict(inner) for name, inner in dict(value).items()}
    return [strict(inner) for inner in value] if isinstance(value, list) else value


def model_map(value: Any) -> dict[str, dict[str, dict[str, Any]] | None] | None:
    """Return what a parsed value is as Gson's Map<String, Map<String, JsonObject>>; a map may be null.

    Raises:
        GsonError: it is none.
    """
    models = _map(value, "the outermost value")
    if models is None:
        return None
    found: dict[str, dict[str, dict[str, Any]] | None] = {}
    for model, inner in models.items():
        versions = found[model] = _map(inner, f"what {model!r} has")
        for version, settings in (versions or {}).items():
            if not isinstance(settings, Pairs):
                raise GsonError(f"{version!r} of {model!r} must be a version that has an object {{...}}")
            versions[version] = dict(settings)  # type: ignore[index]
    return found


def _map(value: Any, what: str) -> dict[str, Any] | None:
    if value is None:
        return None
    pairs = value
    if type(value) is list and all(type(pair) is list and len(pair) == 2 for pair in value):
        pairs = [(str(name), inner) for name, inner in value]  # a list of pairs is a map for Gson
    elif not isinstance(value, Pairs):
        raise GsonError(f"{what} must be an object {{...}}")
    found: dict[str, Any] = {}
    for name, inner in pairs:
        if name in found:
            raise GsonError(f"{name!r} is there twice")
        found[name] = inner
    return found


def as_int(value: Any) -> int | None:
    """Return what JsonElement.getAsInt makes of a value; None for a list, which TorchServe then overlooks.

    Raises:
        GsonError: it throws, and TorchServe does not catch that.
    """
    if isinstance(value, list) and not isinstance(value, Pairs):
        return as_int(value[0]) if len(value) == 1 else None
    if isinstance(value, Number):
        exact = Decimal(value)
        whole = int(exact) if exact.adjusted() < 400 else 0
        return (whole + 2**31) % 2**32 - 2**31
    number = java_int(value) if isinstance(value, str) else None
    if number is None:
        raise GsonError(f"{'null' if value is None else 'an object' if isinstance(value, Pairs) else repr(value)}")
    return number


def java_int(text: str, bits: int = 32) -> int | None:
    """Return the number that Integer.parseInt reads, or Long.parseLong with 64 bits; None where it throws."""
    if not re.fullmatch(r"[+-]?\d+", text) or len(text.lstrip("+-0")) > 20:
        return None
    return number if -(2 ** (bits - 1)) <= (number := int(text)) < 2 ** (bits - 1) else None
