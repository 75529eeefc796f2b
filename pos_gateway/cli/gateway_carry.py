"""`gateway carry export|import`: a shop without a line, by a stick and any carrier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pos_gateway.cli.places import GATEWAY_HOME, GatewayHome
from pos_gateway.cli.terminal import EXIT_NO, Json, emit
from pos_gateway.errors import Unavailable
from pos_gateway.gateway.carry import (
    Imported,
    export_queue,
    read_letters,
    take_letter,
    take_letters,
    take_limits,
)
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.identity import load_enrolment, load_identity
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.local_client import ask
from pos_gateway.gateway.old_journal import export_adopted, opened_copy
from pos_gateway.gateway.program import now_unix_ms

app = typer.Typer(no_args_is_help=True, help="Carry queue, verdicts and limits on a stick.")

Folder = Annotated[Path, typer.Argument(help="Where the stick is mounted.", exists=True, file_okay=False)]


@app.command("export")
def carry_out(
    folder: Folder,
    old: Annotated[
        Path | None,
        typer.Option(
            "--from", help="A dead till's old home directory or journal: its queue instead.", exists=True
        ),
    ] = None,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Write all that waits for the ledger onto a stick, signed, with the gateway running or not. The issuer
    takes it with `ledger carry import`. It still waits here until the ledger's word has come; whichever way
    is first, nothing is paid twice."""
    place = Home(home)
    if old is not None:
        gateway_id = load_enrolment(place.enrolment).enrolment.gateway_id
        with opened_copy(old) as journal:
            count = export_adopted(journal, gateway_id, load_identity(place.identity_key), folder)
            data = {"records": count, "of": journal.gateway_id, "folder": str(folder)}
        emit(data, f"{count} records of {data['of']} are on {folder}.", as_json=as_json)
        return
    if _runs(place):
        data = ask(place, "POST", "/v1/carry/export", {"folder": str(folder.absolute())})
    else:
        data = export_out_of_service(place, folder)
    emit(
        data | {"folder": str(folder)},
        f"{data['records']} records in {data['batches']} signed batches are on {folder}.",
        as_json=as_json,
    )


@app.command("import")
def carry_in(folder: Folder, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Take limits and the ledger's signed verdicts from a stick, with the gateway running or not. Taking
    one twice, or an old one, is harmless. Exit code 1 if something on it was damaged or refused."""
    place = Home(home)
    if _runs(place):
        data = ask(place, "POST", "/v1/carry/import", {"folder": str(folder.absolute())})
    else:
        data = import_out_of_service(place, folder)
    limits = data["limits"]
    lines = [f"{data['journalled']} verdicts were news, {data['passed_over']} were not."]
    if limits["changed"]:
        lines.append(f"Limits {limits['version']} are in use.")
    elif limits["problem"]:
        lines.append(f"Limits were not taken: {limits['problem']}")
    lines += [f"Damaged: {name}. Ask for the stick again." for name in data["damaged"]]
    lines += [f"Refused: {why}" for why in data["refused"]]
    emit(data | {"folder": str(folder)}, "\n".join(lines), as_json=as_json)
    if data["damaged"] or data["refused"] or limits["problem"]:
        raise typer.Exit(EXIT_NO)


def export_out_of_service(place: Home, folder: Path) -> dict[str, Any]:
    """What the running gateway would do, in its place."""
    gateway_id = load_enrolment(place.enrolment).enrolment.gateway_id
    key = load_identity(place.identity_key)
    with Journal.open(place.journal, gateway_key=key, gateway_id=gateway_id) as journal:
        return export_queue(journal, gateway_id, key, folder).as_json()


def import_out_of_service(place: Home, folder: Path) -> dict[str, Any]:
    """What the running gateway would do, in its place."""
    enrolment = load_enrolment(place.enrolment).enrolment
    key = load_identity(place.identity_key)
    with Journal.open(place.journal, gateway_key=key, gateway_id=enrolment.gateway_id) as journal:
        feed = SnapshotFeed(place.snapshots, journal, enrolment, clock=now_unix_ms)
        try:
            feed.load()
            limits = take_limits(feed, folder)
            current = feed.current()
            deadline_s = current.newest.policy.presentment_deadline_s if current else None
        finally:
            feed.close()
        letters, read = read_letters(
            folder,
            authority=enrolment.authority,
            gateway_id=enrolment.gateway_id,
            now_unix_ms=now_unix_ms(),
        )
        taken: Imported = take_letters(
            letters,
            read,
            lambda letter: take_letter(journal, letter, now_unix_ms=now_unix_ms(), deadline_s=deadline_s),
        )
    return taken.as_json() | {"limits": limits}


def _runs(place: Home) -> bool:
    try:
        ask(place, "GET", "/v1/status")
    except Unavailable:
        return False
    return True
