"""`card read|verify`: look at a card, and at the transcript of one."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from pos_gateway.cli.places import GATEWAY_HOME, GatewayHome
from pos_gateway.cli.terminal import EXIT_NO, Json, emit
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import Sale
from pos_gateway.emv.authentication import CaPublicKey, find_ca_key
from pos_gateway.emv.dialogue import CardRead, converse, read_card, request_cryptogram
from pos_gateway.emv.transcript import Transcript, VerificationStep, authentic, verify_transcript
from pos_gateway.errors import AuthenticationFailed, Conflict, InvalidInput, NotFound, ReaderUnavailable
from pos_gateway.gateway.config import Home, load_applications, load_settings
from pos_gateway.gateway.identity import load_enrolment
from pos_gateway.gateway.program import ca_public_key, local_now
from pos_gateway.gateway.readers.models import load_models
from pos_gateway.gateway.readers.port import CardChannel
from pos_gateway.gateway.readers.source import Readers
from pos_gateway.money import currency

app = typer.Typer(no_args_is_help=True, help="Look at a card, or at the transcript of one.")

_MAX_TRANSCRIPT_BYTES: Final = 1024 * 1024
_PROBE_AMOUNT_MINOR: Final = 1


@app.command()
def read(
    reader: Annotated[str | None, typer.Option(help="The reader's name; the first one if not said.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Save the dialogue here. It holds the full token number.")
    ] = None,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait for a card.")] = 30.0,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Read a card and check that it is genuine. It pays nothing: the card is asked for a cryptogram
    with a ceiling of zero, so its counter does not move."""
    if save is not None and save.exists():
        raise Conflict(f"{save} exists already")
    settings = load_settings(Home(home))
    terminal = settings.terminal
    probe = Sale(
        amount_minor=_PROBE_AMOUNT_MINOR,
        currency_numeric=currency(terminal.currency).numeric,
        country_numeric=terminal.country_numeric,
        at=local_now(),
        unpredictable_number=os.urandom(4),
        sequence_counter=0,
        terminal_id="PROBE",
        merchant_id="PROBE",
        merchant_category="0000",
        sale_id=os.urandom(16),
        ceiling=0,
        limit_digest=bytes(16),
    )
    aids = load_applications().aids
    here = Readers(load_models(Home(home).readers), paths=settings.reader.frontends)
    device = here.open(reader or _first(here), settings.card.exchange_timeout_s)
    try:
        channel = device.wait_for_card(wait_s)
        if channel is None:
            raise NotFound("no card came into the field in time", advice="hold it to the reader")
        try:
            card, transcript = _probe(channel, probe, aids)
        finally:
            channel.close()
    finally:
        device.close()

    ca_keys = _pinned_ca_keys(home)
    ca_key = _ca_key_of(card, ca_keys)
    transcript = Transcript.of(card, transcript.cryptogram_answer(), ca_key=ca_key)
    if save is not None:
        descriptor = os.open(save, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(transcript.to_json())
    steps = verify_transcript(transcript, ca_keys, today=local_now().date())
    about = {
        "aid": card.aid.hex().upper(),
        "token_last4": card.last4,
        "expires": card.expires.isoformat(),
        "saved": str(save) if save else None,
    }
    _tell(steps, about, f"Card •••• {card.last4}, valid to {card.expires}.", as_json=as_json)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A transcript; see docs/transcript-format.md.")],
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Trust only the CA keys of this gateway's enrolment.")
    ] = False,
    today: Annotated[str | None, typer.Option(help="Judge expiry on this day, like 2027-01-31.")] = None,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Verify a saved dialogue again, without the card. Exit code 1 names the step that fails."""
    try:
        day = date.fromisoformat(today) if today else None
    except ValueError:
        raise InvalidInput("not a date like 2027-01-31", where="--today") from None
    try:
        with file.open("rb") as opened:
            text = opened.read(_MAX_TRANSCRIPT_BYTES + 1)
    except OSError as error:
        raise NotFound(f"{file} cannot be read: {error.strerror}") from None
    if len(text) > _MAX_TRANSCRIPT_BYTES:
        raise InvalidInput(f"over {_MAX_TRANSCRIPT_BYTES} bytes", where=str(file))
    ca_keys = _pinned_ca_keys(home) if pinned else []
    steps = verify_transcript(Transcript.from_json(text), ca_keys, today=day)
    _tell(steps, {"file": str(file)}, f"Transcript {file}", as_json=as_json)


def _probe(channel: CardChannel, probe: Sale, aids: tuple[bytes, ...]) -> tuple[CardRead, Transcript]:
    card = converse(read_card(probe.elements(), aids), channel.transceive)
    answer = converse(request_cryptogram(card, probe.elements(), CryptogramKind.TC), channel.transceive)
    return card, Transcript.of(card, answer)


def _first(readers: Readers) -> str:
    names = readers.names()
    if not names:
        raise ReaderUnavailable("no reader is connected", advice="run pos-gateway doctor")
    return names[0]


def _pinned_ca_keys(home: Path) -> list[CaPublicKey]:
    return [ca_public_key(key) for key in load_enrolment(Home(home).enrolment).enrolment.ca_keys]


def _ca_key_of(card: CardRead, ca_keys: list[CaPublicKey]) -> CaPublicKey | None:
    try:
        return find_ca_key(card.aid[:5], card.elements[0x8F], ca_keys)
    except AuthenticationFailed:
        return None


def _tell(steps: list[VerificationStep], about: dict[str, Any], title: str, *, as_json: bool) -> None:
    genuine = authentic(steps)
    failing = next((step for step in steps if step.status.value == "failed"), None)
    data = about | {
        "authentic": genuine,
        "failed_step": failing.name if failing else None,
        "steps": [{"name": s.name, "status": s.status.value, "detail": s.detail} for s in steps],
    }
    signs = {"ok": "✓", "failed": "✕", "not_covered": "–"}
    lines = [title]
    lines += [f"  {signs[s.status.value]} {s.name}{': ' + s.detail if s.detail else ''}" for s in steps]
    lines.append("Authentic." if genuine else "Not shown to be authentic.")
    emit(data, "\n".join(lines), as_json=as_json)
    if not genuine:
        raise typer.Exit(EXIT_NO)
