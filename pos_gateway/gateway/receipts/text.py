"""A paper as plain text, so many columns wide."""

from __future__ import annotations

from collections.abc import Iterator

from pos_gateway.gateway.receipts.paper import Centred, Line, Pair, Paper, Qr, Rule, Weight, width, wrapped


def as_text(paper: Paper, columns: int = 42) -> str:
    lines: list[str] = []
    marks = [Centred(f"*** {paper.watermark} ***", Weight.STRONG)] if paper.watermark else []
    for line in (*marks, *paper.lines, *marks):
        lines += draw(line, columns)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def draw(line: Line, columns: int) -> Iterator[str]:
    """One line of the paper, in as many of the text as it needs."""
    match line:
        case Centred(text):
            for part in wrapped(text, columns):
                yield " " * ((columns - width(part)) // 2) + part
        case Pair(name, value):
            room = columns - width(name) - width(value)
            if room >= 1:
                yield name + " " * room + value
            else:
                yield name
                for part in wrapped(value, columns - 2):
                    yield " " * (columns - width(part)) + part
        case Rule():
            yield "-" * columns
        case Qr(data, caption):
            yield from wrapped(caption, columns)
            yield from wrapped(data, columns)
