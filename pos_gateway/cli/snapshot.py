"""`snapshot show|verify|lookup`: the signed limits this gateway goes by."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pos_gateway.cli.places import GATEWAY_HOME, GatewayHome
from pos_gateway.cli.terminal import Json, emit
from pos_gateway.errors import InvalidInput, NotFound
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.feed import stored_snapshots
from pos_gateway.gateway.identity import load_enrolment
from pos_gateway.limits.header import check_meant_for, explain_freshness, freshness
from pos_gateway.limits.snapshot import Snapshot
from pos_gateway.snapshot_file import SnapshotFile

app = typer.Typer(no_args_is_help=True, help="Signed credit limits, verified against the pinned keys.")

File = Annotated[
    Path | None, typer.Option("--file", help="Another snapshot file; the one in use if not said.")
]


@app.command()
def show(file: File = None, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """What the signed header says."""
    with opened(home, file) as snapshot:
        data = _header(snapshot)
    lines = [data["sentence"], f"  {data['count']} tokens of {data['issuer']} in {data['currency']}"]
    emit(data, "\n".join([*lines, f"  root {data['root']}"]), as_json=as_json)


@app.command()
def verify(file: File = None, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Check signatures, tree and every record. Exit code 3 or 4 names what fails."""
    with opened(home, file) as snapshot:
        count = sum(1 for _ in snapshot.records())
        data = _header(snapshot) | {"verified": count}
    emit(data, f"{count} records, all under the signed root. {data['sentence']}", as_json=as_json)


@app.command()
def lookup(
    token_key: Annotated[str, typer.Argument(help="32 hexadecimal digits, as the journal shows them.")],
    file: File = None,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """One token's limit record, verified up to the signed root. Exit code 7 if it proves absent."""
    try:
        key = bytes.fromhex(token_key)
    except ValueError:
        raise InvalidInput("not hexadecimal", where="token key") from None
    with opened(home, file) as snapshot:
        record = snapshot.lookup(key)
        if record is None:
            raise NotFound(f"snapshot {snapshot.header.version} proves that it has no such token")
        data = {
            "token_key": record.token_key.hex(),
            "ceiling": record.ceiling,
            "per_tap_cap_minor": record.per_tap_cap_minor,
            "sequence": record.sequence,
            "status": record.status.name.lower(),
            "assurance": record.assurance,
            "digest": record.digest(snapshot.header.nonce).hex(),
            "version": snapshot.header.version,
        }
    emit(data, "\n".join(f"{name}: {value}" for name, value in data.items()), as_json=as_json)


@contextmanager
def opened(home: Path, file: Path | None) -> Iterator[Snapshot]:
    place = Home(home)
    enrolment = load_enrolment(place.enrolment).enrolment
    if file is None:
        stored = stored_snapshots(place.snapshots)
        if not stored:
            raise NotFound("no snapshot has been fetched yet", advice="run pos-gateway gateway serve")
        file = stored[0][1]
    keys = {key.id: Ed25519PublicKey.from_public_bytes(key.public_key) for key in enrolment.snapshot_keys}
    with SnapshotFile(file) as source:
        snapshot = Snapshot.open(source.read_at, source.size, keys, enrolment.snapshot_threshold)
        check_meant_for(
            snapshot.header,
            issuer=enrolment.issuer,
            currency=enrolment.currency,
            token_key_epoch=enrolment.token_key_epoch,
        )
        yield snapshot


def _header(snapshot: Snapshot) -> dict[str, Any]:
    header, now_unix_s = snapshot.header, int(time.time())
    return {
        "issuer": header.issuer,
        "currency": header.currency,
        "version": header.version,
        "count": header.count,
        "root": header.root.hex(),
        "freshness": freshness(header, now_unix_s).value,
        "sentence": explain_freshness(header, now_unix_s),
        "valid_from_unix_s": header.valid_from_unix_s,
        "refresh_after_unix_s": header.refresh_after_unix_s,
        "valid_until_unix_s": header.valid_until_unix_s,
    }
