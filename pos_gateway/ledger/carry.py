"""The issuer's part of what a stick carries: the shops' queues in; letters of verdicts, and limits, out."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from pos_gateway.carrying import (
    LIMITS,
    MAX_LETTER_VERDICTS,
    ROOT,
    TO_GATEWAY,
    TO_LEDGER,
    CarriedVerdict,
    Letter,
    SignedBatch,
    is_gateway_id,
)
from pos_gateway.distribution import METADATA, TARGETS, TIMESTAMP
from pos_gateway.errors import InvalidConfiguration, InvalidMessage, NotFound, PosGatewayError, Unavailable
from pos_gateway.ledger import store
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.records import Verdict, parse_object
from pos_gateway.stick import put_file, read_set, sync_folder, trouble, write_set

SINCE_DAYS: Final = 60
_CHUNK_BYTES: Final = 1 << 20
_DAY_MS: Final = 86_400_000


@dataclass(slots=True)
class Taken:
    """What one gateway's queue on a stick came to. `refused`: batches, and why; `damaged`: files."""

    gateway_id: str
    verdicts: Counter[str] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Answered:
    gateway_id: str
    verdicts: int
    letters: int


def take_queues(ledger: Ledger, folder: Path) -> list[Taken]:
    """Take every queue on a stick, as if each had been presented over the line. What is whole and signed
    counts, whatever else is wrong with the stick; taking it again changes nothing.

    Raises:
        NotFound: there is no queue on it.
        Unavailable: the stick cannot be read, or the database is not to be had.
    """
    gateway_ids = queues_on(folder)
    if not gateway_ids:
        raise NotFound(f"{folder} holds no shop's queue", advice="pos-gateway gateway carry export FOLDER")
    return [_take_queue(ledger, folder, gateway_id) for gateway_id in gateway_ids]


def queues_on(folder: Path) -> list[str]:
    """The gateways whose queues are on a stick."""
    place = folder / ROOT / TO_LEDGER
    try:
        names = sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
    except OSError as error:
        raise trouble(place, error) from None
    return [name for name in names if is_gateway_id(name)]


def _take_queue(ledger: Ledger, folder: Path, gateway_id: str) -> Taken:
    taken = Taken(gateway_id)
    try:
        for name, data in read_set(folder / ROOT / TO_LEDGER / gateway_id):
            if data is None:
                taken.damaged.append(name)
                continue
            try:
                batch = SignedBatch.parse(data, where=name)
                # Whose it is says the batch: a folder's name says nothing.
                of = parse_object(batch.body, where=name).get("gateway_id")
                take = ledger.present if of == batch.gateway_id else ledger.adopt
                verdicts = take(batch.gateway_id, batch.body, batch.signature)
            except Unavailable:
                raise
            except PosGatewayError as error:
                taken.refused.append(f"{name}: {error.reason}")
            else:
                taken.verdicts.update(verdict.verdict.value for verdict in verdicts)
    except (NotFound, InvalidMessage) as error:
        taken.damaged.append(error.reason)
    return taken


def write_letters(
    ledger: Ledger, folder: Path, gateway_ids: Sequence[str], *, since_days: int = SINCE_DAYS
) -> list[Answered]:
    """Write what the books say of everything that each gateway presented in so many days, by whichever way.

    Raises:
        NotFound: no such gateway.
        Unavailable: see `stick.write_set`.
    """
    key, certificate = _server_identity(ledger.keys.tls)
    now_unix_ms = ledger.now_unix_ms()
    answered = []
    for gateway_id in gateway_ids:
        ledger.gateway(gateway_id)
        epochs, verdicts = _said(ledger, gateway_id, now_unix_ms - since_days * _DAY_MS)
        parts = [
            verdicts[at : at + MAX_LETTER_VERDICTS] for at in range(0, len(verdicts), MAX_LETTER_VERDICTS)
        ]
        letters = (
            Letter(gateway_id, epochs, now_unix_ms, part).sign(key, certificate) for part in parts or [()]
        )
        write_set(folder / ROOT / TO_GATEWAY / gateway_id, letters)
        answered.append(Answered(gateway_id, len(verdicts), len(parts) or 1))
    return answered


def write_limits(ledger: Ledger, folder: Path) -> int:
    """Copy the repository of limits onto a stick, `timestamp.json` last; returns how many bytes were new.

    Raises:
        Unavailable: the stick is full, write-protected or broken; limits that were on it whole stay so.
    """
    source, place = ledger.repository.folder, folder / ROOT / LIMITS
    size = 0
    with ledger.repository.exclusive():
        try:
            for part in (TARGETS, METADATA):
                (place / part).mkdir(parents=True, exist_ok=True)
                for path in sorted((source / part).iterdir()):
                    name = f"{part}/{path.name}"
                    if path.is_file() and not path.name.startswith(".") and name != TIMESTAMP:
                        size += _copy(path, place / name)
            if (source / TIMESTAMP).is_file():
                size += _copy(source / TIMESTAMP, place / TIMESTAMP)
            known = {path.name for path in (source / TARGETS).iterdir()}
            for path in (place / TARGETS).iterdir():
                if path.name not in known:
                    path.unlink()
        except OSError as error:
            raise trouble(folder, error) from None
    return size


def _said(
    ledger: Ledger, gateway_id: str, since_unix_ms: int
) -> tuple[tuple[str, ...], tuple[CarriedVerdict, ...]]:
    columns = store.presentments.c
    query = (
        sa.select(columns.record_id, columns.content_digest, columns.verdict, columns.reason)
        .where(columns.gateway_id == gateway_id, columns.received_unix_ms >= since_unix_ms)
        .order_by(columns.sequence)
    )
    with ledger.database.read() as connection:
        epochs = connection.scalars(sa.select(store.epochs.c.id).order_by(store.epochs.c.number))
        return tuple(str(epoch) for epoch in epochs), tuple(
            CarriedVerdict(row.record_id, row.content_digest, Verdict(row.verdict), row.reason)
            for row in connection.execute(query)
        )


def _server_identity(path: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        pem = path.read_bytes()
        key = load_pem_private_key(pem, password=None)
        certificate = x509.load_pem_x509_certificate(pem)
    except (OSError, ValueError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidConfiguration(
            "holds no key with its certificate",
            where=str(path),
            advice="pos-gateway ledger certificate renew",
        )
    return key, certificate


def _copy(source: Path, target: Path) -> int:
    """Whole or not at all; 0 if the same is there already."""
    wanted = hashlib.sha256()
    with source.open("rb") as file:
        for chunk in _chunks(file.fileno()):
            wanted.update(chunk)
    if target.is_file() and target.stat().st_size == source.stat().st_size:
        there = hashlib.sha256()
        with target.open("rb") as file:
            for chunk in _chunks(file.fileno()):
                there.update(chunk)
        if there.digest() == wanted.digest():
            return 0
    size = source.stat().st_size
    if size <= _CHUNK_BYTES:
        put_file(target, source.read_bytes())
        return size
    temporary = target.with_name(f".{target.name}.new")
    try:
        with temporary.open("wb") as out, source.open("rb") as file:
            for chunk in _chunks(file.fileno()):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)
    return size


def _chunks(descriptor: int) -> Iterator[bytes]:
    while chunk := os.read(descriptor, _CHUNK_BYTES):
        yield chunk
