"""Clones that were proven: two presentments whose genuine cryptograms claim the same points.

The books hold the two records with their sealed proofs, and no token number. The file for whoever must be
convinced is made on demand, and holds the full one: see `pos_gateway.conflict`.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from pos_gateway.conflict import Authorization, ConflictBundle
from pos_gateway.emv.authentication import CaPublicKey
from pos_gateway.errors import NotFound
from pos_gateway.ledger import gateways, store
from pos_gateway.ledger.evidence import Issuer
from pos_gateway.records import Kind, Record, open_proof


@dataclass(frozen=True, slots=True)
class ConflictFound:
    """One proven conflict: the record that was presented second, and the one it contradicts."""

    id: uuid.UUID
    account_id: str
    token_id: str
    gateway_id: str
    record_id: uuid.UUID
    other_gateway_id: str
    other_record_id: uuid.UUID
    proven_unix_ms: int


def every(connection: sa.Connection) -> tuple[ConflictFound, ...]:
    """Oldest first."""
    columns = store.conflicts.c
    rows = connection.execute(sa.select(store.conflicts).order_by(columns.proven_unix_ms, columns.id))
    return tuple(ConflictFound(**row._asdict()) for row in rows)


def bundle(
    connection: sa.Connection,
    conflict_id: uuid.UUID,
    *,
    issuer: Issuer,
    issuer_name: str,
    ca_keys: Sequence[CaPublicKey],
) -> ConflictBundle:
    """The file's content. It holds the full token number.

    Raises:
        NotFound: no such conflict, or one side of it is a return that no gateway has signed.
    """
    row = connection.execute(sa.select(store.conflicts).filter_by(id=conflict_id)).first()
    if row is None:
        raise NotFound(f"there is no conflict {conflict_id}")
    return ConflictBundle(
        issuer=issuer_name,
        currency=issuer.currency.code,
        ca_keys=tuple(ca_keys),
        authorizations=(
            _side(connection, row.gateway_id, row.record_id, issuer),
            _side(connection, row.other_gateway_id, row.other_record_id, issuer),
        ),
    )


def _side(connection: sa.Connection, gateway_id: str, record_id: uuid.UUID, issuer: Issuer) -> Authorization:
    row = connection.execute(
        sa.select(store.presentments).filter_by(gateway_id=gateway_id, record_id=record_id)
    ).first()
    if row is None:
        raise NotFound(f"record {record_id} was presented by no gateway: the card returned these points")
    record = Record(
        sequence=row.sequence,
        id=row.record_id,
        kind=Kind(row.kind),
        body=row.body,
        proof=row.sealed_proof,
        previous_hash=row.previous_hash,
        hash=row.content_digest,
        signature=row.signature,
    )
    return Authorization(
        record=record,
        gateway_key=gateways.find(connection, gateway_id).public_key,
        proof=open_proof(record.proof, issuer.sealing),
    )
