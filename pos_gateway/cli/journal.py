"""`journal list|show|verify|export|backup`: what the gateway has recorded, whether it runs or not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO
from uuid import UUID

import typer

from pos_gateway.cli.places import GATEWAY_HOME, GatewayHome
from pos_gateway.cli.terminal import Json, emit, emit_rows
from pos_gateway.errors import Conflict, InvalidInput, Unavailable
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.identity import load_identity
from pos_gateway.gateway.journal import JournalReader
from pos_gateway.records import Record, canonical_json

app = typer.Typer(no_args_is_help=True, help="The gateway's durable, signed journal.")


@app.command("list")
def list_records(
    after: Annotated[int, typer.Option(help="Only records with a higher sequence.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Records in order, oldest first."""
    with JournalReader.open(Home(home).journal) as journal:
        rows = [_row(record) for record in journal.records(after, limit)]
    if not as_json:
        rows = [row | {"what": _what(row["facts"])} for row in rows]
    emit_rows("records", ("sequence", "kind", "what", "id"), rows, as_json=as_json, empty="No record there.")


@app.command()
def show(record_id: str, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """One record, and what was recorded about it since."""
    try:
        wanted = UUID(record_id)
    except ValueError:
        raise InvalidInput("not a UUID", where="record id") from None
    with JournalReader.open(Home(home).journal) as journal:
        record = _row(journal.get(wanted))
        about = [_row(other) for other in journal.about(wanted) if other.id != wanted]
    lines = [f"{record['kind']} {record['sequence']}  {record['id']}"]
    lines += [f"  {name}: {value}" for name, value in record["facts"].items()]
    lines += [f"  then {other['kind']} {other['sequence']}: {_what(other['facts'])}" for other in about]
    emit(record | {"about": about}, "\n".join(lines), as_json=as_json)


@app.command()
def verify(home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Check sequence, chain, hash and signature of every record. Exit code 4 names the one that fails."""
    place = Home(home)
    key = load_identity(place.identity_key).public_key()
    with JournalReader.open(place.journal) as journal:
        count = journal.verify(key)
    emit({"verified": count}, f"{count} records: gap-free, unchanged, all signed here.", as_json=as_json)


@app.command()
def backup(file: Path, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Copy the journal into FILE while the gateway runs, and verify the copy."""
    place = Home(home)
    key = load_identity(place.identity_key).public_key()
    with JournalReader.open(place.journal) as journal:
        count = journal.backup(file, key)
    data = {"file": str(file), "records": count, "bytes": file.stat().st_size}
    emit(data, f"{file}: {count} records, verified.", as_json=as_json)


@app.command()
def export(
    file: Annotated[Path | None, typer.Argument(help="A new file; standard output if not said.")] = None,
    after: Annotated[int, typer.Option(help="Only records with a higher sequence.")] = 0,
    home: GatewayHome = GATEWAY_HOME,
) -> None:
    """For auditors: one JSON object a line, with all that hashes and signatures were made of. The card's
    evidence, which only the ledger can read, is left out but for its SHA-256."""
    with JournalReader.open(Home(home).journal) as journal, _opened(file) as out:
        for line in journal.export(after):
            out.write(canonical_json(line) + "\n")


@contextmanager
def _opened(file: Path | None) -> Iterator[TextIO]:
    if file is None:
        yield sys.stdout
        return
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise Conflict(f"{file} is there already", advice="export into a new file") from None
    except OSError as error:
        raise Unavailable(f"{file} cannot be written: {error.strerror}") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        yield out


def _row(record: Record) -> dict[str, Any]:
    return {
        "sequence": record.sequence,
        "id": str(record.id),
        "kind": record.kind.value,
        "facts": record.facts(),
        "hash": record.hash.hex(),
    }


def _what(facts: dict[str, Any]) -> str:
    match facts:
        case {"verdict": verdict, "about": about}:
            return f"{verdict} ({about})"
        case {"reason": reason, "amount_minor": amount_minor, "currency": unit}:
            return f"{amount_minor} {unit} minor units, {reason}"
        case {"amount_minor": amount_minor, "currency": unit, "token_last4": last4}:
            return f"{amount_minor} {unit} minor units, •••• {last4}"
        case {"version": version}:
            return f"version {version}"
        case _:
            return ""
