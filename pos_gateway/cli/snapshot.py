"""`snapshot show|verify|lookup|diff|merge|fetch`: the signed limits this gateway goes by."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pos_gateway.cli.places import GATEWAY_HOME, GatewayHome
from pos_gateway.cli.terminal import Json, emit, telling
from pos_gateway.errors import InvalidInput, NotFound, Unavailable
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.feed import SnapshotFeed, stored_snapshots, trusted_limit_keys
from pos_gateway.gateway.fetcher import FolderRepository, HttpsRepository, Repository
from pos_gateway.gateway.identity import Enrolled, load_enrolment, load_identity
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.local_client import ask
from pos_gateway.gateway.program import now_unix_ms
from pos_gateway.limits.builder import Progress
from pos_gateway.limits.delta import changed_records
from pos_gateway.limits.header import MAX_HEADER_BYTES, check_meant_for, explain_freshness, freshness
from pos_gateway.limits.layers import Layers
from pos_gateway.limits.merge import Merge
from pos_gateway.limits.record import TOKEN_KEY_BYTES, LimitRecord
from pos_gateway.limits.snapshot import Snapshot
from pos_gateway.snapshot_file import SnapshotFile

app = typer.Typer(no_args_is_help=True, help="Signed credit limits, verified against the pinned keys.")

File = Annotated[Path | None, typer.Option("--file", help="Another snapshot file; those in use if not said.")]
TokenKey = Annotated[str, typer.Argument(help="32 hexadecimal digits, as the journal shows them.")]

_MAX_HEAD_BYTES: Final = 2 * MAX_HEADER_BYTES
_TELL_EVERY: Final = 4096


@app.command()
def show(file: File = None, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """What the signed header says; of a delta over a base, what both say."""
    with layers(home, file) as limits:
        data, *below = [_header(snapshot) for snapshot in limits]
    data["base"] = below[0] if below else None
    lines = []
    for shown in (data, *below):
        lines += [shown["sentence"], f"  {shown['count']} tokens of {shown['issuer']} in {shown['currency']}"]
        lines.append(f"  root {shown['root']}")
    emit(data, "\n".join(lines), as_json=as_json)


@app.command()
def verify(file: File = None, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Check signatures, tree and every record. Exit code 3 or 4 names what fails."""
    with layers(home, file) as limits:
        data, *_ = [_header(snapshot) for snapshot in limits]
        data["verified"] = sum(_verified(snapshot) for snapshot in limits)
    text = f"{data['verified']} records, all under the signed root. {data['sentence']}"
    emit(data, text, as_json=as_json)


@app.command()
def lookup(
    token_key: TokenKey, file: File = None, home: GatewayHome = GATEWAY_HOME, as_json: Json = False
) -> None:
    """One token's limit record, verified up to the signed root. Exit code 7 if it proves absent."""
    key = parse_token_key(token_key)
    with layers(home, file) as limits:
        for snapshot in limits:
            record = snapshot.lookup(key)
            if record is not None:
                break
        else:
            raise NotFound(f"limits {limits[0].header.version} prove that they have no such token")
        data = _record(record) | {
            "digest": record.digest(snapshot.header.nonce).hex(),
            "version": snapshot.header.version,
            "freshness": freshness(snapshot.header, int(time.time())).value,
        }
    emit(data, "\n".join(f"{name}: {value}" for name, value in data.items()), as_json=as_json)


@app.command()
def diff(
    base: Annotated[Path, typer.Argument(help="The older snapshot file.")],
    current: Annotated[Path, typer.Argument(help="The newer one.")],
    show_records: Annotated[int, typer.Option("--records", min=0, help="List at most so many.")] = 20,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """What changed from one whole snapshot to another, both verified to the last record."""
    new = 0
    rows: list[tuple[LimitRecord | None, LimitRecord]] = []
    count = {"changed": 0, "raised": 0, "lowered": 0}
    with opened(home, base) as old, opened(home, current) as now:
        for snapshot in (old, now):
            if snapshot.header.base_version is not None:
                raise InvalidInput("a delta; whole snapshots are compared", where="snapshot file")
        with telling("compared") as tell:
            for record in changed_records(old.records(), _told(now, tell)):
                before = old.lookup(record.token_key)
                count["changed"] += 1
                new += before is None
                if before is not None:
                    count["raised"] += record.ceiling > before.ceiling
                    count["lowered"] += record.ceiling < before.ceiling
                if len(rows) < show_records:
                    rows.append((before, record))
        data = {
            "from": old.header.version,
            "to": now.header.version,
            "new": new,
            **count,
            "records": [
                {"before": _record(before) if before else None, "after": _record(after)}
                for before, after in rows
            ],
        }
    lines = [
        f"Limits {data['from']} to {data['to']}: {count['changed']} of {now.header.count} tokens changed",
        f"  {new} new, ceiling raised for {count['raised']}, lowered for {count['lowered']}",
    ]
    for before, after in rows:
        was = f"{before.ceiling} {before.status.name.lower()}" if before else "new"
        lines.append(f"  {after.token_key.hex()}  {was} → {after.ceiling} {after.status.name.lower()}")
    emit(data, "\n".join(lines), as_json=as_json)


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="A whole snapshot.")],
    delta: Annotated[Path, typer.Argument(help="A delta over it.")],
    head: Annotated[Path, typer.Argument(help="The issuer's signed head of the delta's version.")],
    out: Annotated[Path, typer.Option("--out", help="Where the whole snapshot goes.")],
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Make the whole snapshot that the issuer signed out of base and delta. Stopped midway, it leaves
    nothing behind that could be taken for one."""
    keys, threshold = trusted_keys(home)
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        signed = head.read_bytes()[:_MAX_HEAD_BYTES]
        with opened(home, base) as below, opened(home, delta) as over, unfinished.open("w+b") as file:
            with telling("merged") as tell:
                header = Merge(below, over, signed, keys, threshold, file).run(tell)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(out)
        _sync_folder(out.parent)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {error.filename}") from None
    except OSError as error:
        raise Unavailable(f"cannot be written: {error.strerror}", advice="check the disk") from None
    finally:
        unfinished.unlink(missing_ok=True)
    data = {"version": header.version, "count": header.count, "root": header.root.hex(), "file": str(out)}
    emit(data, f"Limits {header.version} with {header.count} tokens: {out}", as_json=as_json)


@app.command()
def fetch(
    folder: Annotated[
        Path | None,
        typer.Option("--from", help="The issuer's repository, on a stick or a disk.", file_okay=False),
    ] = None,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Take newer limits from the ledger, or from a folder; with the gateway running or not."""
    place = Home(home)
    enrolled = load_enrolment(place.enrolment)
    running = _runs(place)
    if running and folder is not None:
        data = ask(place, "POST", "/v1/limits", {"folder": str(folder.absolute())})
    elif running:
        data = ask(place, "POST", "/v1/synchronise", {})
        emit(data, "The running gateway fetches them: see pos-gateway gateway status.", as_json=as_json)
        return
    else:
        data = _fetch(place, enrolled, folder)
    text = f"Limits {data['version']} are in use." if data["changed"] else "The limits here are the newest."
    emit(data, text, as_json=as_json)


def _runs(place: Home) -> bool:
    try:
        ask(place, "GET", "/v1/status")
    except Unavailable:
        return False
    return True


def _fetch(place: Home, enrolled: Enrolled, folder: Path | None) -> dict[str, Any]:
    """What the gateway would do, in its place."""
    source: Repository
    if folder is not None:
        source = FolderRepository(folder)
    else:
        source = HttpsRepository(enrolled.ledger_url, enrolled.enrolment.authority)
    place.create()
    key = load_identity(place.identity_key)
    with (
        Journal.open(place.journal, gateway_key=key, gateway_id=enrolled.enrolment.gateway_id) as journal,
        telling("fetched") as tell,
    ):
        feed = SnapshotFeed(
            place.snapshots,
            journal,
            enrolled.enrolment,
            clock=now_unix_ms,
            listener=lambda progress: tell(progress.done, progress.total) if progress else None,
        )
        feed.load()
        try:
            changed = feed.refresh(source)
        finally:
            feed.close()
        limits = feed.current()
    return {"changed": changed, "version": limits.version if limits else None}


@contextmanager
def layers(home: Path, file: Path | None) -> Iterator[tuple[Snapshot, ...]]:
    """The snapshots to look into, the newest first: one file, or those this gateway goes by."""
    if file is not None:
        with opened(home, file) as snapshot:
            yield (snapshot,)
        return
    with in_use(home) as limits:
        yield (limits.base,) if limits.delta is None else (limits.delta, limits.base)


@contextmanager
def in_use(home: Path) -> Iterator[Layers]:
    """The stored base with the latest stored delta over it, opened as the gateway opens them."""
    with opened(home, None) as base:
        pattern = f"limits-{base.header.version}-*.delta"
        deltas = {int(path.stem.split("-")[2]): path for path in Home(home).snapshots.glob(pattern)}
        if not deltas:
            yield Layers(base)
            return
        with opened(home, deltas[max(deltas)]) as delta:
            yield Layers(base, delta)


@contextmanager
def opened(home: Path, file: Path | None) -> Iterator[Snapshot]:
    """One snapshot file, signatures checked; the newest stored whole one if none is said."""
    place = Home(home)
    enrolment = load_enrolment(place.enrolment).enrolment
    if file is None:
        stored = stored_snapshots(place.snapshots)
        if not stored:
            raise NotFound("no snapshot has been fetched yet", advice="run pos-gateway gateway serve")
        file = stored[0][1]
    keys, threshold = trusted_keys(home)
    with SnapshotFile(file) as source:
        snapshot = Snapshot.open(source.read_at, source.size, keys, threshold)
        check_meant_for(
            snapshot.header,
            issuer=enrolment.issuer,
            currency=enrolment.currency,
            token_key_epoch=enrolment.token_key_epoch,
        )
        yield snapshot


def trusted_keys(home: Path) -> tuple[Mapping[str, Ed25519PublicKey], int]:
    """The keys that this gateway lets sign limits, and how many of them must."""
    place = Home(home)
    trusted = trusted_limit_keys(place.snapshots, load_enrolment(place.enrolment).enrolment)
    return trusted.keys, trusted.threshold


def parse_token_key(text: str) -> bytes:
    """
    Raises:
        InvalidInput: not 32 hexadecimal digits.
    """
    try:
        key = bytes.fromhex(text)
    except ValueError:
        raise InvalidInput("not hexadecimal", where="token key") from None
    if len(key) != TOKEN_KEY_BYTES:
        raise InvalidInput(f"{len(key)} bytes, expected {TOKEN_KEY_BYTES}", where="token key")
    return key


def _verified(snapshot: Snapshot) -> int:
    with telling("verified") as tell:
        return sum(1 for _ in _told(snapshot, tell))


def _told(snapshot: Snapshot, tell: Progress) -> Iterator[LimitRecord]:
    for done, record in enumerate(snapshot.records()):
        if done % _TELL_EVERY == 0:
            tell(done, snapshot.header.count)
        yield record


def _record(record: LimitRecord) -> dict[str, Any]:
    return {
        "token_key": record.token_key.hex(),
        "ceiling": record.ceiling,
        "per_tap_cap_minor": record.per_tap_cap_minor,
        "sequence": record.sequence,
        "status": record.status.name.lower(),
        "assurance": record.assurance,
    }


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
