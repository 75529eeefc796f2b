"""Pruning forgets bytes, never money: the journal adds up to the same before, in between and after."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pos_gateway.errors import AuthenticationFailed
from pos_gateway.gateway.journal import Draft, Journal, JournalReader
from pos_gateway.gateway.retention import keep_s
from pos_gateway.records import Kind, uuid7
from tests.gateway.journalling import KEY, NOW_UNIX_MS, acknowledgement, new_id, open_journal, sale

TOKEN = bytes.fromhex("ab" * 16)
LONG_AFTER = NOW_UNIX_MS + 10_000_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite3"


def facts_of(journal: Journal, sales: int) -> tuple[object, ...]:
    """All that counts about a journal: what it adds up to, and every claim, one by one."""
    view = journal.view
    claims = [journal.overlapping(TOKEN, 1930 * n, 1930 * (n + 1)) for n in range(sales)]
    queue = [record.id for record in journal.queue(1000)]
    return view.exposure, view.refused, view.snapshot_version, view.epoch, view.again, claims, queue


def prune(journal: Journal, older_than_unix_ms: int = LONG_AFTER) -> int:
    checkpoint = journal.prune(older_than_unix_ms, LONG_AFTER)
    while journal.prune_some():
        pass
    return checkpoint.sequence


def test_old_acknowledged_records_go_and_everything_still_adds_up(path: Path) -> None:
    with open_journal(path) as journal:
        journal.append_all([sale(n) for n in range(300)])
        journal.append_all([acknowledgement(n) for n in range(300)])
        journal.append_all([sale(300), sale(301)])
        before = facts_of(journal, 302)
        assert prune(journal) == 600
        assert facts_of(journal, 302) == before
        assert [record.sequence for record in journal.records()] == [601, 602, 603]
        assert journal.verify() == 3
        assert journal.was_pruned(new_id(7))
        assert not journal.was_pruned(new_id(301))
        latest = journal.latest_at_unix_ms
    with JournalReader.open(path) as reader:
        checkpoint = reader.verified(KEY.public_key()).checkpoint
        assert (checkpoint.sequence, checkpoint.kept, checkpoint.claims) == (600, (), 300)
        assert checkpoint.counts == {"authorization": 300, "acknowledgement": 300}
        assert checkpoint.totals == {"": {"authorization": 300 * 1930}}
        assert reader.backup(path.with_name("backup"), KEY.public_key()) == 3
    for place in (path, path.with_name("backup")):
        with open_journal(place) as journal:
            assert facts_of(journal, 302) == before
            assert journal.latest_at_unix_ms == latest
            assert journal.append_all([acknowledgement(300)])[0].sequence == 604


def test_what_waits_or_is_young_or_acknowledged_lately_stays(path: Path) -> None:
    with open_journal(path) as journal:
        journal.append_all([sale(0), sale(1), sale(2)])
        journal.append_all([acknowledgement(0), acknowledgement(2)])
        assert journal.prune(LONG_AFTER, LONG_AFTER).sequence == 1  # sale 1 waits
        journal.append_all([acknowledgement(1)])
        assert journal.prune(NOW_UNIX_MS, LONG_AFTER).sequence == 1  # nothing is that old
        # Its acknowledgement is younger than that: it may have to be presented again.
        assert journal.prune(NOW_UNIX_MS + 500_001, LONG_AFTER).sequence == 1
        assert journal.prune(LONG_AFTER, LONG_AFTER).sequence == 5  # the first checkpoint is young


def test_a_refused_record_stays_until_it_is_settled(path: Path) -> None:
    with open_journal(path) as journal:
        journal.append_all([sale(n) for n in range(50)])
        journal.append_all([acknowledgement(n, "late" if n == 20 else "posted") for n in range(50)])
        journal.append_all([sale(50)])
        before = facts_of(journal, 51)
        assert prune(journal) == 100
        assert facts_of(journal, 51) == before
        assert [record.kind for record in journal.about(new_id(20))] == [
            Kind.AUTHORIZATION,
            Kind.ACKNOWLEDGEMENT,
        ]
        assert journal.verify() == 4
    with open_journal(path) as journal:
        assert facts_of(journal, 51) == before
        facts = {**acknowledgement(20).facts, "at_unix_ms": NOW_UNIX_MS + 900_000}
        journal.append_all([Draft(Kind.ACKNOWLEDGEMENT, new_id(900_000), facts), acknowledgement(50)])
        assert journal.view.refused == ()
        assert prune(journal, LONG_AFTER + 1) == 103
        assert journal.about(new_id(20)) == []
        assert journal.verify() <= 2
        assert len(journal.overlapping(TOKEN, 0, 51 * 1930)) == 51
    with open_journal(path) as journal:
        assert journal.view.refused == ()


@pytest.mark.parametrize("steps", range(5))
def test_stopped_between_any_two_steps_it_opens_to_the_same(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "journal.sqlite3"
    with open_journal(path) as journal:
        journal.append_all([sale(n) for n in range(150)])
        journal.append_all([acknowledgement(n, "late" if n % 60 == 30 else "posted") for n in range(150)])
        journal.append_all([sale(150)])
        before = facts_of(journal, 151)
        journal.prune(LONG_AFTER, LONG_AFTER)
        for _ in range(steps):
            journal.prune_some()
        journal.verify()
    with open_journal(path) as journal:
        assert facts_of(journal, 151) == before
        journal.verify()
        while journal.prune_some():
            journal.verify()
        assert facts_of(journal, 151) == before
        assert len(journal.records()) == 6  # two refused with their answers, what waits, the checkpoint


_OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["sale", "posted", "late", "unknown", "prune", "step", "reopen", "epoch"]),
        st.integers(0, 12),
    ),
    max_size=40,
)


@given(_OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_a_journal_that_is_pruned_and_one_that_is_not_are_never_told_apart(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("twins")
    pruned, whole = open_journal(folder / "pruned"), open_journal(folder / "whole")
    seen: set[int] = set()
    try:
        for place, (word, number) in enumerate(operations):
            at = NOW_UNIX_MS + 1000 * place
            draft: Draft | None = None
            if word == "sale" and number not in seen:
                seen.add(number)
                draft = sale(number, at_unix_ms=at)
            elif word in ("posted", "late", "unknown") and number in seen:
                facts = {**acknowledgement(number, word).facts, "at_unix_ms": at}
                draft = Draft(Kind.ACKNOWLEDGEMENT, uuid7(at, random.Random(place).randbytes(10)), facts)
            elif word == "epoch":
                facts = {
                    "epoch": f"e{number}",
                    "next_sequence": number + 1,
                    "until_sequence": pruned.last_sequence,
                    "at_unix_ms": at,
                }
                # Told in the same sequences in both: the checkpoints of one are not in the other.
                if whole.last_sequence == pruned.last_sequence:
                    draft = Draft(Kind.EPOCH, uuid7(at, random.Random(place).randbytes(10)), facts)
            elif word == "prune":
                pruned.prune(at - 1000 * number, at)
            elif word == "step":
                pruned.prune_some()
            elif word == "reopen":
                pruned.close()
                pruned = open_journal(folder / "pruned")
            if draft is not None:
                for journal in (pruned, whole):
                    journal.append_all([draft])
            assert facts_of(pruned, 13) == facts_of(whole, 13)
        pruned.verify()
    finally:
        pruned.close()
        whole.close()
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("statement", "step"),
    [
        ("DELETE FROM journal WHERE seq = 21", "journal sequence"),
        ("DELETE FROM journal WHERE seq = 101", "journal sequence"),
        ("UPDATE journal SET body = replace(body, '\"claims\":50', '\"claims\":49') "
         "WHERE kind = 'checkpoint'", "record hash"),
        ("DELETE FROM claimed WHERE seq = 7", "journal checkpoint"),
        ("UPDATE claimed SET counter_after = counter_after + 1 WHERE seq = 7", "journal checkpoint"),
    ],
)  # fmt: skip
def test_verify_sees_what_was_changed_under_a_checkpoint(path: Path, statement: str, step: str) -> None:
    with open_journal(path) as journal:
        journal.append_all([sale(n) for n in range(50)])
        journal.append_all([acknowledgement(n, "late" if n == 20 else "posted") for n in range(50)])
        journal.append_all([sale(50)])
        prune(journal)
        journal.append_all([sale(51)])
    connection = sqlite3.connect(path)
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        connection.execute(f"DROP TRIGGER {name}")
    connection.execute(statement)
    connection.commit()
    connection.close()
    with JournalReader.open(path) as reader, pytest.raises(AuthenticationFailed) as caught:
        reader.verify(KEY.public_key())
    assert caught.value.step == step


def test_only_what_a_checkpoint_covers_can_be_deleted(path: Path) -> None:
    with open_journal(path) as journal:
        journal.append_all([sale(0), sale(1)])
        journal.append_all([acknowledgement(0)])
        journal.prune(LONG_AFTER, LONG_AFTER)
    connection = sqlite3.connect(path)
    for statement in ("DELETE FROM journal WHERE seq = 2", "UPDATE claimed SET seq = 5"):
        if "claimed" in statement:
            connection.execute("INSERT INTO claimed VALUES (1, x'00', x'00', 0, 1)")
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    connection.execute("DELETE FROM journal WHERE seq = 1")
    connection.close()


def test_records_are_kept_beyond_the_issuers_deadline_whatever_the_shop_wishes() -> None:
    day = 86_400
    cases: list[tuple[tuple[int, int | None], Any]] = [
        ((1, 14 * day), 21 * day),
        ((180, 14 * day), 180 * day),
        ((180, None), None),
    ]
    for (keep_days, deadline_s), wanted in cases:
        assert keep_s(keep_days, deadline_s) == wanted
