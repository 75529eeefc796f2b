"""A paper before it is printed: lines that text, HTML, PDF and ESC/POS each draw in their own way."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Weight(Enum):
    """How much a line is to be noticed."""

    PLAIN = "plain"
    STRONG = "strong"
    BIG = "big"
    SMALL = "small"


@dataclass(frozen=True, slots=True)
class Centred:
    text: str
    weight: Weight = Weight.PLAIN


@dataclass(frozen=True, slots=True)
class Pair:
    """A name on the left, a value on the right."""

    name: str
    value: str
    weight: Weight = Weight.PLAIN


@dataclass(frozen=True, slots=True)
class Rule:
    """A line across."""


@dataclass(frozen=True, slots=True)
class Qr:
    """A QR code, with the words below it."""

    data: str
    caption: str


Line = Centred | Pair | Rule | Qr


@dataclass(frozen=True, slots=True)
class Paper:
    """`language`: BCP 47. `watermark`: printed above, below and behind; empty for none."""

    title: str
    language: str
    lines: Sequence[Line]
    watermark: str = ""


def width(text: str) -> int:
    """In columns of a printer or a terminal: Chinese takes two (Unicode Annex 11)."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def wrapped(text: str, columns: int) -> list[str]:
    """Lines of at most so many columns, broken at blanks where there are any."""
    lines: list[str] = []
    line = ""
    for word in text.split(" "):
        candidate = f"{line} {word}" if line else word
        if width(candidate) <= columns:
            line = candidate
            continue
        if line:
            lines.append(line)
        line = ""
        for character in word:
            if width(line + character) > columns:
                lines.append(line)
                line = ""
            line += character
    return [*lines, line]
