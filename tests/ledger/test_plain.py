"""Plain accounts are decided set by set: what that puts on record is what the rules say one by one."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa

from pos_gateway.emv.application import MAX_COUNTER
from pos_gateway.ledger import accounts, ceilings, plain, store
from pos_gateway.ledger.allowance import AllowancePolicy, FormPolicy
from pos_gateway.ledger.books import RECEIVABLE
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.database import database_url
from pos_gateway.ledger.reserve import InvariantBroken
from pos_gateway.ledger.store import Store
from pos_gateway.ledger.use import UsePolicy
from pos_gateway.limits.header import SnapshotTerms

NOW_S = 1_800_000_000
DAY_S = 86_400
ACCOUNTS = 150
VERSION = 9


@pytest.fixture
def books(database: str | None, tmp_path: Path) -> Iterator[Store]:
    url = database_url(database, tmp_path)
    opened = Store.create(url) if database is None else Store.open(url)
    yield opened
    opened.close()


def terms() -> SnapshotTerms:
    return SnapshotTerms(
        issuer="Test",
        currency="CNY",
        version=VERSION,
        nonce=bytes(range(16)),
        valid_from_unix_s=NOW_S,
        refresh_after_unix_s=NOW_S + DAY_S,
        valid_until_unix_s=NOW_S + 7 * DAY_S,
        token_key_epoch=1,
        policy=Policy().risk_policy(),
    )


def random_policy(random: Random, *, by_use: bool) -> Policy:
    percent = [0, 7, 25, 33, 60, 100]
    forms = {
        assurance: FormPolicy(
            share_percent=random.choice(percent),
            weight_percent=random.choice([1, 50, 100, 300]),
            per_tap_cap_minor=random.choice([None, 5_000]),
        )
        for assurance in random.sample(range(4), random.randrange(4))
    }
    use = UsePolicy(
        snapshot_days=random.choice([0.0, 0.7, 3.0]),
        snapshot_taps=random.choice([0.0, 0.5, 1.1]),
        note_days=random.choice([1.0, 6.0]),
        cut_off_percent=random.choice(percent),
        rest_percent=random.choice(percent),
        first_percent=random.choice(percent),
        beside_percent=random.choice(percent),
        assurance_percent=random.choice([(100, 100), (0, 33, 77), (50,)]),
    )
    return Policy(
        token_share_percent=random.choice(percent),
        allowance=AllowancePolicy(
            forms=forms, recent_days=random.choice([0, 30]), least_minor=random.choice([0, 0, 500])
        ),
        use=use if by_use else None,
    )


class Accounts:
    """Accounts as anything may have left them; most of them plain."""

    def __init__(self, random: Random, connection: sa.Connection) -> None:
        self.random = random
        self.rows: dict[sa.Table, list[dict[str, Any]]] = {
            table: []
            for table in (
                store.accounts,
                store.tokens,
                store.publications,
                store.claims,
                store.write_offs,
                store.transfers,
                store.entries,
            )
        }
        for version in (1, VERSION):
            connection.execute(
                store.snapshots.insert().values(
                    version=version,
                    terms="{}",
                    automatic=True,
                    record_count=0,
                    valid_from_unix_s=0,
                    refresh_after_unix_s=0,
                    valid_until_unix_s=0,
                )
            )
        for number in range(ACCOUNTS):
            self.account(f"acc-{random.randrange(1 << 60):x}-{number}")
        for table, rows in self.rows.items():
            connection.execute(table.insert(), rows)

    def account(self, account_id: str) -> None:
        random = self.random
        limit_minor = random.choice([0, 1, 999, 50_000, 50_001, 10**9, 1 << 46])
        vault_minor = random.choice([0, 0, 0, 500]) if limit_minor > 1000 else 0
        self.rows[store.accounts].append(
            {
                "id": account_id,
                "holder": "A",
                "currency": "CNY",
                "limit_minor": limit_minor,
                "target_line_minor": limit_minor - vault_minor - random.choice([0] * 9 + [limit_minor // 3]),
                "vault_minor": vault_minor,
                "vault_leaving_minor": random.choice([0, 0, 0, vault_minor]),
                "outstanding_minor": random.choice(
                    [0, 0, limit_minor // 2, limit_minor, -700, limit_minor + 9]
                ),
                "uncleared_minor": random.choice([0, 0, 0, 300]),
                "opened_unix_ms": 0,
            }
        )
        for place in range(random.choice([0, 1, 1, 1, 1, 1, 1, 2, 2, 3])):
            self.token(account_id, f"{account_id[4:-4]}-{place}-{random.randrange(1 << 30):x}"[:32])

    def token(self, account_id: str, token_id: str) -> None:
        random = self.random
        start = random.choice([0, 1_000, 1 << 40, (1 << 48) - 3_000])
        paid = random.choice([0, 0, 400, 2_500])
        highest = start + paid
        run = (start, highest) if paid else (0, 0)
        odd = random.randrange(12)
        if odd == 0:
            highest += 11  # something was torn
        elif odd == 1 and paid:
            run = (start + paid // 2, highest)
        elif odd == 2 and paid:
            run = (0, 0)
            self.claim(account_id, token_id, start + 10, start + 60)
        elif odd == 3 and paid:
            run = (start, highest - 100)
            self.claim(account_id, token_id, highest - 50, highest)
        elif odd == 4:
            gone = {"counter_before": start + 5, "counter_after": start + 25}
            self.about(store.write_offs, account_id, token_id, gone)
        status = random.choice(["active"] * 6 + ["blocked", "closed"])
        issued = random.randrange(4)
        assurance = random.choice([0, 1, 1, 2, 3])
        cap_minor = random.choice([100, 9_000, (1 << 32) - 1])
        self.rows[store.tokens].append(
            {
                "id": token_id,
                "account_id": account_id,
                "token_key": random.randbytes(16),
                "last4": "1234",
                "psn": 1,
                "expires": date(2036, 1, 31),
                "status": status,
                "per_tap_cap_minor": cap_minor,
                "assurance": assurance,
                "highest_counter": highest,
                "record_version": 1 if issued else 0,
                "record_sequence": issued,
                "record_ceiling": random.choice([0, start, highest + 50_000]),
                "record_per_tap_cap_minor": random.choice([100, cap_minor]),
                "record_status": random.choice([status, "active"]),
                "record_assurance": random.choice([assurance, 1]),
                "last_sequence": issued + random.choice([0, 0, 4]),
                "run_start": run[0],
                "run_end": run[1],
                "issued_unix_ms": 0,
            }
        )
        for _ in range(random.randrange(4)):
            self.publication(account_id, token_id, start, min(start + paid, highest))
        for _ in range(random.randrange(3)):
            self.payment(account_id, token_id)

    def publication(self, account_id: str, token_id: str, start: int, highest: int) -> None:
        random = self.random
        began = random.choice([start, start, highest, start + (highest - start) // 3])
        ceiling = began + random.choice([0, 10, 2_000, 50_000, 49_999])
        self.rows[store.publications].append(
            {
                "account_id": account_id,
                "token_id": token_id,
                "digest": random.randbytes(16),
                "kind": "snapshot",
                "sequence": 1,
                "snapshot_version": 1,
                "issued_unix_s": 0,
                "highest": began,
                "ceiling": ceiling,
                "evidence": random.choice([None, None, None, began, began + 7]),
                "valid_until_unix_s": 0,
                "stands_until_unix_s": NOW_S + random.choice([-1, 0, 1, DAY_S]),
                "lapsed": random.randrange(8) == 0,
            }
        )

    def claim(self, account_id: str, token_id: str, before: int, after: int) -> None:
        self.about(
            store.claims,
            account_id,
            token_id,
            {
                "counter_before": before,
                "counter_after": after,
                "cryptogram": b"cryptogr",
                "atc": 1,
                "posted": True,
            },
        )

    def about(self, table: sa.Table, account_id: str, token_id: str, row: dict[str, Any]) -> None:
        shared = {
            "account_id": account_id,
            "token_id": token_id,
            "gateway_id": "g",
            "record_id": uuid.uuid4(),
        }
        self.rows[table].append(shared | row)

    def payment(self, account_id: str, token_id: str) -> None:
        posted_ms = 1000 * (NOW_S - self.random.choice([DAY_S, 13 * DAY_S, 20 * DAY_S]))
        transfer_id, amount_minor = uuid.uuid4(), self.random.randrange(1, 20_000)
        self.rows[store.transfers].append(
            {
                "account_id": account_id,
                "id": transfer_id,
                "kind": "payment",
                "token_id": token_id,
                "tapped_unix_ms": posted_ms - self.random.choice([0, 700_000]),
                "posted_unix_ms": posted_ms,
            }
        )
        for line, amount in enumerate((amount_minor, -amount_minor)):
            self.rows[store.entries].append(
                {
                    "account_id": account_id,
                    "transfer_id": transfer_id,
                    "line": line,
                    "book": RECEIVABLE if line == 0 else "payable",
                    "owner_id": account_id,
                    "currency": "CNY",
                    "amount_minor": amount,
                }
            )


class _Undone(Exception):
    pass


@contextmanager
def undone(books: Store) -> Iterator[sa.Connection]:
    """A transaction that leaves nothing."""
    try:
        with books.write() as connection:
            yield connection
            raise _Undone
    except _Undone:
        pass


def on_record(connection: sa.Connection) -> dict[str, list[Any]]:
    tables = {store.accounts: "id", store.tokens: "id", store.publications: "digest"}
    return {
        table.name: [tuple(row) for row in connection.execute(sa.select(table).order_by(table.c[key]))]
        for table, key in tables.items()
    }


@pytest.mark.parametrize("by_use", [False, True], ids=["by share", "by use"])
@pytest.mark.parametrize("seed", range(2))
def test_what_is_decided_set_by_set_is_what_the_rules_say(seed: int, by_use: bool, books: Store) -> None:
    random = Random(f"{seed} {by_use}")
    with books.write() as connection:
        Accounts(random, connection)
    for _ in range(3):
        policy = random_policy(random, by_use=by_use)
        with undone(books) as connection:
            ids = connection.scalars(sa.select(store.accounts.c.id)).all()
            accounts.lapse(connection, ids, NOW_S)
            ceilings._decide_accounts(connection, ids, terms(), policy)
            expected = on_record(connection)
        with undone(books) as connection:
            after: str | None = ""
            stretches = 0
            while after is not None:
                after = ceilings.decide_stretch(connection, after, terms(), policy, size=60)
                stretches += 1
            found = on_record(connection)
        assert stretches == 1 + -(-ACCOUNTS // 60)
        for table, rows in expected.items():
            assert found[table] == rows, f"{table} with {policy!r}"
        with undone(books) as connection:
            stretch = plain.Stretch(connection, "", ACCOUNTS, terms(), policy)
            stretch.__enter__()
            stretch.decide()
            decided = connection.scalar(sa.select(sa.func.count()).where(plain._decided.c.decided))
            assert decided is not None
            assert decided > ACCOUNTS // 5, "most were to be plain"
            assert sum(1 for _ in stretch.sharing()) > ACCOUNTS // 25


def test_a_ceiling_too_high_is_caught_before_the_commit(
    books: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with books.write() as connection:
        Accounts(Random(1), connection)
    real = plain.Stretch._ceiling

    def one_too_high(self: plain.Stretch, line: sa.Subquery) -> sa.ColumnElement[int]:
        return self._least(real(self, line) + 1, MAX_COUNTER)

    monkeypatch.setattr(plain.Stretch, "_ceiling", one_too_high)
    with pytest.raises(InvariantBroken), books.write() as connection:
        ceilings.decide_stretch(connection, "", terms(), Policy())
    with books.read() as connection:
        query = sa.select(sa.func.count()).where(store.publications.c.snapshot_version == VERSION)
        assert connection.scalar(query) == 0
