"""`proof make|verify`: that one token's limit stands in what the issuer signed, for whoever doubts it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pos_gateway.cli.places import GATEWAY_HOME, GatewayHome
from pos_gateway.cli.snapshot import File, TokenKey, layers, parse_token_key, trusted_keys
from pos_gateway.cli.terminal import Json, emit
from pos_gateway.errors import InvalidInput, NotFound, Unavailable
from pos_gateway.limits.header import SnapshotHeader
from pos_gateway.limits.proof import MAX_PROOF_BYTES, prove, verify_proof
from pos_gateway.limits.record import LimitRecord

app = typer.Typer(
    no_args_is_help=True, help="Proofs of single limit records, checked with public keys alone."
)

_SUFFIX: Final = ".limit-proof"


@app.command()
def make(
    token_key: TokenKey,
    out: Annotated[
        Path | None, typer.Option("--out", help="Its file; TOKEN_KEY.limit-proof if not said.")
    ] = None,
    file: File = None,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Write the proof of one token's record.

    It shows the record, the signed header, counts, and hashes that tell nothing of other tokens: it can
    be handed over. A token that a delta lists is proven from the delta. Exit code 7 if it proves absent.
    """
    key = parse_token_key(token_key)
    with layers(home, file) as limits:
        holder = next((snapshot for snapshot in limits if snapshot.lookup(key) is not None), None)
        if holder is None:
            raise NotFound(f"limits {limits[0].header.version} have no such token")
        proof = prove(holder, key)
        version = holder.header.version
    place = out or Path(f"{token_key.lower()}{_SUFFIX}")
    try:
        place.write_bytes(proof)
    except OSError as error:
        raise Unavailable(f"cannot be written: {error.strerror}", advice="choose another --out") from None
    data = {"file": str(place), "bytes": len(proof), "version": version, "token_key": token_key.lower()}
    emit(data, f"Proof of {len(proof)} bytes from limits {version}: {place}", as_json=as_json)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A proof.")],
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key", help="ID=HEX, an issuer's public key; may come several times. Else those enrolled."
        ),
    ] = None,
    threshold: Annotated[
        int | None,
        typer.Option("--threshold", min=1, help="How many keys must have signed; all of --key if not said."),
    ] = None,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Check a proof up to the issuer's signature. Exit code 4 if it does not verify."""
    keys, needed = issuer_keys(home, key, threshold)
    try:
        with file.open("rb") as opened:
            proof = opened.read(MAX_PROOF_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"there is no proof at {file}") from None
    except OSError as error:
        raise InvalidInput(f"cannot be read: {error.strerror}", where=str(file)) from None
    header, record = verify_proof(proof, keys, needed)
    data = _proven(header, record)
    text = "\n".join(f"{name}: {value}" for name, value in data.items())
    emit(data, f"Proven.\n{text}", as_json=as_json)


def issuer_keys(
    home: Path, key: list[str] | None, threshold: int | None
) -> tuple[dict[str, Ed25519PublicKey], int]:
    """Whose signatures count, and how many are needed: as said, else as enrolled."""
    if key:
        keys = dict(_parse_key(text) for text in key)
        return keys, threshold or len(keys)
    trusted, enrolled = trusted_keys(home)
    return dict(trusted), threshold or enrolled


def _parse_key(text: str) -> tuple[str, Ed25519PublicKey]:
    key_id, _, value = text.partition("=")
    try:
        return key_id, Ed25519PublicKey.from_public_bytes(bytes.fromhex(value))
    except ValueError:
        raise InvalidInput("must be ID=HEX with 64 hexadecimal digits", where="--key") from None


def _proven(header: SnapshotHeader, record: LimitRecord) -> dict[str, Any]:
    return {
        "issuer": header.issuer,
        "currency": header.currency,
        "version": header.version,
        "base_version": header.base_version,
        "valid_from_unix_s": header.valid_from_unix_s,
        "valid_until_unix_s": header.valid_until_unix_s,
        "token_key": record.token_key.hex(),
        "ceiling": record.ceiling,
        "per_tap_cap_minor": record.per_tap_cap_minor,
        "sequence": record.sequence,
        "status": record.status.name.lower(),
        "assurance": record.assurance,
        "digest": record.digest(header.nonce).hex(),
    }
