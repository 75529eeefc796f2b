"""The next limits of plain accounts, decided by a few statements for thousands of them.

A counter line is plain when nothing on it is open below H: all standing publications began within its run,
which reaches to H. Then U is one interval, (H, reach]. Of an account whose one token has such a line, what
`allowance.allot` and `use.allowances` come to is plain arithmetic, written here once more as an expression
of the database; where several tokens with such lines share an account, the functions themselves are asked
(`ceilings`), and the rest stays here. They remain the rule: a test draws accounts at random and holds what
this puts on record to what they say, on both databases. Whatever is unusual is left to them altogether.

Nothing here is trusted with the invariant. It is held to a bound read back from the tables after writing,
|U| ≤ from the lowest start to the highest end, less the run; accounts that the bound does not clear are
measured exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from types import TracebackType
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, Column, Double, Integer, LargeBinary, String

from pos_gateway.emv.application import DIGEST_BYTES, MAX_COUNTER
from pos_gateway.ledger import habits, store
from pos_gateway.ledger.accounts import TokenStatus
from pos_gateway.ledger.allowance import PHONE, SOFTWARE_PHONE, FormPolicy
from pos_gateway.ledger.bulk import beside
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.reserve import IntervalSet, PublicationKind, interval_set
from pos_gateway.ledger.use import UsePolicy
from pos_gateway.limits.header import SnapshotTerms
from pos_gateway.limits.record import DIGEST_DOMAIN, MAX_U32, LimitRecord

_MAX_MINOR: Final = 1 << 45
"""Limits beyond this, with which arithmetic could round or overflow, are left to Python's."""

_DAY_S: Final = 24 * 3600
_ACTIVE: Final = TokenStatus.ACTIVE.value
_SPENT: Final = ("spent", "cut_off", "largest")

_Number = sa.ColumnElement[Any]

_temporary: Final = sa.MetaData()

_held: Final = sa.Table(
    "held_accounts",
    _temporary,
    # The accounts of this stretch, locked, as they were before.
    Column("account_id", String(32), primary_key=True),
    Column("owable_minor", BigInteger, nullable=False),
    Column("limit_minor", BigInteger, nullable=False),
    Column("committed_minor", BigInteger, nullable=False),
    Column("pending", Boolean, nullable=False),
    prefixes=["TEMPORARY"],
    postgresql_on_commit="DROP",
)

_decided: Final = sa.Table(
    "decided_tokens",
    _temporary,
    # Their tokens. Where `plain`, U before is (highest, reach]; where `decided`, `ceiling` is the next one.
    Column("token_id", String(32), primary_key=True),
    Column("account_id", String(32), nullable=False),
    Column("plain", Boolean, nullable=False),
    Column("decided", Boolean, nullable=False),
    Column("highest", BigInteger, nullable=False),
    Column("reach", BigInteger, nullable=False),
    Column("ceiling", BigInteger, nullable=False),
    Column("per_tap_cap_minor", BigInteger, nullable=False),
    Column("status", String(8), nullable=False),
    Column("assurance", Integer, nullable=False),
    Column("token_key", LargeBinary(16), nullable=False),
    # Of its last record, and whether the next one differs from it in more than the ceiling.
    Column("last_sequence", BigInteger, nullable=False),
    Column("record_sequence", BigInteger, nullable=False),
    Column("record_ceiling", BigInteger, nullable=False),
    Column("differs", Boolean, nullable=False),
    Column("spent", BigInteger, nullable=False),
    Column("cut_off", BigInteger, nullable=False),
    Column("largest", BigInteger, nullable=False),
    prefixes=["TEMPORARY"],
    postgresql_on_commit="DROP",
)


@dataclass(frozen=True, slots=True)
class PlainLine:
    """One token of an account; U is (highest, reach]. What it has spent is as `habits.spent_lately` says."""

    id: str
    status: str
    assurance: int
    highest: int
    reach: int
    spent: int
    cut_off: int
    largest: int

    @property
    def may_pay(self) -> bool:
        return self.status == _ACTIVE

    @property
    def claim(self) -> IntervalSet:
        return interval_set([(self.highest, self.reach)])


@dataclass(frozen=True, slots=True)
class SharedAccount:
    """All tokens of an account. `owable_minor`: how much it may owe and reserve in all."""

    id: str
    owable_minor: int
    limit_minor: int
    lines: list[PlainLine]


class Stretch:
    """The next accounts after an id, held until the transaction ends. A context manager: on entering they
    are locked, and what stands no longer lapses. `last` is the last one's id, None if there are none."""

    def __init__(
        self, connection: sa.Connection, after: str, size: int, terms: SnapshotTerms, policy: Policy
    ) -> None:
        self.last: str | None = None
        self._connection = connection
        self._after = after
        self._size = size
        self._terms = terms
        self._policy = policy
        self._now_unix_s = terms.valid_from_unix_s
        self._postgresql = connection.dialect.name == "postgresql"

    def __enter__(self) -> Stretch:
        _temporary.create_all(self._connection, checkfirst=False)
        if self._postgresql:
            # A stretch is a small range of every index: never worth reading a whole table for.
            self._connection.exec_driver_sql("SET LOCAL random_page_cost = 1.1")
        account = store.accounts.c
        target_minor = account.target_line_minor + account.vault_minor - account.vault_leaving_minor
        committed_minor = account.outstanding_minor + account.uncleared_minor
        held = (
            sa.select(
                account.id,
                self._least(account.limit_minor, target_minor) - committed_minor,
                account.limit_minor,
                committed_minor,
                sa.or_(account.limit_minor > target_minor, account.vault_leaving_minor > 0),
            )
            .where(account.id > self._after)
            .order_by(account.id)
            .limit(self._size)
            .with_for_update(key_share=True)
        )
        self._connection.execute(_held.insert().from_select(list(_held.c), held))
        self._analyze(_held)
        bounds = sa.select(sa.func.min(_held.c.account_id), sa.func.max(_held.c.account_id))
        self._first, self.last = self._connection.execute(bounds).one()
        if self.last is not None:
            gone = store.publications.c.stands_until_unix_s < self._now_unix_s
            self._connection.execute(
                store.publications.update()
                .where(self._theirs(store.publications), ~store.publications.c.lapsed, gone)
                .values(lapsed=True)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None:
            _temporary.drop_all(self._connection, checkfirst=False)

    def decide(self) -> None:
        """Decide the ceilings of accounts with one token on a plain line."""
        self._connection.execute(_decided.insert().from_select(list(_decided.c), self._decisions()))
        self._analyze(_decided)

    def sharing(self) -> Iterator[SharedAccount]:
        """The accounts of several tokens, all of them on plain lines; tokens in order of their ids."""
        token = _decided.c
        unusual = sa.select(token.account_id).where(~token.plain)
        query = (
            sa.select(
                _held.c.account_id,
                _held.c.owable_minor,
                _held.c.limit_minor,
                *(token[name] for name in ("token_id", "status", "assurance", "highest", "reach")),
                *(token[name] for name in _SPENT),
            )
            .join(_decided, token.account_id == _held.c.account_id)
            .where(~token.decided, ~_held.c.pending, _held.c.account_id.not_in(unusual))
            .order_by(_held.c.account_id, token.token_id)
        )
        rows = self._connection.execute(query).all()
        for (account_id, owable_minor, limit_minor), those in groupby(rows, key=itemgetter(0, 1, 2)):
            lines = [PlainLine(*row[3:]) for row in those]
            yield SharedAccount(account_id, owable_minor, limit_minor, lines)

    def settle(self, ceilings: Sequence[tuple[str, int]]) -> None:
        """What `sharing` asked for, by token id; 0 for those that may not pay."""
        if not ceilings:
            return
        new = beside(self._connection, "next_ceilings", (_decided.c.token_id, _decided.c.ceiling), ceilings)
        self._connection.execute(
            _decided.update().where(_decided.c.token_id == new.c.c0).values(ceiling=new.c.c1, decided=True)
        )

    def record(self) -> None:
        """Put everything that was decided on record."""
        if not self._postgresql:
            self._teach_digest()
        token = _decided.c
        changed = sa.or_(token.differs, token.record_ceiling != token.ceiling)
        mine = [
            self._within(store.tokens.c.account_id),
            token.token_id == store.tokens.c.id,
            token.decided,
            changed,
        ]
        self._connection.execute(
            store.tokens.update()
            .where(*mine)
            .values(
                record_version=self._terms.version,
                record_sequence=token.last_sequence + 1,
                last_sequence=token.last_sequence + 1,
                record_ceiling=token.ceiling,
                record_per_tap_cap_minor=token.per_tap_cap_minor,
                record_status=token.status,
                record_assurance=token.assurance,
            )
        )
        sequence = sa.case((changed, token.last_sequence + 1), else_=token.record_sequence)
        stands_until_unix_s = self._policy.guarantee.stands_until_unix_s(self._terms.valid_until_unix_s)
        values = {
            "account_id": token.account_id,
            "token_id": token.token_id,
            "digest": self._digest(sequence),
            "kind": sa.literal(PublicationKind.SNAPSHOT.value),
            "sequence": sequence,
            "snapshot_version": sa.literal(self._terms.version, BigInteger),
            "issued_unix_s": sa.literal(self._now_unix_s, BigInteger),
            "highest": token.highest,
            "ceiling": token.ceiling,
            "valid_until_unix_s": sa.literal(self._terms.valid_until_unix_s, BigInteger),
            "stands_until_unix_s": sa.literal(stands_until_unix_s, BigInteger),
            "lapsed": sa.false(),
        }
        published = sa.select(*values.values()).where(token.decided, token.status == _ACTIVE)
        self._connection.execute(
            store.publications.insert().from_select(list(values), published.order_by(token.token_id))
        )

    def unusual(self) -> list[str]:
        """The accounts that were left out."""
        left_out = sa.select(_decided.c.account_id).where(~_decided.c.decided)
        query = sa.select(_held.c.account_id).where(sa.or_(_held.c.pending, _held.c.account_id.in_(left_out)))
        return list(self._connection.scalars(query.order_by(_held.c.account_id)))

    def not_cleared(self) -> dict[str, int]:
        """Of the accounts decided here those that by the bound may be over their limit, or over what they
        had committed before if that was more; and how much that was. Read from the tables as they are now."""
        publication, token, account, before = (
            store.publications.c,
            store.tokens.c,
            store.accounts.c,
            _decided.c,
        )
        end = self._least(publication.ceiling, sa.func.coalesce(publication.evidence, publication.ceiling))
        lines = (
            sa.select(
                publication.token_id,
                sa.func.min(publication.highest).label("low"),
                sa.func.max(end).label("high"),
            )
            .where(self._within(publication.account_id), *self._standing())
            .group_by(publication.token_id)
            .subquery()
        )
        posted_minor = self._most(
            self._least(lines.c.high, token.run_end) - self._most(lines.c.low, token.run_start), 0
        )
        bound_minor = sa.func.coalesce(lines.c.high - lines.c.low - posted_minor, 0)
        reserves = (
            sa.select(
                before.account_id,
                sa.cast(sa.func.sum(before.reach - before.highest), BigInteger).label("before_minor"),
                sa.cast(sa.func.sum(bound_minor), BigInteger).label("now_minor"),
            )
            .select_from(_decided)
            .join(store.tokens, token.id == before.token_id)
            .outerjoin(lines, lines.c.token_id == before.token_id)
            .where(before.decided, self._within(token.account_id))
            .group_by(before.account_id)
            .subquery()
        )
        before_minor = _held.c.committed_minor + reserves.c.before_minor
        now_minor = account.outstanding_minor + account.uncleared_minor + reserves.c.now_minor
        query = (
            sa.select(account.id, before_minor)
            .select_from(reserves)
            .join(_held, _held.c.account_id == reserves.c.account_id)
            .join(store.accounts, account.id == reserves.c.account_id)
            .where(self._within(account.id), now_minor > self._most(account.limit_minor, before_minor))
        )
        return {account_id: int(minor) for account_id, minor in self._connection.execute(query)}

    def _theirs(self, table: sa.Table) -> sa.ColumnElement[bool]:
        """Of the accounts that are held. By their bounds too: what the index can use."""
        return sa.and_(
            self._within(table.c.account_id), table.c.account_id.in_(sa.select(_held.c.account_id))
        )

    def _within(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        return column.between(self._first, self.last)

    def _standing(self) -> tuple[sa.ColumnElement[bool], ...]:
        """`Publication.stands`."""
        publication = store.publications.c
        return ~publication.lapsed, publication.stands_until_unix_s >= self._now_unix_s

    def _decisions(self) -> sa.Select[Any]:
        line = self._lines().subquery("line")
        values: dict[str, _Number] = {column.name: column for column in line.c}
        values["ahead_minor"] = (
            self._ahead_by_share(line) if self._policy.use is None else self._ahead_by_use(line)
        )
        line = sa.select(*(value.label(name) for name, value in values.items())).subquery("with_ahead")
        values = {column.name: column for column in line.c}
        values["next"] = sa.case((line.c.status == _ACTIVE, self._ceiling(line)), else_=0)
        line = sa.select(*(value.label(name) for name, value in values.items())).subquery("with_ceiling")
        column = line.c
        differs = sa.or_(
            column.record_version == 0,
            column.record_per_tap_cap_minor != column.cap_minor,
            column.record_status != column.status,
            column.record_assurance != column.assurance,
        )
        decided = sa.and_(column.plain, column.alone)
        return sa.select(
            column.id,
            column.account_id,
            column.plain,
            decided,
            column.highest,
            column.reach,
            sa.case((decided, column.next), else_=0),
            column.cap_minor,
            column.status,
            column.assurance,
            column.token_key,
            column.last_sequence,
            column.record_sequence,
            column.record_ceiling,
            differs,
            column.spent,
            column.cut_off,
            column.largest,
        )

    def _lines(self) -> sa.Select[Any]:
        """Every token of the held accounts, with U's end and whether its account is plain."""
        token, publication = store.tokens.c, store.publications.c
        end = self._least(publication.ceiling, sa.func.coalesce(publication.evidence, publication.ceiling))
        standing = (
            sa.select(
                publication.token_id,
                sa.func.min(publication.highest).label("low"),
                sa.func.max(publication.highest).label("last"),
                sa.func.max(end).label("reach"),
            )
            .where(self._within(publication.account_id), *self._standing())
            .group_by(publication.token_id)
            .subquery("standing")
        )
        tokens_of = (
            sa.select(token.account_id, sa.func.count().label("number"))
            .where(self._within(token.account_id))
            .group_by(token.account_id)
            .subquery("tokens_of")
        )
        gone = store.write_offs.c
        counter = token.highest_counter
        has_run = token.run_start < token.run_end
        plain = sa.and_(
            counter.between(0, MAX_COUNTER),
            sa.or_(~has_run, token.run_end == counter),
            sa.or_(
                standing.c.low.is_(None),
                sa.and_(
                    standing.c.last <= counter,
                    standing.c.reach <= MAX_COUNTER,
                    standing.c.low >= sa.case((has_run, token.run_start), else_=counter),
                ),
            ),
            ~sa.exists().where(gone.token_id == token.id, self._within(gone.account_id)),
            token.per_tap_cap_minor.between(0, MAX_U32),
            token.assurance.between(0, 0xFF),
            token.last_sequence < MAX_U32,
            token.instalment_class == 0,
            token.record_instalment_class == 0,
            _held.c.limit_minor < _MAX_MINOR,
            _held.c.owable_minor.between(-_MAX_MINOR, _MAX_MINOR),
        )
        reach = sa.case((standing.c.reach > counter, standing.c.reach), else_=counter)
        chosen = [
            token.id,
            token.account_id,
            token.token_key,
            token.status,
            token.assurance,
            token.last_sequence,
            token.record_version,
            token.record_sequence,
            token.record_ceiling,
            token.record_per_tap_cap_minor,
            token.record_status,
            token.record_assurance,
            counter.label("highest"),
            reach.label("reach"),
            plain.label("plain"),
            sa.and_(tokens_of.c.number == 1, ~_held.c.pending).label("alone"),
            self._cap_minor().label("cap_minor"),
            _held.c.owable_minor,
            _held.c.limit_minor,
        ]
        query = sa.select(*chosen).select_from(store.tokens).where(self._within(token.account_id))
        query = query.join(_held, _held.c.account_id == token.account_id)
        query = query.join(tokens_of, tokens_of.c.account_id == token.account_id)
        query = query.outerjoin(standing, standing.c.token_id == token.id)
        if self._policy.use is not None:
            spent = habits.spent_query(
                self._within(store.transfers.c.account_id), self._policy.use, self._now_unix_s
            ).subquery("spent")
            return query.outerjoin(spent, spent.c.token_id == token.id).add_columns(
                *(sa.func.coalesce(spent.c[name], 0).label(name) for name in _SPENT)
            )
        return query.add_columns(*(sa.literal(0, BigInteger).label(name) for name in _SPENT))

    def _cap_minor(self) -> _Number:
        """`AllowancePolicy.per_tap_cap_minor`"""
        token = store.tokens.c
        caps = [
            (token.assurance == assurance, self._least(token.per_tap_cap_minor, form.per_tap_cap_minor))
            for assurance, form in self._policy.allowance.forms.items()
            if form.per_tap_cap_minor is not None
        ]
        return sa.case(*caps, else_=token.per_tap_cap_minor) if caps else token.per_tap_cap_minor

    def _ahead_by_share(self, line: sa.Subquery) -> _Number:
        """`shares_minor` for one token."""
        allowance = self._policy.allowance
        owable_minor = self._most(line.c.owable_minor, 0)
        forms = [
            (line.c.assurance == assurance, form.share_percent) for assurance, form in allowance.forms.items()
        ]
        usual = FormPolicy().share_percent
        percent = sa.case(*forms, else_=usual) if forms else sa.literal(usual, BigInteger)
        pot_minor = owable_minor * self._policy.token_share_percent // 100
        most_minor = owable_minor * percent // 100
        wanted_minor = self._most(self._least(pot_minor, most_minor), allowance.least_minor)
        return self._least(wanted_minor, owable_minor)

    def _ahead_by_use(self, line: sa.Subquery) -> _Number:
        """`allowances` for one token, its part by snapshot: the same steps in the same order, since every
        one of them rounds."""
        policy = self._policy.use or UsePolicy()
        window_days = policy.window_s / _DAY_S
        spent, cut_off, largest = (sa.cast(line.c[name], Double) for name in ("spent", "cut_off", "largest"))
        owable = sa.cast(line.c.owable_minor, Double)
        returns = line.c.assurance.in_([PHONE, SOFTWARE_PHONE])
        first = sa.cast(line.c.limit_minor * policy.first_percent, Double) / _double(100)
        at_least = self._most(
            cut_off, sa.cast(line.c.spent * policy.cut_off_percent, Double) / _double(100), Double
        )
        a_day = at_least / _double(window_days)

        def most_of(days: _Number, per_day: float, taps: float) -> _Number:
            return self._most(days * _double(per_day), largest * _double(taps), Double)

        bulk = sa.case(
            (line.c.spent == 0, first), else_=most_of(a_day, policy.snapshot_days, policy.snapshot_taps)
        )
        note = sa.case(
            (line.c.spent == 0, first),
            (
                returns,
                most_of(spent / _double(window_days), policy.returning_days, policy.returning_taps),
            ),
            else_=most_of(a_day, policy.note_days, policy.note_taps),
        )
        wanted = self._most(note, bulk, Double)
        rest = (owable - wanted) * _double(policy.rest_percent) / _double(100)
        shared = sa.case((wanted > owable, wanted * owable / wanted), else_=wanted + rest)
        percents = policy.assurance_percent
        forms = [(line.c.assurance == assurance, percent) for assurance, percent in enumerate(percents)]
        assured_minor = line.c.owable_minor * sa.case(*forms, else_=percents[-1]) // 100
        ahead_minor = self._least(self._whole(bulk), self._least(self._whole(shared), assured_minor))
        return sa.case((line.c.owable_minor <= 0, 0), else_=ahead_minor)

    def _ceiling(self, line: sa.Subquery) -> _Number:
        """`allowance` or `ceiling_for`, where U is (highest, reach]."""
        claimed_minor = line.c.reach - line.c.highest
        free_minor = line.c.owable_minor - claimed_minor
        if self._policy.use is None:
            free_minor = self._least(free_minor, line.c.ahead_minor - claimed_minor)
        highest_possible = self._least(line.c.reach + self._most(free_minor, 0), MAX_COUNTER)
        return self._least(highest_possible, line.c.highest + line.c.ahead_minor)

    def _digest(self, sequence: _Number) -> _Number:
        """`LimitRecord.digest`"""
        token = _decided.c
        status = sa.case(
            *((token.status == each.value, int(each.on_record)) for each in TokenStatus), else_=0
        )
        if not self._postgresql:
            return sa.func.limit_digest(
                token.token_key,
                token.ceiling,
                token.per_tap_cap_minor,
                sequence,
                status,
                token.assurance,
                type_=LargeBinary,
            )
        whole = sa.func.sha256(
            sa.literal(DIGEST_DOMAIN + self._terms.nonce, LargeBinary)
            .concat(token.token_key)
            .concat(sa.func.int8send(token.ceiling, type_=LargeBinary))
            .concat(_four_bytes(token.per_tap_cap_minor))
            .concat(_four_bytes(sequence))
            .concat(_four_bytes(sa.cast(status, BigInteger) * (1 << 24) + token.assurance * (1 << 16)))
        )
        return sa.func.substr(whole, 1, DIGEST_BYTES, type_=LargeBinary)

    def _teach_digest(self) -> None:
        nonce, statuses = self._terms.nonce, {int(each.on_record): each.on_record for each in TokenStatus}

        def digest(key: bytes, ceiling: int, cap: int, sequence: int, status: int, assurance: int) -> bytes:
            return LimitRecord(key, ceiling, cap, sequence, statuses[status], assurance).digest(nonce)

        driver: Any = self._connection.connection.driver_connection
        driver.create_function("limit_digest", 6, digest, deterministic=True)

    def _analyze(self, table: sa.Table) -> None:
        if self._postgresql:
            keys = ", ".join(name for name in ("account_id", "token_id") if name in table.c)
            self._connection.exec_driver_sql(f"ANALYZE {table.name} ({keys})")

    def _whole(self, value: _Number) -> _Number:
        """Without its fraction, as int() does."""
        return sa.cast(sa.func.trunc(value) if self._postgresql else value, BigInteger)

    def _least(self, left: Any, right: Any, type_: Any = BigInteger) -> _Number:
        smaller = sa.func.least if self._postgresql else sa.func.min
        return smaller(left, right, type_=type_)

    def _most(self, left: Any, right: Any, type_: Any = BigInteger) -> _Number:
        greater = sa.func.greatest if self._postgresql else sa.func.max
        return greater(left, right, type_=type_)


def _double(value: float) -> _Number:
    return sa.literal(float(value), Double)


def _four_bytes(value: _Number) -> _Number:
    return sa.func.substr(sa.func.int8send(value), 5, 4, type_=LargeBinary)
