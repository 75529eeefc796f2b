"""A paper as PDF, as wide as a roll and as long as it needs.

Latin in the PDF standard fonts; Chinese in Adobe's STSong-Light, which viewers bring along, so that no
font of many megabytes has to be carried by every till.
"""

from __future__ import annotations

import io
from typing import Final

import segno
from reportlab.lib.units import mm
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.cidfonts import UnicodeCIDFont
from reportlab.pdfgen.canvas import Canvas

from pos_gateway.gateway.receipts.paper import Centred, Line, Pair, Paper, Qr, Rule, Weight

_WIDTH: Final = 80 * mm
_MARGIN: Final = 6 * mm
_QR: Final = 40 * mm
_SIZES: Final = {Weight.PLAIN: 9.0, Weight.STRONG: 9.5, Weight.BIG: 17.0, Weight.SMALL: 7.5}
_CHINESE: Final = "STSong-Light"

pdfmetrics.registerFont(UnicodeCIDFont(_CHINESE))


def as_pdf(paper: Paper) -> bytes:
    heights = [_height(line) for line in paper.lines]
    height = sum(heights) + 2 * _MARGIN + (24 if paper.watermark else 0)
    out = io.BytesIO()
    canvas = Canvas(out, pagesize=(_WIDTH, height), invariant=True)
    canvas.setTitle(paper.title)
    canvas.setAuthor("POS Gateway")
    y = height - _MARGIN
    if paper.watermark:
        _mark(canvas, paper.watermark, height)
        y -= 12
    for line, needed in zip(paper.lines, heights, strict=True):
        _draw(canvas, line, y)
        y -= needed
    canvas.showPage()
    canvas.save()
    return out.getvalue()


def _mark(canvas: Canvas, text: str, height: float) -> None:
    canvas.saveState()
    canvas.setFillGray(0.82)
    canvas.translate(_WIDTH / 2, height / 2)
    canvas.rotate(55)
    canvas.setFont(_font(text, strong=True), 26)
    canvas.drawCentredString(0, 0, text)
    canvas.restoreState()


def _font(text: str, *, strong: bool) -> str:
    if any(ord(character) > 0x24F and character not in "•–—…“”‘’€" for character in text):
        return _CHINESE
    return "Helvetica-Bold" if strong else "Helvetica"


def _parts(line: Centred | Pair) -> list[tuple[str, str, str]]:
    """Of each printed line: how it is set, left or centre or right; its text; its font."""
    strong = line.weight in (Weight.STRONG, Weight.BIG)
    size, room = _SIZES[line.weight], _WIDTH - 2 * _MARGIN
    if isinstance(line, Centred):
        font = _font(line.text, strong=strong)
        return [("centre", part, font) for part in _wrapped(line.text, font, size, room)]
    name_font, value_font = _font(line.name, strong=strong), _font(line.value, strong=strong)
    taken = pdfmetrics.stringWidth(line.name + " ", name_font, size)
    if taken + pdfmetrics.stringWidth(line.value, value_font, size) <= room:
        return [("left", line.name, name_font), ("same", line.value, value_font)]
    values = [("right", part, value_font) for part in _wrapped(line.value, value_font, size, room)]
    return [("left", line.name, name_font), *values]


def _wrapped(text: str, font: str, size: float, room: float) -> list[str]:
    lines, line = [], ""
    for word in text.split(" "):
        candidate = f"{line} {word}" if line else word
        if pdfmetrics.stringWidth(candidate, font, size) <= room:
            line = candidate
            continue
        if line:
            lines.append(line)
        line = ""
        for character in word:
            if line and pdfmetrics.stringWidth(line + character, font, size) > room:
                lines.append(line)
                line = ""
            line += character
    return [*lines, line]


def _height(line: Line) -> float:
    match line:
        case Rule():
            return 9.0
        case Qr():
            return _QR + 14.0
        case _:
            rows = sum(1 for place, _, _ in _parts(line) if place != "same")
            return rows * _SIZES[line.weight] * 1.35


def _draw(canvas: Canvas, line: Line, y: float) -> None:
    match line:
        case Rule():
            canvas.setLineWidth(0.5)
            canvas.line(_MARGIN, y - 3, _WIDTH - _MARGIN, y - 3)
        case Qr(data, caption):
            _draw_qr(canvas, data, y)
            canvas.setFont(_font(caption, strong=False), 7)
            canvas.drawCentredString(_WIDTH / 2, y - _QR - 8, caption)
        case Centred() | Pair():
            size = _SIZES[line.weight]
            y -= size
            for number, (place, text, font) in enumerate(_parts(line)):
                canvas.setFont(font, size)
                if number and place != "same":
                    y -= size * 1.35
                if place == "centre":
                    canvas.drawCentredString(_WIDTH / 2, y, text)
                elif place == "left":
                    canvas.drawString(_MARGIN, y, text)
                else:
                    canvas.drawRightString(_WIDTH - _MARGIN, y, text)


def _draw_qr(canvas: Canvas, data: str, y: float) -> None:
    matrix = segno.make_qr(data, error="m").matrix
    step = _QR / len(matrix)
    left = (_WIDTH - _QR) / 2
    for row, modules in enumerate(matrix):
        for column, dark in enumerate(modules):
            if dark & 1:
                canvas.rect(left + column * step, y - (row + 1) * step, step, step, stroke=0, fill=1)
