"""`gateway serve|enroll|status|synchronise|confirm-time|pos|adopt|carry|upgrade|revert`: the shop's side."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pos_gateway.cli.gateway_carry import app as carry_app
from pos_gateway.cli.places import GATEWAY_HOME, GatewayHome
from pos_gateway.cli.staff import setup_code
from pos_gateway.cli.terminal import EXIT_NO, Json, announce, emit
from pos_gateway.errors import Conflict, Unavailable
from pos_gateway.gateway.certificate import connect
from pos_gateway.gateway.config import Home, load_settings
from pos_gateway.gateway.enrolling import enroll as enroll_gateway
from pos_gateway.gateway.identity import load_enrolment, load_identity
from pos_gateway.gateway.journal import JournalReader
from pos_gateway.gateway.local_client import ask
from pos_gateway.gateway.nexo.lanes import PoiNames
from pos_gateway.gateway.nexo.setup import NexoFiles
from pos_gateway.gateway.old_journal import adopt as adopt_journal
from pos_gateway.gateway.old_journal import opened_copy
from pos_gateway.gateway.program import serve as serve_gateway
from pos_gateway.gateway.upgrade import prepare
from pos_gateway.gateway.upgrade import revert as revert_journal
from pos_gateway.records import Verdict

if TYPE_CHECKING:
    from pos_gateway.lab.counter import Counter as PracticeCounter

app = typer.Typer(no_args_is_help=True, help="Run the shop's gateway.")
app.add_typer(carry_app, name="carry")


@app.command()
def enroll(
    ledger: Annotated[str, typer.Option(help="The ledger's address, like https://127.0.0.1:8160.")],
    code: Annotated[str, typer.Option(help="The one-time code from the issuer.")],
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Enrol this gateway with a ledger: once in its life. If it was interrupted, the same again goes on."""
    place = Home(home)
    if place.enrolment.exists():
        raise Conflict(f"{home} is enrolled already", advice="a new enrolment needs a new home directory")
    enrolment = asyncio.run(enroll_gateway(place, ledger, code))
    data = {
        "gateway_id": enrolment.gateway_id,
        "terminal_id": enrolment.terminal_id,
        "merchant": enrolment.merchant.name,
        "issuer": enrolment.issuer,
        "currency": enrolment.currency,
    }
    emit(
        data,
        f"Enrolled as {enrolment.terminal_id} of {enrolment.merchant.name}. Next: pos-gateway gateway serve",
        as_json=as_json,
    )


@app.command()
def serve(home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Take payments until Ctrl-C."""

    def on_ready(address: str) -> None:
        text = f"Gateway at {address}, its page too. Ctrl-C ends it."
        code = setup_code(Home(home))
        if code and not as_json:
            text += f"\nFirst run: open the page and type in the setup code {code[:4]} {code[4:]}"
        announce({"address": address}, text, as_json=as_json)

    asyncio.run(serve_gateway(Home(home), on_ready=on_ready))


@app.command()
def training(
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Where its page is.")] = 8156,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """A till to practise with until Ctrl-C: keys, cards and journal of its own; no money moves.

    A card comes by itself. Amounts that end in .51 are declined, in .19 taken away too early at first, in .91
    another issuer's card comes.
    """
    from pos_gateway.lab.practice import practise  # a shop without the laboratory has all but this

    place = Home(home)

    def on_ready(counter: PracticeCounter) -> None:
        code = counter.parts.door.staff.setup_code()
        text = f"Training at {counter.address}. No money moves. Ctrl-C ends it."
        if code:
            text += f"\nSetup code {code[:4]} {code[4:]}"
        announce({"address": counter.address, "setup_code": code}, text, as_json=as_json)

    asyncio.run(practise(place.path / "training", place.staff, port, on_ready))


@app.command()
def status(home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """How the running gateway stands: line, queue, limits, readers."""
    data = ask(Home(home), "GET", "/v1/status")
    emit(data, _text(data), as_json=as_json)


@app.command()
def synchronise(home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Present the queue and fetch limits now."""
    emit(ask(Home(home), "POST", "/v1/synchronise", {}), "Synchronising.", as_json=as_json)


@app.command()
def adopt(
    old: Annotated[
        Path,
        typer.Argument(help="The dead till's old home directory, or a backup of its journal.", exists=True),
    ],
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Present what a dead till of this shop still had in its journal. Its keys are not needed, and nothing
    on its disk is changed. Doing it again is harmless. Exit code 1 while something of it is not paid."""
    place = Home(home)
    gateway_id = load_enrolment(place.enrolment).enrolment.gateway_id
    key = load_identity(place.identity_key)

    async def run(journal: JournalReader) -> Counter[str]:
        async with connect(place) as client:
            return await adopt_journal(journal, client, gateway_id, key)

    with opened_copy(old) as journal:
        counts, of = asyncio.run(run(journal)), journal.gateway_id
    told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) or "nothing was left"
    emit({"of": of, "verdicts": dict(sorted(counts.items()))}, f"{of}: {told}.", as_json=as_json)
    if any(not Verdict(verdict).paid for verdict in counts):
        raise typer.Exit(EXIT_NO)


@app.command()
def upgrade(home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Before a newer program serves: back the journal up, verify the copy, bring the journal to this
    program's form. Stop the gateway first. Doing it again is harmless."""
    done = prepare(Home(home))
    data = {
        "backup": str(done.backup) if done.backup else None,
        "records": done.records,
        "last_sequence": done.last_sequence,
        "form_before": list(done.before),
        "form": list(done.after),
    }
    text = (
        f"{done.records} records, verified; the backup is {done.backup}."
        if done.backup
        else "No journal yet."
    )
    emit(data, text, as_json=as_json)


@app.command()
def revert(
    if_newer: Annotated[
        bool, typer.Option("--if-newer", help="Only if a newer program has changed its form.")
    ] = False,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Back to this older program: its form of the journal is made again from the backup, with every record
    written since. Stop the gateway first."""
    done = revert_journal(Home(home), only_if_newer=if_newer)
    data = {
        "backup": str(done.backup) if done.backup else None,
        "brought": done.brought,
        "last_sequence": done.last_sequence,
    }
    text = f"Reverted, with {done.brought} records written since." if done.backup else "Nothing to revert."
    emit(data, text, as_json=as_json)


@app.command("confirm-time")
def confirm_time(
    at: Annotated[
        datetime | None, typer.Option("--time", help="The right time, UTC; asked for if not said.")
    ] = None,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """For the manager: say that the clock is right, although it lies behind what was recorded before.

    Until then nothing is approved. It is journalled. The gateway must be running.
    """
    if at is None:
        now = datetime.now(UTC)
        typer.confirm(
            f"This machine's clock says {now:%Y-%m-%d %H:%M} UTC. Have you compared it with another clock, "
            "and is it right?",
            abort=True,
        )
        at = now
    time_unix_ms = int(at.replace(tzinfo=UTC).timestamp() * 1000)
    data = ask(Home(home), "POST", "/v1/clock", {"time_unix_ms": time_unix_ms})
    emit(data, "The time is confirmed, and journalled.", as_json=as_json)


@app.command()
def pos(home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """What POS software needs to know: address, certificate, and the POIID of every lane."""
    place = Home(home)
    settings = load_settings(place).nexo
    files = NexoFiles(place.nexo)
    names = PoiNames(load_enrolment(place.enrolment).enrolment.terminal_id, settings.pois)
    try:
        lanes = [lane["name"] for lane in ask(place, "GET", "/v1/status")["lanes"]]
    except Unavailable:
        lanes = []
    told = [
        (lane, names.poi_id(lane)) for lane in dict.fromkeys([*lanes, *settings.pois.values()]) or ["lane-1"]
    ]
    running = files.address.exists()
    data = {
        "enabled": settings.enabled,
        "running": running,
        "address": files.address.read_text().strip()
        if running
        else f"https://{settings.host}:{settings.port}",
        "certificate": str(files.certificate),
        "plain": settings.plain,
        "api_key": files.api_key.exists(),
        "encrypted": files.passphrase.exists(),
        "key_identifier": settings.key_identifier,
        "key_version": settings.key_version,
        "lanes": [{"lane": lane, "poi_id": poi_id} for lane, poi_id in told if poi_id is not None],
    }
    lines = [
        f"{data['address']}" + ("" if running else " (not running)" if settings.enabled else " (turned off)"),
        f"  trust: {files.certificate}",
        *(f"  {lane}: POIID {poi_id}" for lane, poi_id in told if poi_id is not None),
    ]
    emit(data, "\n".join(lines), as_json=as_json)


def _forecast(data: dict[str, Any]) -> str:
    if data["stopped"]:
        return f"nothing more can be approved ({data['first']})"
    at_unix_ms = data["first_at_unix_ms"]
    when = (
        f", about {datetime.fromtimestamp(at_unix_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC" if at_unix_ms else ""
    )
    return (
        f"{data['amount_left']} in up to {data['count_left']} payments of at most {data['per_tap_cap']}; "
        f"first comes {data['first']}{when}"
    )


def _text(data: dict[str, Any]) -> str:
    line, queue, snapshot = data["line"], data["queue"], data["snapshot"]
    up = {True: "up", False: f"down ({line['problem']})", None: "not tried yet"}[line["up"]]
    lines = [
        f"{data['merchant']['name']}, terminal {data['terminal_id']}",
        f"  line to the ledger: {up}",
        f"  waiting for the ledger: {queue['count']} payments, {queue['amount']} of at most {queue['cap']}",
        f"  limits: {snapshot['sentence'] if snapshot else 'none yet: nothing can be approved'}",
        f"  without a line: {_forecast(data['forecast'])}",
    ]
    if queue["oldest_at_unix_ms"]:
        age_s = int(time.time()) - queue["oldest_at_unix_ms"] // 1000
        lines.append(f"  the oldest has waited {age_s} s")
    if data["certificate"]:
        lines.append(f"  certificate: {data['certificate']['sentence']}")
    run = data["synchronisation"]
    if run["running"] and run["left_s"] is not None and run["remaining"]:
        lines.append(
            f"  presenting: {run['presented']} done, {run['remaining']} left, {run['per_s']} a second, "
            f"about {run['left_s']} s to go"
        )
    if run["again"]:
        lines.append(f"  the ledger was restored: {run['again']} records are presented to it again")
    if data["deadline"]["urgency"] != "fine":
        lines += [f"  {data['deadline']['english']}", f"  {data['deadline']['chinese']}"]
    if progress := data["snapshot_progress"]:
        lines.append(f"  under way: {progress['what']}, {progress['done']} of {progress['total']}")
    if data["disk"]["payments_stopped"]:
        lines.append("  the disk is nearly full: no payment is begun until there is room")
    if data["snapshot_problem"]:
        lines.append(f"  limits were refused: {data['snapshot_problem']} ({data['snapshot_advice']})")
    lines += [
        f"  {lane['name']}: {lane['reader']}{' (busy)' if lane['busy'] else ''}" for lane in data["lanes"]
    ]
    if not data["lanes"]:
        lines.append("  no reader: run pos-gateway doctor")
    for refusal in data["refused"]:
        meaning = refusal["meaning"]
        lines += [
            f"  {refusal['kind']} of {refusal['amount']}, {refusal['verdict']}: {refusal['reason']}",
            f"    {meaning['english']}",
            f"    {meaning['chinese']}",
        ]
    return "\n".join(lines)
