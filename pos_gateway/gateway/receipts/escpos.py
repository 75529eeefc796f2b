"""A paper for a receipt printer: ESC/POS bytes, and the way to the printer."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Final

from escpos.printer import Dummy

from pos_gateway.errors import Unavailable
from pos_gateway.gateway.receipts.paper import Centred, Pair, Paper, Qr, Weight
from pos_gateway.gateway.receipts.text import draw

_TIMEOUT_S: Final = 5.0
_GB18030: Final = b"\x1c&"
_NOT_CHINESE: Final = b"\x1c."
"""FS & and FS .: two-byte characters on and off, on printers sold for China."""


def as_escpos(paper: Paper, columns: int = 42) -> bytes:
    printer: Any = Dummy()
    printer.hw("INIT")
    mark = f"*** {paper.watermark} ***" if paper.watermark else ""
    lines = [Centred(mark, Weight.STRONG)] if mark else []
    for line in (*lines, *paper.lines, *lines):
        match line:
            case Qr(data, caption):
                printer.set(align="center")
                printer.qr(data, native=True, size=4)
                printer.set(align="left")
                _say(printer, Centred(caption, Weight.SMALL), columns)
            case _:
                _say(printer, line, columns)
    printer.cut()
    output: bytes = printer.output
    return output


def _say(printer: Any, line: Any, columns: int) -> None:
    weight = line.weight if isinstance(line, (Centred, Pair)) else Weight.PLAIN
    big = weight is Weight.BIG
    printer.set(bold=weight in (Weight.STRONG, Weight.BIG), double_height=big, double_width=big)
    for text in draw(line, columns // 2 if big else columns):
        text = text.rstrip()
        if text.isascii():
            printer._raw(text.encode() + b"\n")
        else:
            printer._raw(_GB18030 + text.encode("gb18030", "replace") + _NOT_CHINESE + b"\n")
    printer.set(bold=False, double_height=False, double_width=False, normal_textsize=True)


def send(address: str, data: bytes) -> None:
    """`address`: tcp:HOST:PORT or file:PATH.

    Raises:
        Unavailable: there is no printer, or it does not take it.
    """
    kind, _, place = address.partition(":")
    if not place:
        raise Unavailable("no receipt printer is set up", advice="name it in gateway.toml, [printer] address")
    try:
        if kind == "file":
            with Path(place).open("ab", buffering=0) as device:
                device.write(data)
            return
        host, _, port = place.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT_S) as connection:
            connection.sendall(data)
    except OSError as error:
        raise Unavailable(
            f"the receipt printer does not answer: {error.strerror or 'no connection'}",
            advice="check its paper, cable and power; the receipt can be shown again",
        ) from None
