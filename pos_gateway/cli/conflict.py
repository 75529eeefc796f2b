"""`conflict verify`: the evidence of a clone, for whoever must be convinced, with public keys alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pos_gateway.cli.terminal import Json, emit
from pos_gateway.conflict import MAX_BYTES, Claim, ConflictBundle
from pos_gateway.emv.authentication import CaPublicKey
from pos_gateway.errors import InvalidInput, NotFound

app = typer.Typer(no_args_is_help=True, help="Clones: evidence that is checked with public keys alone.")


@app.callback()
def _noun() -> None:
    """Keeps `verify` a verb of its own while it is the only one."""


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="From `ledger conflict export`; it holds the token number.")],
    ca_key: Annotated[
        Path | None,
        typer.Option("--ca-key", help="The CAPK you trust: JSON with rid, index, modulus, exponent."),
    ] = None,
    gateway_key: Annotated[
        list[str] | None,
        typer.Option("--gateway-key", help="HEX, a gateway's public key you trust; may come several times."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that one card signed two payments on the same points of its counter line. Exit code 4 if not.

    Without keys of your own those in the file are taken: then hold their SHA-256 against what the issuer
    has published.
    """
    try:
        with file.open("rb") as opened:
            bundle = ConflictBundle.from_json(opened.read(MAX_BYTES + 1))
    except OSError as error:
        raise NotFound(f"{file} cannot be read: {error.strerror}") from None
    trusted = [_hex(text, "--gateway-key") for text in gateway_key or ()]
    ca_keys = [_read_ca_key(ca_key)] if ca_key is not None else []
    proven = bundle.verify(ca_keys=ca_keys, gateway_keys=trusted)
    data: dict[str, Any] = {
        "issuer": bundle.issuer,
        "currency": bundle.currency,
        "last4": proven.last4,
        "overlap": list(proven.overlap),
        "payments": [asdict(claim) | {"cryptogram": claim.cryptogram.hex()} for claim in proven.claims],
        "ca_keys_sha256": [_fingerprint(key) for key in ca_keys or bundle.ca_keys],
        "gateway_keys_sha256": [
            hashlib.sha256(side.gateway_key).hexdigest() for side in bundle.authorizations
        ],
    }
    start, end = proven.overlap
    lines = [
        f"Proven: the card •••• {proven.last4} of {bundle.issuer} signed two payments "
        f"on the same {end - start} points of its counter line. One of the two is a copy.",
        *(_text(claim) for claim in proven.claims),
        *(f"  CA key        SHA-256 {text}" for text in data["ca_keys_sha256"]),
        *(f"  gateway key   SHA-256 {text}" for text in data["gateway_keys_sha256"]),
    ]
    emit(data, "\n".join(lines), as_json=as_json)


def _text(claim: Claim) -> str:
    return (
        f"  {claim.record_id} at terminal {claim.terminal_id} of {claim.merchant_id}: "
        f"({claim.counter_before}, {claim.counter_after}]"
    )


def _fingerprint(key: CaPublicKey) -> str:
    content = key.rid + bytes([key.index]) + key.modulus.to_bytes(key.size, "big")
    return hashlib.sha256(content + key.exponent.to_bytes(4, "big")).hexdigest()


def _read_ca_key(path: Path) -> CaPublicKey:
    try:
        raw = json.loads(path.read_bytes())
        return CaPublicKey(
            rid=bytes.fromhex(raw["rid"]),
            index=int(str(raw["index"]), 16),
            modulus=int(raw["modulus"], 16),
            exponent=int(raw["exponent"]),
        )
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise InvalidInput("needs rid, index, modulus and exponent", where=str(path)) from None


def _hex(text: str, where: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InvalidInput("not hexadecimal", where=where) from None
