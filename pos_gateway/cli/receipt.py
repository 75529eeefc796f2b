"""`receipt save|verify|scan`: decision receipts, checked with public keys alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pos_gateway.authorization.receipt import (
    MAX_RECEIPT_BYTES,
    DecisionReceipt,
    Finding,
    genuine,
    verify_qr,
    verify_receipt,
)
from pos_gateway.cli.places import GATEWAY_HOME, GatewayHome
from pos_gateway.cli.proof import issuer_keys
from pos_gateway.cli.terminal import Json, emit
from pos_gateway.errors import AuthenticationFailed, InvalidInput, NotFound, Unavailable
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.local_client import ask

app = typer.Typer(no_args_is_help=True, help="Decision receipts: what was approved, and what shows it.")

Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--key", help="ID=HEX, an issuer's public key; may come several times. Else those enrolled."
    ),
]
Threshold = Annotated[
    int | None,
    typer.Option("--threshold", min=1, help="How many keys must have signed; all of --key if not said."),
]
GatewayKey = Annotated[
    str | None, typer.Option("--gateway-key", help="HEX: the gateway's public key, as the issuer told it.")
]

_SIGNS = {Finding.OK: "✓", Finding.FAILED: "✕", Finding.NOT_COVERED: "–"}


@app.command()
def save(
    payment_id: str,
    out: Annotated[Path | None, typer.Option("--out", help="Its file; ID.receipt.json if not said.")] = None,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Write an approved payment's decision receipt. The gateway must be running."""
    try:
        payment = UUID(payment_id)
    except ValueError:
        raise InvalidInput("not a UUID", where="payment id") from None
    data = ask(Home(home), "GET", f"/v1/payments/{payment}/receipt")
    place = out or Path(f"{payment}.receipt.json")
    try:
        place.write_text(json.dumps(data, ensure_ascii=False))
    except OSError as error:
        raise Unavailable(f"cannot be written: {error.strerror}", advice="choose another --out") from None
    emit({"file": str(place), "digest": data["digest"]}, f"Decision receipt: {place}", as_json=as_json)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A decision receipt.")],
    key: Keys = None,
    threshold: Threshold = None,
    gateway_key: GatewayKey = None,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Check all that a decision receipt can show, and say what it cannot. Exit code 4 if a step fails."""
    receipt = _read(file)
    keys, needed = issuer_keys(home, key, threshold)
    steps = verify_receipt(receipt, keys, needed, _public_key(gateway_key))
    facts = receipt.record.facts()
    data: dict[str, Any] = {
        "genuine": genuine(steps),
        "digest": receipt.digest.hex(),
        "issuer": receipt.issuer,
        "merchant": receipt.merchant_name,
        "amount_minor": facts.get("amount_minor"),
        "currency": facts.get("currency"),
        "at_unix_ms": facts.get("at_unix_ms"),
        "steps": [step.as_json() for step in steps],
    }
    lines = [f"{_SIGNS[step.finding]} {step.name}: {step.detail}" for step in steps]
    emit(data, "\n".join([*lines, f"digest {data['digest']}"]), as_json=as_json)
    if not data["genuine"]:
        raise typer.Exit(4)


@app.command()
def scan(
    text: Annotated[str, typer.Argument(help="What a receipt's QR says.")],
    gateway_key: GatewayKey = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="A decision receipt that it must belong to.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a paper receipt's QR by the gateway's key, and against a decision receipt."""
    receipt = _read(file) if file is not None else None
    trusted = _public_key(gateway_key)
    if trusted is None and receipt is not None:
        trusted = Ed25519PublicKey.from_public_bytes(receipt.gateway_key)
    if trusted is None:
        raise InvalidInput("whose signature should it be?", where="--gateway-key or --file")
    paper = verify_qr(text, trusted)
    if receipt is not None and paper.digest != receipt.digest:
        raise AuthenticationFailed("the QR belongs to another decision receipt", step="receipt digest")
    data = {
        "payment": str(paper.sale_id),
        "amount_minor": paper.amount_minor,
        "at_unix_ms": paper.at_unix_ms,
        "record_hash": paper.record_hash.hex(),
        "digest": paper.digest.hex(),
    }
    emit(data, "\n".join(f"{name}: {value}" for name, value in data.items()), as_json=as_json)


def _read(file: Path) -> DecisionReceipt:
    try:
        with file.open("rb") as opened:
            return DecisionReceipt.parse(opened.read(MAX_RECEIPT_BYTES + 1))
    except FileNotFoundError:
        raise NotFound(f"there is no receipt at {file}") from None
    except OSError as error:
        raise InvalidInput(f"cannot be read: {error.strerror}", where=str(file)) from None


def _public_key(text: str | None) -> Ed25519PublicKey | None:
    if text is None:
        return None
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
    except ValueError:
        raise InvalidInput("must be 64 hexadecimal digits", where="--gateway-key") from None
