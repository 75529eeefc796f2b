"""`journal list|show|verify|export|backup|prune|carry`: what the gateway has recorded, running or not."""

from __future__ import annotations

import base64
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO
from uuid import UUID

import typer

from pos_gateway.cli.places import GATEWAY_HOME, GatewayHome
from pos_gateway.cli.terminal import Json, emit, emit_rows
from pos_gateway.errors import Conflict, InvalidInput, Unavailable
from pos_gateway.gateway.config import Home, load_settings
from pos_gateway.gateway.feed import snapshot_header, stored_snapshots
from pos_gateway.gateway.identity import load_enrolment, load_identity
from pos_gateway.gateway.journal import Journal, JournalReader
from pos_gateway.gateway.meanings import meaning_of
from pos_gateway.gateway.retention import Checkpoint, keep_s
from pos_gateway.records import (
    MAX_BATCH_RECORDS,
    Record,
    Verdict,
    canonical_json,
    presentment_body,
    sign_batch,
)

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
        rows = [_row(record) | _money(journal, record) for record in journal.records(after, limit)]
    if not as_json:
        rows = [
            row | {"what": _what(row["facts"]), "money": (row["meaning"] or {}).get("english", "")}
            for row in rows
        ]
    columns = ("sequence", "kind", "what", "money", "id")
    emit_rows("records", columns, rows, as_json=as_json, empty="No record there.")


@app.command()
def show(record_id: str, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """One record, and what was recorded about it since."""
    try:
        wanted = UUID(record_id)
    except ValueError:
        raise InvalidInput("not a UUID", where="record id") from None
    with JournalReader.open(Home(home).journal) as journal:
        found = journal.get(wanted)
        record = _row(found) | _money(journal, found)
        about = [_row(other) for other in journal.about(wanted) if other.id != wanted]
    lines = [f"{record['kind']} {record['sequence']}  {record['id']}"]
    lines += [f"  {name}: {value}" for name, value in record["facts"].items()]
    if record["meaning"]:
        lines += [f"  {record['meaning'][language]}" for language in ("english", "chinese")]
    lines += [f"  then {other['kind']} {other['sequence']}: {_what(other['facts'])}" for other in about]
    emit(record | {"about": about}, "\n".join(lines), as_json=as_json)


@app.command()
def verify(home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Check sequence, chain, hash and signature of every record. Exit code 4 names the one that fails."""
    place = Home(home)
    key = load_identity(place.identity_key).public_key()
    with JournalReader.open(place.journal) as journal:
        found = journal.verified(key)
    data: dict[str, Any] = {"verified": found.records}
    text = f"{found.records} records: gap-free, unchanged, all signed here."
    if pruned := found.checkpoint.sequence:
        data["checkpoint"] = found.checkpoint.as_json()
        text += (
            f" Up to {pruned} they are pruned; the signed checkpoint adds up: {_totals(found.checkpoint)}."
        )
    emit(data, text, as_json=as_json)


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
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be pruned.")] = False,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Remove acknowledged records older than `[journal] keep_days` (a running gateway does so by itself).
    What is unacknowledged, refused and unsettled, or younger than the issuer's deadline and a week stays."""
    place = Home(home)
    enrolment = load_enrolment(place.enrolment).enrolment
    with JournalReader.open(place.journal) as reader:
        before = reader.checkpoint
    headers = [snapshot_header(path) for _, path in stored_snapshots(place.snapshots)]
    deadlines = [header.policy.presentment_deadline_s for header in headers if header is not None]
    wanted_s = keep_s(load_settings(place).journal.keep_days, max(deadlines, default=None))
    if wanted_s is None:
        raise Unavailable("the issuer's presentment deadline is not known here", advice="fetch limits first")
    now_unix_ms = time.time_ns() // 1_000_000
    with JournalReader.open(place.journal) as reader:
        if dry_run:
            after = reader.next_checkpoint(before, now_unix_ms - 1000 * wanted_s, reader.first_waiting)
    if not dry_run:
        key = load_identity(place.identity_key)
        with Journal.open(place.journal, gateway_key=key, gateway_id=enrolment.gateway_id) as journal:
            older_than = min(now_unix_ms, journal.latest_at_unix_ms) - 1000 * wanted_s
            after = journal.prune(older_than, now_unix_ms)
            while journal.prune_some():
                pass
    with JournalReader.open(place.journal) as reader:
        size, free = reader.sizes
    count = after.sequence - before.sequence
    data = {
        "dry_run": dry_run,
        "pruned": count,
        "kept_for_s": wanted_s,
        "checkpoint": after.as_json(),
        "bytes": size,
        "bytes_free_for_new_records": free,
    }
    text = (
        f"{count} records {'would be' if dry_run else 'are'} pruned, up to sequence {after.sequence}; "
        f"{len(after.kept)} older ones stay. The file has {size // 1024} KiB, {free // 1024} of them free "
        "for new records."
    )
    emit(data, text, as_json=as_json)


@app.command()
def carry(file: Path, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Write all that waits for the ledger into FILE, signed, to be brought to the issuer by any carrier:
    `pos-gateway ledger receive FILE` takes it there. It is still presented once the line is back; nothing
    is paid twice."""
    place = Home(home)
    key = load_identity(place.identity_key)
    batches = count = 0
    with JournalReader.open(place.journal) as journal, _opened(file) as out:
        gateway_id = journal.gateway_id
        for records in journal.waiting(MAX_BATCH_RECORDS):
            body = presentment_body(gateway_id, records)
            line = {
                "gateway_id": gateway_id,
                "body": body.decode(),
                "signature": base64.b64encode(sign_batch(body, key)).decode(),
            }
            out.write(canonical_json(line) + "\n")
            batches, count = batches + 1, count + len(records)
    data = {"file": str(file), "records": count, "batches": batches}
    emit(data, f"{file}: {count} records in {batches} signed batches.", as_json=as_json)


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


def _money(journal: JournalReader, record: Record) -> dict[str, Any]:
    """What became of a presented record's money."""
    if not record.kind.presented:
        return {"meaning": None}
    verdict = journal.last_verdict(record.id)
    told = meaning_of(record.kind, Verdict(verdict) if verdict is not None else None)
    return {"verdict": verdict, "meaning": told.as_json()}


def _totals(checkpoint: Checkpoint) -> str:
    parts = [
        f"{total} {unit} minor units in {checkpoint.counts[kind]} {kind}s"
        for unit, totals in checkpoint.totals.items()
        for kind, total in totals.items()
    ]
    return ", ".join(parts) or "no money in them"


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
