"""A shop in a few lines: it enrols, reads limits from the published file, takes genuine taps, presents."""

from __future__ import annotations

import json
import secrets
import ssl
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from tuf.api.metadata import Metadata, Root

from pos_gateway.distribution import LimitKeys
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import AID, NO_PLAN, Iad, Sale
from pos_gateway.emv.authentication import authenticate_card, authenticate_cryptogram
from pos_gateway.emv.dialogue import converse, read_card, request_cryptogram
from pos_gateway.emv.transcript import Transcript
from pos_gateway.enrolment import Enrolment, EnrolmentRequest, Merchant
from pos_gateway.gateway.fetcher import authority_context
from pos_gateway.instalments import Quote
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger
from pos_gateway.ledger.settlement import RecordVerdict
from pos_gateway.limits.record import LimitRecord, token_key
from pos_gateway.limits.snapshot import Snapshot
from pos_gateway.money import currency
from pos_gateway.records import GENESIS_HASH, Kind, Record, Seal, Verdict, make_record, sign_batch
from pos_gateway.snapshot_file import SnapshotFile

MERCHANT = Merchant(id="CORNERSHOP", name="Corner shop", category="5411")


@dataclass
class Clock:
    """A ledger's clock that a test sets."""

    now_s: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


def context(
    authority: bytes,
    certificate: bytes | None = None,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
) -> ssl.SSLContext:
    """For connections to the server of this authority, with a client certificate or without."""
    made = authority_context(authority)
    if certificate is not None and key is not None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.write(x509.load_der_x509_certificate(certificate).public_bytes(Encoding.PEM))
            file.flush()
            made.load_cert_chain(file.name)
    return made


@dataclass
class Shop:
    ledger: Ledger
    enrolment: Enrolment
    key: Ed25519PrivateKey
    tls_key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )
    sequence: int = 0
    last_hash: bytes = GENESIS_HASH
    snapshot_version: int = 0

    @classmethod
    def enrol(cls, ledger: Ledger, merchant: Merchant = MERCHANT) -> Shop:
        key = Ed25519PrivateKey.generate()
        tls_key = ec.generate_private_key(ec.SECP256R1())
        request = EnrolmentRequest.make(ledger.invite(merchant), key, tls_key)
        return cls(ledger, ledger.enrol(request), key, tls_key)

    def context(self, certificate: bytes | None = None) -> ssl.SSLContext:
        """For connections that show this shop's first certificate, or another for the same key."""
        return context(self.enrolment.authority, certificate or self.enrolment.certificate, self.tls_key)

    def seal(self, proof: bytes) -> bytes:
        return Seal(self.sealing_key, secrets.token_bytes).seal(proof)

    def limit(self, pan: str, psn: int) -> tuple[LimitRecord, bytes]:
        """The record in the latest snapshot, verified, and its digest."""
        path = self.ledger.latest_snapshot().path
        trusted = LimitKeys.of(Metadata[Root].from_bytes(self.enrolment.trusted_root).signed)
        with SnapshotFile(path) as file:
            snapshot = Snapshot.open(file.read_at, file.size, trusted.keys, trusted.threshold)
            record = snapshot.lookup(token_key(self.enrolment.token_key_secret, pan, psn))
            assert record is not None
            self.snapshot_version = snapshot.header.version
            return record, record.digest(snapshot.header.nonce)

    def tap(
        self,
        card: VirtualCard,
        amount_minor: int,
        *,
        limit: tuple[LimitRecord, bytes] | None = None,
        record_id: uuid.UUID | None = None,
        sequence: int | None = None,
        lies: Mapping[str, Any] = MappingProxyType({}),
        plan: Quote | None = None,
    ) -> Record:
        """A genuine TC as a journal record; `lies` are facts changed afterwards."""
        sale_id = record_id or uuid.uuid4()
        at = datetime.fromtimestamp(self.ledger.now_unix_ms() / 1000, UTC)
        number = secrets.token_bytes(4)
        plan_digest = NO_PLAN if plan is None else plan.digest
        told = {} if plan is None else {"plan": {"offer": plan.offer.to_json(), "periods": plan.periods}}
        self.sequence += 1

        def sale(ceiling: int, digest: bytes) -> Sale:
            return Sale(
                amount_minor=amount_minor,
                currency_numeric=currency(self.enrolment.currency).numeric,
                country_numeric=self.enrolment.country_numeric,
                at=at,
                unpredictable_number=number,
                sequence_counter=self.sequence,
                terminal_id=self.enrolment.terminal_id,
                merchant_id=self.enrolment.merchant.id,
                merchant_category=self.enrolment.merchant.category,
                sale_id=sale_id.bytes,
                ceiling=ceiling,
                limit_digest=digest,
                plan_digest=plan_digest,
            )

        card.power_up()
        read = converse(read_card(sale(0, bytes(16)).elements(), [AID]), card.process)
        record, digest = limit or self.limit(read.pan, read.psn)
        answer = converse(
            request_cryptogram(read, sale(record.ceiling, digest).elements(), CryptogramKind.TC),
            card.process,
        )
        assert answer.kind is CryptogramKind.TC, answer.kind
        authenticated = authenticate_card(read, self.ledger.ca_keys, at.date())
        after = Iad.from_bytes(answer.elements[0x9F10]).counter_after
        facts = {
            "sale_id": str(sale_id),
            "amount_minor": amount_minor,
            "currency": self.enrolment.currency,
            "at_unix_ms": self.ledger.now_unix_ms(),
            "gateway_id": self.enrolment.gateway_id,
            "terminal_id": self.enrolment.terminal_id,
            "merchant_id": self.enrolment.merchant.id,
            "merchant_category": self.enrolment.merchant.category,
            "token_key": record.token_key.hex(),
            "token_last4": read.last4,
            "atc": int.from_bytes(answer.elements[0x9F36], "big"),
            "ac": authenticate_cryptogram(authenticated, answer).ac.hex(),
            "counter_before": after - amount_minor,
            "counter_after": after,
            "ceiling": record.ceiling,
            "limit_digest": digest.hex(),
            "snapshot_version": self.snapshot_version,
            "plan_digest": plan_digest.hex(),
            **told,
            "sequence_counter": self.sequence,
            "unpredictable_number": number.hex(),
            **lies,
        }
        sealed = self.seal(Transcript.of(read, answer).to_bytes())
        return self.record(sale_id, facts, sealed, sequence=sequence)

    @property
    def sealing_key(self) -> X25519PublicKey:
        return X25519PublicKey.from_public_bytes(self.enrolment.sealing_key)

    def correct(
        self,
        kind: Kind,
        payment: Record | uuid.UUID,
        amount_minor: int,
        *,
        lies: Mapping[str, Any] = MappingProxyType({}),
    ) -> Record:
        """A reversal or refund of a payment as a journal record."""
        self.sequence += 1
        facts = {
            "about": str(payment.id if isinstance(payment, Record) else payment),
            "amount_minor": amount_minor,
            "currency": self.enrolment.currency,
            "at_unix_ms": self.ledger.now_unix_ms(),
            "reason": "goods returned",
            "gateway_id": self.enrolment.gateway_id,
            "terminal_id": self.enrolment.terminal_id,
            "merchant_id": self.enrolment.merchant.id,
            **lies,
        }
        return self.record(uuid.uuid4(), facts, b"", kind=kind)

    def record(
        self,
        record_id: uuid.UUID,
        facts: dict[str, Any],
        sealed: bytes,
        *,
        sequence: int | None = None,
        kind: Kind = Kind.AUTHORIZATION,
    ) -> Record:
        record = make_record(
            sequence=sequence or self.sequence,
            record_id=record_id,
            kind=kind,
            facts=facts,
            proof=sealed,
            previous_hash=self.last_hash,
            gateway_key=self.key,
        )
        self.last_hash = record.hash
        return record

    def batch(self, records: Sequence[Record | dict[str, Any]]) -> tuple[bytes, bytes]:
        """A request body and the gateway's signature over it."""
        wire = [r.to_wire() if isinstance(r, Record) else r for r in records]
        body = json.dumps({"gateway_id": self.enrolment.gateway_id, "records": wire}).encode()
        return body, sign_batch(body, self.key)

    def present(self, *records: Record | dict[str, Any]) -> list[RecordVerdict]:
        body, signature = self.batch(records)
        return self.ledger.present(self.enrolment.gateway_id, body, signature)

    def verdict(self, record: Record) -> Verdict:
        return self.present(record)[0].verdict
