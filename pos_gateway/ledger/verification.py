"""Examining a batch's evidence: in this process, or shared among several that do nothing else.

Signature, seal, certificates and cryptogram of a record cost several times what posting it costs, need no
database, and each record's are its own affair. The processes are given the issuer's keys through a pipe:
no key touches a disk in the clear. They end with the one that started them, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pos_gateway.emv.authentication import CaPublicKey
from pos_gateway.errors import PosGatewayError, Unavailable
from pos_gateway.ledger.batch import Examined
from pos_gateway.ledger.corrections import read_correction
from pos_gateway.ledger.evidence import Issuer, examine
from pos_gateway.ledger.gateways import Gateway
from pos_gateway.ledger.keys import MasterKeys, TokenKey
from pos_gateway.ledger.renunciations import read_renunciation
from pos_gateway.money import Currency
from pos_gateway.records import Kind, Record

_SLICES: Final = 2
"""Into how many slices a batch is cut for each process: none then waits long for the slowest."""


class Verifier:
    """Examines the records of batches. `processes`: 0 examines in the calling thread."""

    def __init__(self, issuer: Issuer, processes: int = 0) -> None:
        self._issuer = issuer
        self._processes = processes
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def examine(self, gateway: Gateway, raw: Sequence[object]) -> list[Examined]:
        """What becomes of each record before the database is asked, in their order.

        Raises:
            Unavailable: a process died over it; the same batch can be sent again.
        """
        if self._processes == 0 or len(raw) < 2 * self._processes:
            return _examine_all(raw, gateway, self._issuer)
        size = -(-len(raw) // (self._processes * _SLICES))
        slices = [raw[at : at + size] for at in range(0, len(raw), size)]
        pool = self._started()
        try:
            futures = [self._submit(pool, part, gateway) for part in slices]
            return [item for future in futures for item in future.result()]
        except (BrokenProcessPool, CancelledError) as error:
            self._give_up(pool)
            raise Unavailable(
                "a verifying process of the ledger died", advice="send the same batch again"
            ) from error

    def _submit(
        self, pool: ProcessPoolExecutor, part: Sequence[object], gateway: Gateway
    ) -> Future[list[Examined]]:
        try:
            return pool.submit(_examine_slice, part, gateway)
        except RuntimeError as error:  # another thread has given the pool up already
            raise BrokenProcessPool(str(error)) from error

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def _started(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                # Spawned, not forked: this process has threads, and they have locks.
                self._pool = ProcessPoolExecutor(
                    self._processes,
                    multiprocessing.get_context("spawn"),
                    initializer=_begin,
                    initargs=(_Keys.of(self._issuer),),
                )
            return self._pool

    def _give_up(self, pool: ProcessPoolExecutor) -> None:
        with self._lock:
            if self._pool is pool:
                self._pool = None
        pool.shutdown(wait=False, cancel_futures=True)


class _Keys(NamedTuple):
    """An issuer in a form that goes through a pipe."""

    currency: Currency
    country_numeric: int
    ca_keys: tuple[CaPublicKey, ...]
    master: MasterKeys
    token_key: TokenKey
    sealing: bytes

    @classmethod
    def of(cls, issuer: Issuer) -> _Keys:
        return cls(
            issuer.currency,
            issuer.country_numeric,
            tuple(issuer.ca_keys),
            issuer.master,
            issuer.token_key,
            issuer.sealing.private_bytes_raw(),
        )

    def issuer(self) -> Issuer:
        return Issuer(*self[:-1], X25519PrivateKey.from_private_bytes(self.sealing))

    def __repr__(self) -> str:
        return "_Keys()"


_issuer: Issuer


def _begin(keys: _Keys) -> None:
    global _issuer
    _issuer = keys.issuer()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the ledger's to act on
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _examine_slice(raw: Sequence[object], gateway: Gateway) -> list[Examined]:
    return _examine_all(raw, gateway, _issuer)


def _examine_all(raw: Sequence[object], gateway: Gateway, issuer: Issuer) -> list[Examined]:
    known: set[bytes] = set()
    return [_examine(item, gateway, issuer, known) for item in raw]


def _examine(raw: object, gateway: Gateway, issuer: Issuer, known: set[bytes]) -> Examined:
    record_id = _claimed_id(raw)
    try:
        record = Record.from_wire(raw)
        record.verify(gateway.key, known)
    except PosGatewayError as error:
        return Examined(record_id, reason=f"The record was not accepted: {error.reason}.")
    try:
        if record.kind.corrects:
            correction = read_correction(record, gateway, issuer.currency)
            return Examined(record_id, record, correction=correction)
        if record.kind is Kind.RENUNCIATION:
            return Examined(record_id, record, renunciation=read_renunciation(record, gateway))
        return Examined(record_id, record, tap=examine(record, gateway, issuer))
    except PosGatewayError as error:
        what = "correction was not accepted" if record.kind.corrects else "payment is not proven"
        return Examined(record_id, record, reason=f"The {what}: {error.reason}.")


def _claimed_id(raw: object) -> str:
    """The id an unreadable record goes by; nothing else that was sent is repeated or kept."""
    try:
        return str(uuid.UUID(raw["id"])) if isinstance(raw, Mapping) else ""
    except (KeyError, ValueError, TypeError, AttributeError):
        return ""
