"""How every command speaks: people read sentences, programs read `--json`, both read the exit code.

0  done, approved, authentic, all well
1  a clear no: declined, not authentic, something is wrong
2  the command line was wrong
3  input that cannot be read: configuration, a file, a body
4  something signed does not verify
5  a part is not there now: ledger, reader, gateway, disk
6  the same id with other content
7  not found
70 a bug here, or an outcome that is not known
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from pos_gateway.errors import (
    AuthenticationFailed,
    CardNotSupported,
    Conflict,
    InvalidInput,
    NotFound,
    NotPermitted,
    PosGatewayError,
    Unavailable,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

EXIT_NO: Final = 1
EXIT_INTERNAL: Final = 70

_TELL_EVERY_S: Final = 1.0

_EXIT_CODES: Final[tuple[tuple[type[PosGatewayError], int], ...]] = (
    (InvalidInput, 3),
    (AuthenticationFailed, 4),
    (Unavailable, 5),
    (Conflict, 6),
    (NotFound, 7),
    (CardNotSupported, EXIT_NO),
    (NotPermitted, EXIT_NO),
)


def emit(data: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Say a result once, in the form that was asked for."""
    if as_json:
        print(json.dumps(data, ensure_ascii=False))
    else:
        print(text)


def emit_rows(
    name: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, as_json: bool, empty: str
) -> None:
    """A list: a table for people, `{name: [row, …]}` as JSON. Column names are the rows' keys."""
    found = list(rows)
    if as_json:
        print(json.dumps({name: found}, ensure_ascii=False))
    elif not found:
        print(empty)
    else:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in columns:
            table.add_column(column.replace("_", " "))
        for row in found:
            table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
        Console(soft_wrap=True).print(table)


def fail(error: PosGatewayError, *, as_json: bool) -> int:
    """Tell a failure; returns the exit code."""
    if as_json:
        told = {"code": type(error).__name__, "reason": error.reason, "advice": error.advice}
        print(json.dumps({"error": told}, ensure_ascii=False))
    else:
        print(f"pos-gateway: {error.reason}", file=sys.stderr)
        if error.advice:
            print(f"  → {error.advice}", file=sys.stderr)
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), EXIT_INTERNAL)


def announce(data: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """What a server says once it is ready: told at once, even into a pipe."""
    print(json.dumps(data, ensure_ascii=False) if as_json else text, flush=True)


def percent(ppm: int) -> str:
    """A rate in parts per million, as people read it: two decimals, half-up."""
    hundredths = (ppm + 50) // 100
    return f"{hundredths // 100}.{hundredths % 100:02d} %"


@contextmanager
def telling(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of long work, on stderr, at most once a second: nothing is said of what is short."""
    told = time.monotonic()

    def tell(done: int, of: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _TELL_EVERY_S:
            told = time.monotonic()
            print(f"{what} {done} of {of} ({100 * done // max(of, 1)} %)", file=sys.stderr, flush=True)

    yield tell
