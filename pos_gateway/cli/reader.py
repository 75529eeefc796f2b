"""`reader list|probe|configure|light`: the NFC readers of this machine."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from pos_gateway.cli.places import GATEWAY_HOME, GatewayHome
from pos_gateway.cli.terminal import EXIT_NO, Json, emit, emit_rows
from pos_gateway.errors import NotFound, Unavailable
from pos_gateway.gateway.config import Home, Settings, load_settings
from pos_gateway.gateway.readers.indicator import run_start_command
from pos_gateway.gateway.readers.models import load_models
from pos_gateway.gateway.readers.pcsc import PcscReader
from pos_gateway.gateway.readers.port import Indication
from pos_gateway.gateway.readers.probe import Probe, probe
from pos_gateway.gateway.readers.source import Found, Readers
from pos_gateway.gateway.readers.system import changes_wanted

app = typer.Typer(no_args_is_help=True, help="NFC readers.")

_Pattern = Annotated[
    str | None, typer.Option("--reader", help="Regular expression that the reader's name holds; else all.")
]
_AFTERWARDS: Final = (
    "Now: udevadm control --reload && udevadm trigger; systemctl restart pcscd; plug the readers in again."
)


@app.callback()
def readers() -> None:
    """NFC readers."""


@app.command("list")
def list_command(home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """The readers that are plugged in now, and which of our models they are."""
    _, here = _here(home)
    rows = [
        {"name": found.name, "driver": found.driver, "model": found.model.name if found.model else None}
        for found in here.found()
    ]
    emit_rows(
        "readers",
        ("name", "driver", "model"),
        rows,
        as_json=as_json,
        empty="No reader. Run pos-gateway doctor.",
    )


@app.command("probe")
def probe_command(reader: _Pattern = None, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Ask readers what they are: model, firmware version, whether light and buzzer can be reached."""
    settings, here = _here(home)
    probes = [
        probe(here, found, response_timeout_s=settings.card.exchange_timeout_s)
        for found in _chosen(here, reader)
    ]
    emit({"readers": [p.as_json() for p in probes]}, "\n".join(map(_told, probes)), as_json=as_json)


@app.command()
def light(
    indication: Annotated[
        Indication | None, typer.Argument(help="Which moment to show; else one after the other.")
    ] = None,
    reader: _Pattern = None,
    hold_s: Annotated[float, typer.Option(min=0, max=10, help="Pause between two moments.")] = 1.0,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Show a payment's moments on the readers' lights and buzzers. Exit code 1 if a reader showed nothing."""
    settings, here = _here(home)
    rows = []
    for found in _chosen(here, reader):
        opened = here.open(found.name, settings.card.exchange_timeout_s)
        try:
            for moment in [indication] if indication else list(Indication):
                rows.append(
                    {
                        "reader": found.name,
                        "moment": moment.value,
                        "shown": isinstance(opened, PcscReader) and _show(opened, found, moment),
                        "looks_like": _looks(found, moment),
                    }
                )
                if rows[-1]["shown"] and indication is None:
                    time.sleep(hold_s)
        finally:
            opened.close()
    emit_rows(
        "lights", ("reader", "moment", "shown", "looks_like"), rows, as_json=as_json, empty="No reader."
    )
    if not all(row["shown"] for row in rows):
        raise typer.Exit(EXIT_NO)


@app.command()
def configure(
    apply: Annotated[bool, typer.Option("--apply", help="Write the files. Needs root.")] = False,
    root: Annotated[
        Path, typer.Option(help="Below which folder the system lies.", exists=True, file_okay=False)
    ] = Path("/"),
    as_json: Json = False,
) -> None:
    """What the system needs so that all readers work: udev rules, kernel modules kept away, escape commands
    allowed in libccid. Only says so, unless --apply. Exit code 1 while something is missing."""
    wanted = changes_wanted(root)
    written = []
    if apply:
        for change in wanted:
            try:
                change.path.parent.mkdir(parents=True, exist_ok=True)
                change.path.write_text(change.text)
            except OSError as error:
                raise Unavailable(
                    f"cannot write {change.path}: {error.strerror}", advice="run it as root"
                ) from None
            written.append(str(change.path))
    rows = [{"file": str(change.path), "for": change.purpose} for change in wanted]
    lines = [f"{'wrote' if apply else 'wants'} {row['file']}: {row['for']}" for row in rows]
    if not wanted:
        lines = ["Nothing to do."]
    elif apply:
        lines.append(_AFTERWARDS)
    emit({"wanted": rows, "written": written}, "\n".join(lines), as_json=as_json)
    if wanted and not apply:
        raise typer.Exit(EXIT_NO)


def _here(home: Path) -> tuple[Settings, Readers]:
    place = Home(home)
    settings = load_settings(place)
    return settings, Readers(load_models(place.readers), paths=settings.reader.frontends)


def _chosen(here: Readers, pattern: str | None) -> list[Found]:
    try:
        found = [f for f in here.found() if pattern is None or re.search(pattern, f.name)]
    except re.error as error:
        raise typer.BadParameter(f"not a regular expression: {error}") from None
    if not found:
        raise NotFound("no such reader is plugged in", advice="pos-gateway reader list; pos-gateway doctor")
    return found


def _show(reader: PcscReader, found: Found, moment: Indication) -> bool:
    model = found.model
    sequence = model.indications.of(moment) if model and model.indications else None
    if model is None or sequence is None:
        return False
    line = reader.commands
    if not all(run_start_command(line, command) for command in model.start):
        return False
    for step in sequence.step:
        if line.send(bytes.fromhex(step.send)) is None:
            return False
        time.sleep(step.wait_ms / 1000)
    return True


def _looks(found: Found, moment: Indication) -> str:
    sequence = found.model.indications.of(moment) if found.model and found.model.indications else None
    return sequence.shows if sequence else "nothing: not described for this model"


def _told(probed: Probe) -> str:
    firmware = probed.firmware or "not told"
    unknown = " (not one we know)" if probed.known_firmware is False else ""
    lines = [
        f"{probed.name}",
        f"  model     {probed.model or 'not one we know: taps work, its light is its own'}",
        f"  driver    {probed.driver}",
        f"  firmware  {firmware}{unknown}",
        f"  commands  {probed.commands}",
    ]
    if probed.model and not probed.tried_on_hardware:
        lines.append("  note      described from documents, not tried on hardware")
    lines += [f"  quirk     {quirk}" for quirk in probed.quirks]
    if probed.problem:
        lines.append(f"  problem   {probed.problem}")
    return "\n".join(lines)
