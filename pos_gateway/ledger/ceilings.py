"""Every token's next ceiling, and putting it on record: what a snapshot will say.

Accounts come in stretches, in the order of their ids, each in a transaction of its own that holds them for
a moment: posting and grants go on beside it. Plain accounts are decided by a few statements for all of them
(`plain`), the others one by one here; what the first do is what the second would have done. Either way the
invariant is held to what was written, read back, before the transaction may commit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.ledger import accounts, habits, plain, store
from pos_gateway.ledger.accounts import TokenLine, TokenStatus
from pos_gateway.ledger.allowance import Candidate, allot, shares_minor
from pos_gateway.ledger.bulk import among, insert_rows
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.habits import Shown
from pos_gateway.ledger.issue import publication_row
from pos_gateway.ledger.movements import complete, is_pending
from pos_gateway.ledger.reserve import PublicationKind, interval_set, measure, subtract
from pos_gateway.ledger.use import UsePolicy, ceiling_for
from pos_gateway.limits.header import SnapshotTerms
from pos_gateway.limits.record import LimitRecord

STRETCH: Final = 5_000
"""So many accounts are held together: for part of a second."""

STATUS: Final = {status.value: status.on_record for status in TokenStatus}
"""As a limit record says it."""

_DAY_S: Final = 24 * 3600


def decide_stretch(
    connection: sa.Connection, after: str, terms: SnapshotTerms, policy: Policy, *, size: int = STRETCH
) -> str | None:
    """Decide and record the limits of the next accounts after the id `after`; returns the last one's id,
    None when there was none left.

    Raises:
        InvariantBroken: a fault of ours; the transaction must not commit.
    """
    with plain.Stretch(connection, after, size, terms, policy) as stretch:
        if stretch.last is None:
            return None
        stretch.decide()
        stretch.settle(list(_shared_ceilings(connection, stretch, terms, policy)))
        stretch.record()
        unusual = stretch.unusual()
        for start in range(0, len(unusual), accounts.AT_ONCE):
            _decide_accounts(connection, unusual[start : start + accounts.AT_ONCE], terms, policy)
        accounts.check_accounts(
            connection, (before := stretch.not_cleared()), terms.valid_from_unix_s, before
        )
        return stretch.last


def _decide_accounts(
    connection: sa.Connection, chunk: Sequence[str], terms: SnapshotTerms, policy: Policy
) -> None:
    now_unix_s = terms.valid_from_unix_s
    rows = accounts.lock_accounts(connection, chunk)
    pending = [account_id for account_id, row in rows.items() if is_pending(accounts.balance_of(row))]
    for account_id in pending:
        account = accounts.lock_account(connection, account_id, now_unix_s)
        complete(connection, account, now_unix_s * 1000)
    if pending:
        rows = accounts.lock_accounts(connection, chunk)
    changes: list[dict[str, object]] = []
    published: list[dict[str, object]] = []
    # Of accounts without a token too: one may be over its limit already.
    before_minor = {id_: accounts.balance_of(row).committed_minor(0) for id_, row in rows.items()}
    by_account = accounts.lines_by_account(accounts.token_lines(connection, chunk))
    spent = habits.spent_lately(connection, chunk, policy.use, now_unix_s) if policy.use else {}
    sharing = [account_id for account_id, lines in by_account.items() if len(lines) > 1]
    recent_taps = _recent_taps(connection, sharing, policy, now_unix_s)
    for account_id, lines in by_account.items():
        balance = accounts.balance_of(rows[account_id])
        shown = [
            Shown(
                line.id,
                line.claimable(now_unix_s),
                line.highest,
                line.row.assurance,
                line.status is TokenStatus.ACTIVE,
            )
            for line in lines
        ]
        reserve_minor = sum(measure(line.claim) for line in shown)
        before_minor[account_id] = balance.committed_minor(reserve_minor)
        owable_minor = balance.free_minor(reserve_minor) + reserve_minor
        ceilings = next_ceilings(
            policy,
            shown,
            spent,
            recent_taps,
            owable_minor=owable_minor,
            limit_minor=rows[account_id].limit_minor,
        )
        for line, record, publication in _decide_account(lines, ceilings, terms, policy):
            if record.sequence != line.row.record_sequence:
                changes.append(change(line, record, terms.version))
            if publication is not None:
                published.append(publication)
    if changes:
        connection.execute(CHANGE, changes)
    if published:
        insert_rows(connection, store.publications, published)
    accounts.check_accounts(connection, chunk, now_unix_s, before_minor)


def _shared_ceilings(
    connection: sa.Connection, stretch: plain.Stretch, terms: SnapshotTerms, policy: Policy
) -> Iterator[tuple[str, int]]:
    """The next ceilings of tokens that share an account, all on plain lines."""
    shared = list(stretch.sharing())
    taps = _recent_taps(connection, [account.id for account in shared], policy, terms.valid_from_unix_s)
    for account in shared:
        ceilings = next_ceilings(
            policy,
            [
                Shown(line.id, line.claim, line.highest, line.assurance, line.may_pay)
                for line in account.lines
            ],
            {line.id: (line.spent, line.cut_off, line.largest) for line in account.lines},
            taps,
            owable_minor=account.owable_minor,
            limit_minor=account.limit_minor,
        )
        for line in account.lines:
            yield line.id, ceilings.get(line.id, 0)


def _recent_taps(
    connection: sa.Connection, sharing: Sequence[str], policy: Policy, now_unix_s: int
) -> dict[str, int]:
    """How often tokens paid lately, of the accounts where more than one shares."""
    if policy.allowance.recent_days == 0 or not sharing:
        return {}
    columns = store.transfers.c
    query = (
        sa.select(columns.token_id, sa.func.count())
        .where(
            among(connection, columns.account_id, sharing),
            columns.kind == "payment",
            columns.posted_unix_ms >= (now_unix_s - policy.allowance.recent_days * _DAY_S) * 1000,
        )
        .group_by(columns.token_id)
    )
    return {token_id: int(count) for token_id, count in connection.execute(query)}


def next_ceilings(
    policy: Policy,
    lines: Sequence[Shown],
    spent: Mapping[str, tuple[int, int, int]],
    recent_taps: Mapping[str, int],
    *,
    owable_minor: int,
    limit_minor: int,
) -> dict[str, int]:
    """Pure: the next ceiling of each token of an account that may pay. `owable_minor`: how much the account
    may owe and reserve in all; `spent` as `habits.spent_lately`, looked at where allowances go by use."""
    free_minor = owable_minor - sum(measure(line.claim) for line in lines)
    if policy.use is not None:
        return _by_use(policy.use, lines, spent, owable_minor, limit_minor, free_minor)
    active = [line for line in lines if line.may_pay]
    candidates = [
        Candidate(line.claim, line.highest, line.assurance, recent_taps.get(line.id, 0)) for line in active
    ]
    shares = shares_minor(
        candidates,
        owable_minor=owable_minor,
        share_percent=policy.token_share_percent,
        policy=policy.allowance,
    )
    ceilings = allot(candidates, shares, free_minor=free_minor)
    return {line.id: ceiling for line, ceiling in zip(active, ceilings, strict=True)}


def _by_use(
    policy: UsePolicy,
    lines: Sequence[Shown],
    spent: Mapping[str, tuple[int, int, int]],
    owable_minor: int,
    limit_minor: int,
    free_minor: int,
) -> dict[str, int]:
    planned = habits.plan_shown(policy, lines, spent, owable_minor=owable_minor, limit_minor=limit_minor)
    ceilings: dict[str, int] = {}
    for line in lines:
        if line.id not in planned:
            continue
        ceiling = ceiling_for(
            line.claim, line.highest, ahead_minor=planned[line.id].snapshot_minor, free_minor=free_minor
        )
        free_minor -= measure(subtract(interval_set([(line.highest, ceiling)]), line.claim))
        ceilings[line.id] = ceiling
    return ceilings


def _decide_account(
    lines: list[TokenLine], ceiling_of: Mapping[str, int], terms: SnapshotTerms, policy: Policy
) -> Iterator[tuple[TokenLine, LimitRecord, dict[str, object] | None]]:
    now_unix_s = terms.valid_from_unix_s
    for line in lines:
        # A token that may not pay gets ceiling 0, which no card's counter is below.
        record = LimitRecord(
            token_key=line.row.token_key,
            ceiling=ceiling_of.get(line.id, 0),
            per_tap_cap_minor=policy.allowance.per_tap_cap_minor(
                line.row.assurance, line.row.per_tap_cap_minor
            ),
            sequence=line.row.record_sequence,
            status=line.status.on_record,
            assurance=line.row.assurance,
            instalment_class=line.row.instalment_class,
        )
        if line.row.record_version == 0 or record != last_record(line.row):
            record = record._replace(sequence=line.row.last_sequence + 1)
        if line.id not in ceiling_of:
            yield line, record, None
            continue
        yield (
            line,
            record,
            publication_row(
                line,
                record,
                kind=PublicationKind.SNAPSHOT,
                digest=record.digest(terms.nonce),
                issued_unix_s=now_unix_s,
                valid_until_unix_s=terms.valid_until_unix_s,
                guarantee=policy.guarantee,
                snapshot_version=terms.version,
            ),
        )


CHANGE: Final = (
    store.tokens.update()
    .where(store.tokens.c.id == sa.bindparam("token_id"))
    .values(
        {
            name: sa.bindparam(name)
            for name in (
                "record_version",
                "record_sequence",
                "record_ceiling",
                "record_per_tap_cap_minor",
                "record_status",
                "record_assurance",
                "record_instalment_class",
                "last_sequence",
            )
        }
    )
)


def change(line: TokenLine, record: LimitRecord, version: int) -> dict[str, object]:
    """What `CHANGE` wants: from now on this is the token's record."""
    return {
        "token_id": line.id,
        "record_version": version,
        "record_sequence": record.sequence,
        "last_sequence": record.sequence,
        "record_ceiling": record.ceiling,
        "record_per_tap_cap_minor": record.per_tap_cap_minor,
        "record_status": line.status.value,
        "record_assurance": record.assurance,
        "record_instalment_class": record.instalment_class,
    }


def last_record(row: Any) -> LimitRecord:
    """The last record issued for a token."""
    return LimitRecord(
        token_key=row.token_key,
        ceiling=row.record_ceiling,
        per_tap_cap_minor=row.record_per_tap_cap_minor,
        sequence=row.record_sequence,
        status=STATUS[row.record_status],
        assurance=row.record_assurance,
        instalment_class=row.record_instalment_class,
    )
