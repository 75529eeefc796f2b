"""Giving out one ceiling: the only way by which credit leaves the house for the shops.

    lock the account ─► issue: does the invariant hold with U ∪ (H, c]? ─► commit ─► signer's log ─► release

Snapshots issue in bulk (`publisher`), grants and notes one by one, all by the same rule. All functions run
inside the transaction that holds the account.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sqlalchemy as sa

from pos_gateway.errors import Conflict, InvalidInput
from pos_gateway.ledger import store
from pos_gateway.ledger.accounts import LockedAccount, TokenLine, TokenStatus, publication_of
from pos_gateway.ledger.reserve import Guarantee, InvariantBroken, PublicationKind
from pos_gateway.limits.record import LimitRecord


@dataclass(frozen=True, slots=True)
class Issued:
    """A grant or note on record. It may leave the house once it is committed and in the signer's log
    (`SignerLog.record_single`); `row` is what the log keeps."""

    kind: PublicationKind
    record: LimitRecord
    nonce: bytes
    digest: bytes
    issued_unix_s: int
    valid_until_unix_s: int
    terminal_id: str | None
    row: dict[str, object] = field(repr=False)


def issue(
    connection: sa.Connection,
    account: LockedAccount,
    line: TokenLine,
    *,
    kind: PublicationKind,
    ceiling: int,
    valid_until_unix_s: int,
    nonce: bytes,
    guarantee: Guarantee,
    terminal_id: str | None = None,
    per_tap_cap_minor: int | None = None,
) -> Issued:
    """Put one new ceiling on record. `account` comes from `accounts.lock_account`, `line` is one of its
    lines, `nonce` is 16 fresh random bytes. Issued at `account.now_unix_s`.

    Raises:
        Conflict: the token may not pay.
        InvalidInput: a ceiling below H, an end before the beginning, or a field no limit record can hold.
        InvariantBroken: the account has not that much credit free; nothing was recorded.
    """
    if line.status is not TokenStatus.ACTIVE:
        raise Conflict(f"token {line.id} is {line.status.value}: nothing can be given out for it")
    if ceiling < line.highest:
        raise InvalidInput("below the highest counter the card has shown", where="ceiling")
    if valid_until_unix_s <= account.now_unix_s:
        raise InvalidInput("must be in the future", where="valid_until_unix_s")
    if (kind is PublicationKind.GRANT) != (terminal_id is not None):
        raise InvalidInput("a grant, and nothing else, is for one terminal", where="terminal_id")
    cost_minor = line.cost_minor(ceiling, account.now_unix_s)
    if cost_minor > max(account.free_minor, 0):
        raise InvariantBroken(
            f"{cost_minor} more minor units would be reserved, and {max(account.free_minor, 0)} are free"
        )
    record = LimitRecord(
        token_key=line.row.token_key,
        ceiling=ceiling,
        per_tap_cap_minor=line.row.per_tap_cap_minor if per_tap_cap_minor is None else per_tap_cap_minor,
        sequence=_next_sequence(connection, line),
        status=line.status.on_record,
        assurance=line.row.assurance,
        instalment_class=line.row.instalment_class,
    )
    digest = record.digest(nonce)
    row = publication_row(
        line,
        record,
        kind=kind,
        digest=digest,
        issued_unix_s=account.now_unix_s,
        valid_until_unix_s=valid_until_unix_s,
        guarantee=guarantee,
        terminal_id=terminal_id,
    )
    connection.execute(store.publications.insert().values(row))
    line.publications.append(publication_of(row))
    return Issued(
        kind=kind,
        record=record,
        nonce=nonce,
        digest=digest,
        issued_unix_s=account.now_unix_s,
        valid_until_unix_s=valid_until_unix_s,
        terminal_id=terminal_id,
        row=row,
    )


def publication_row(
    line: TokenLine,
    record: LimitRecord,
    *,
    kind: PublicationKind,
    digest: bytes,
    issued_unix_s: int,
    valid_until_unix_s: int,
    guarantee: Guarantee,
    snapshot_version: int | None = None,
    terminal_id: str | None = None,
) -> dict[str, object]:
    """One row of the publications' table."""
    return {
        "account_id": line.account_id,
        "token_id": line.id,
        "digest": digest,
        "kind": kind.value,
        "sequence": record.sequence,
        "snapshot_version": snapshot_version,
        "terminal_id": terminal_id,
        "issued_unix_s": issued_unix_s,
        "highest": line.highest,
        "ceiling": record.ceiling,
        "evidence": None,
        "valid_until_unix_s": valid_until_unix_s,
        "stands_until_unix_s": guarantee.stands_until_unix_s(valid_until_unix_s),
        "lapsed": False,
    }


def _next_sequence(connection: sa.Connection, line: TokenLine) -> int:
    column = store.tokens.c.last_sequence
    mine = store.tokens.c.id == line.id
    connection.execute(store.tokens.update().where(mine).values(last_sequence=column + 1))
    return int(connection.execute(sa.select(column).where(mine)).scalar_one())
