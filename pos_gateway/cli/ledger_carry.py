"""`ledger carry import|export`: shops without a line, by a stick and any carrier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pos_gateway.cli.places import LEDGER_HOME, LedgerHome
from pos_gateway.cli.terminal import EXIT_NO, Json, emit
from pos_gateway.errors import NotFound
from pos_gateway.ledger.carry import SINCE_DAYS, queues_on, take_queues, write_letters, write_limits
from pos_gateway.ledger.ledger import Ledger

app = typer.Typer(no_args_is_help=True, help="Take shops' queues from a stick; answer on a stick.")

Folder = Annotated[Path, typer.Argument(help="Where the stick is mounted.", exists=True, file_okay=False)]


@app.command("import")
def take(folder: Folder, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Take every shop's queue on a stick, as if presented over the line; the stick may be write-protected.
    Taking it twice is harmless. Exit code 1 if something on it was damaged or refused."""
    with Ledger.open(home) as ledger:
        queues = take_queues(ledger, folder)
    lines = []
    for queue in queues:
        told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(queue.verdicts.items()))
        lines.append(f"{queue.gateway_id}: {told or 'nothing in it'}")
        lines += [f"  damaged: {name}; have the shop export once more" for name in queue.damaged]
        lines += [f"  refused: {why}" for why in queue.refused]
    lines.append("Next: pos-gateway ledger carry export FOLDER, and the stick goes back.")
    data = {
        "folder": str(folder),
        "gateways": [
            {
                "gateway_id": queue.gateway_id,
                "verdicts": dict(sorted(queue.verdicts.items())),
                "damaged": queue.damaged,
                "refused": queue.refused,
            }
            for queue in queues
        ],
    }
    emit(data, "\n".join(lines), as_json=as_json)
    if any(queue.damaged or queue.refused for queue in queues):
        raise typer.Exit(EXIT_NO)


@app.command("export")
def answer(
    folder: Folder,
    gateway: Annotated[
        list[str] | None,
        typer.Option(help="Whom to answer; again for more. Those whose queues are on the stick if not said."),
    ] = None,
    since_days: Annotated[int, typer.Option(min=1, max=3660, help="How far back verdicts go.")] = SINCE_DAYS,
    limits: Annotated[bool, typer.Option(help="The signed limits too.")] = True,
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Write signed verdicts onto a stick, and the limits. They hold whichever stick brings them."""
    with Ledger.open(home) as ledger:
        ours = {known.id for known in ledger.gateways()}
        gateway_ids = gateway or [found for found in queues_on(folder) if found in ours]
        if not gateway_ids and not limits:
            raise NotFound(f"{folder} holds no shop's queue", advice="name a gateway: --gateway ID")
        size = write_limits(ledger, folder) if limits else 0
        answered = write_letters(ledger, folder, gateway_ids, since_days=since_days)
    data = {
        "folder": str(folder),
        "limits": limits,
        "new_limit_bytes": size,
        "gateways": [
            {"gateway_id": each.gateway_id, "verdicts": each.verdicts, "letters": each.letters}
            for each in answered
        ],
    }
    lines = [f"{each.gateway_id}: {each.verdicts} verdicts" for each in answered]
    lines += (
        ["The limits are there: the list of files is good for as long as its timestamp."] if limits else []
    )
    emit(data, "\n".join(lines), as_json=as_json)
