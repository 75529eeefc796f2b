"""Where receipts are made and handed out, each marked as a duplicate from the second on."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from uuid import UUID

from pos_gateway.authorization.correction import Standing
from pos_gateway.authorization.receipt import DecisionReceipt, qr_text
from pos_gateway.errors import NotFound
from pos_gateway.gateway.lane import plan_of
from pos_gateway.gateway.language import Language
from pos_gateway.gateway.receipts.contents import Copy, Sale, Shop, receipt
from pos_gateway.gateway.receipts.escpos import as_escpos, send
from pos_gateway.gateway.receipts.paper import Paper
from pos_gateway.gateway.receipts.proofs import LimitProofs
from pos_gateway.records import Kind, Record


class JournalPort(Protocol):
    """What is needed of the journal."""

    def about(self, record_id: UUID) -> list[Record]: ...

    def last_verdict(self, record_id: UUID) -> str | None: ...


class Desk:
    """Blocks on the disk. `standing`: how a payment stands after its corrections; `sign`: by the gateway's
    key; `deadline_s`: the issuer's presentment deadline in the limits in use."""

    def __init__(
        self,
        shop: Shop,
        journal: JournalPort,
        proofs: LimitProofs,
        issued: Issued,
        *,
        gateway_key: bytes,
        sign: Callable[[bytes], bytes],
        standing: Callable[[UUID], Standing | None],
        deadline_s: Callable[[], int | None],
        printer: str,
        columns: int,
    ) -> None:
        self.shop = shop
        self._journal = journal
        self._proofs = proofs
        self._issued = issued
        self._gateway_key = gateway_key
        self._sign = sign
        self._standing = standing
        self._deadline_s = deadline_s
        self.printer = printer
        self._columns = columns

    def decision_receipt(self, payment_id: UUID) -> DecisionReceipt:
        """
        Raises:
            NotFound: nothing was approved under this id.
        """
        for record in self._journal.about(payment_id):
            if record.kind is Kind.AUTHORIZATION:
                proof = self._proofs.of(record.id, record.facts())
                return DecisionReceipt(
                    self.shop.issuer, self.shop.merchant_name, self._gateway_key, record, proof
                )
        raise NotFound("nothing was approved under this id", advice="nothing was charged under it")

    def paper(self, payment_id: UUID, copy: Copy, language: Language, *, issue: bool = True) -> Paper:
        """A receipt. With `issue` it counts as handed out: the next one is a duplicate.

        Raises:
            NotFound: no payment is known under this id.
        """
        duplicate = self._issued.was(payment_id, copy)
        sale = self._sale(payment_id)
        if issue:
            self._issued.note(payment_id, copy)
        return receipt(self.shop, replace(sale, duplicate=duplicate), copy, language)

    def print(self, payment_id: UUID, copy: Copy, language: Language) -> None:
        """
        Raises:
            NotFound: no payment is known under this id.
            Unavailable: no printer, or it does not answer; the receipt does not count as handed out.
        """
        paper = self.paper(payment_id, copy, language, issue=False)
        send(self.printer, as_escpos(paper, self._columns))
        self._issued.note(payment_id, copy)

    def print_paper(self, paper: Paper) -> None:
        """
        Raises:
            Unavailable: no printer, or it does not answer.
        """
        send(self.printer, as_escpos(paper, self._columns))

    def _sale(self, payment_id: UUID) -> Sale:
        decline: Record | None = None
        for record in self._journal.about(payment_id):
            if record.kind is Kind.AUTHORIZATION:
                return self._approved(record)
            if record.kind is Kind.DECLINE:
                decline = record
        if decline is None:
            raise NotFound("no payment is known under this id", advice="nothing was charged under it")
        facts = decline.facts()
        return Sale(facts, False, decline.sequence, plan_of(facts))

    def _approved(self, record: Record) -> Sale:
        facts = record.facts()
        standing, deadline_s = self._standing(record.id), self._deadline_s()
        return Sale(
            facts,
            True,
            record.sequence,
            plan_of(facts),
            refunded_minor=standing.refunded_minor if standing else 0,
            voided=standing.voided if standing else False,
            presented_by_unix_ms=facts["at_unix_ms"] + 1000 * deadline_s if deadline_s else None,
            verdict_known=self._journal.last_verdict(record.id) is not None,
            proof=qr_text(self.decision_receipt(record.id), self._sign),
        )


class Issued:
    """Which copies were handed out. Safe to call from any thread."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False)
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS issued (sale_id BLOB, copy TEXT, PRIMARY KEY (sale_id, copy)) STRICT"
        )
        self._db.commit()

    def was(self, payment_id: UUID, copy: Copy) -> bool:
        with self._lock:
            found = self._db.execute(
                "SELECT 1 FROM issued WHERE sale_id = ? AND copy = ?", (payment_id.bytes, copy.value)
            )
            return found.fetchone() is not None

    def note(self, payment_id: UUID, copy: Copy) -> None:
        with self._lock, self._db:
            self._db.execute("INSERT OR IGNORE INTO issued VALUES (?, ?)", (payment_id.bytes, copy.value))

    def close(self) -> None:
        with self._lock:
            self._db.close()
