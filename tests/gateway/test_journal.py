from __future__ import annotations

import base64
import hashlib
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from pos_gateway.authorization.decision import Interval
from pos_gateway.authorization.policy import Exposure
from pos_gateway.errors import (
    AuthenticationFailed,
    Conflict,
    InvalidMessage,
    NotFound,
    OutcomeUnknown,
    Unavailable,
)
from pos_gateway.gateway.journal import Draft, JournalReader
from pos_gateway.gateway.journal_file import JournalFile
from pos_gateway.gateway.journal_view import RunningView
from pos_gateway.records import Kind, Record
from tests.gateway.journalling import KEY, NOW_UNIX_MS, acknowledgement, new_id, open_journal, sale


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite3"


def test_records_are_chained_signed_and_gap_free(path: Path) -> None:
    with open_journal(path) as journal:
        records = [journal.append_all([sale(n)])[0] for n in range(5)]
        assert [record.sequence for record in records] == [1, 2, 3, 4, 5]
        assert journal.records(after=2, limit=2) == records[2:4]
        assert journal.get(new_id(3)) == records[3]
        assert journal.verify() == 5
        with pytest.raises(NotFound):
            journal.get(new_id(99))
    with open_journal(path) as journal:
        assert journal.append_all([sale(5)])[0].previous_hash == records[4].hash


def test_every_commit_is_synced_before_it_returns(path: Path) -> None:
    """What makes SQLite sync at each commit in WAL mode; `NORMAL` would sync at checkpoints only."""
    with open_journal(path) as journal:
        assert journal._file is not None
        connection = journal._file._db.conn
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert path.stat().st_mode & 0o777 == 0o600


def test_same_id_and_content_again_is_the_same_record(path: Path) -> None:
    with open_journal(path) as journal:
        first = journal.append_all([sale(0)])[0]
        assert journal.append_all([sale(0)]) == [first]
        assert journal.append_all([sale(1), sale(0), sale(1)])[1] == first
        assert journal.last_sequence == 2
        assert journal.exposure.count == 2


def test_same_id_with_other_content_is_a_conflict_and_writes_nothing(path: Path) -> None:
    with open_journal(path) as journal:
        journal.append_all([sale(0)])
        with pytest.raises(Conflict):
            journal.append_all([sale(1), sale(0, amount_minor=1)])
        draft = sale(0)
        with pytest.raises(Conflict):
            journal.append(draft.kind, draft.id, draft.facts, b"another proof")
        assert journal.last_sequence == 1
        with pytest.raises(NotFound):
            journal.get(new_id(1))


def test_what_a_kind_cannot_do_without_is_asked_for_by_name(path: Path) -> None:
    with open_journal(path) as journal:
        with pytest.raises(InvalidMessage, match="amount_minor"):
            journal.append(Kind.AUTHORIZATION, new_id(0), {**sale(0).facts, "amount_minor": "19.30"})
        with pytest.raises(InvalidMessage, match="wrong form"):
            journal.append(Kind.ACKNOWLEDGEMENT, new_id(0), {**acknowledgement(0).facts, "verdict": "great"})
        with pytest.raises(InvalidMessage, match="too large"):
            journal.append(Kind.DECLINE, new_id(0), sale(0, sale_id=str(new_id(1)), detail="x" * 9000).facts)
        with pytest.raises(InvalidMessage, match="JSON"):
            journal.append(Kind.AUTHORIZATION, new_id(0), {**sale(0).facts, "rate": float("nan")})
        assert journal.last_sequence == 0


def test_the_view_adds_up_what_is_open_and_forgets_what_is_acknowledged(path: Path) -> None:
    with open_journal(path) as journal:
        assert journal.exposure == Exposure(0, 0, None)
        journal.append_all([sale(n) for n in range(3)])
        assert journal.exposure == Exposure(3, 3 * 1930, NOW_UNIX_MS)
        journal.append_all([acknowledgement(0), acknowledgement(1, "late", "after the deadline")])
        assert journal.exposure == Exposure(1, 1930, NOW_UNIX_MS + 2)
        assert [record.id for record in journal.queue()] == [new_id(2)]
        (refusal,) = journal.view.refused
        assert (refusal.record_id, refusal.reason, refusal.amount_minor) == (
            new_id(1),
            "after the deadline",
            1930,
        )
        token = bytes.fromhex("ab" * 16)
        assert journal.overlapping(token, 1930, 3860) == (Interval(1930, 3860, new_id(1)),)
        assert [i.sale_id for i in journal.overlapping(token, 1929, 3861)] == [
            new_id(0),
            new_id(1),
            new_id(2),
        ]
        assert journal.overlapping(token, 3 * 1930, 9999) == ()
        assert journal.overlapping(bytes(16), 0, 9999) == ()
        assert journal.latest_at_unix_ms == NOW_UNIX_MS + 500_001
        assert [record.kind for record in journal.about(new_id(1))] == [
            Kind.AUTHORIZATION,
            Kind.ACKNOWLEDGEMENT,
        ]
        view = journal.view
    with open_journal(path) as journal:
        assert journal.view == view


_STEPS = st.lists(
    st.tuples(st.sampled_from(["sale", "posted", "duplicate", "invalid", "late"]), st.integers(0, 2)),
    max_size=30,
)


@given(_STEPS)
@settings(max_examples=100, deadline=None)
def test_a_view_is_the_sum_of_its_records(steps: list[tuple[str, int]]) -> None:
    """Against a slow definition: open = sales without any acknowledgement."""
    view, seen, acknowledged, sequence = RunningView(), dict[int, Draft](), dict[int, list[str]](), 0
    for step, number in steps:
        draft = sale(number) if step == "sale" else acknowledgement(number, step)
        if (step == "sale") == (number in seen):
            continue
        sequence += 1
        if step == "sale":
            seen[number] = draft
        else:
            acknowledged.setdefault(number, []).append(step)
        about = draft.about.bytes if draft.about else None
        view.add(sequence, draft.id.bytes, draft.kind, about, draft.facts)
    still_open = [number for number in seen if number not in acknowledged]
    value = view.value()
    assert value.exposure.count == len(still_open)
    assert value.exposure.amount_minor == 1930 * len(still_open)
    assert value.exposure.oldest_at_unix_ms == (NOW_UNIX_MS + still_open[0] if still_open else None)
    # A refusal stands from the first verdict on, until a later verdict pays.
    refused = {
        new_id(number)
        for number, verdicts in acknowledged.items()
        if verdicts[0] in ("invalid", "late") and not {"posted", "duplicate"} & set(verdicts)
    }
    assert {refusal.record_id for refusal in value.refused} == refused


def test_rows_can_neither_be_changed_nor_deleted(path: Path) -> None:
    with open_journal(path) as journal:
        journal.append_all([sale(0)])
    connection = sqlite3.connect(path)
    for statement in (
        "UPDATE journal SET body = '{}'",
        "DELETE FROM journal",
        "UPDATE owner SET gateway_id = 'x'",
        "DELETE FROM owner",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    ("statement", "step"),
    [
        ("UPDATE journal SET body = replace(body, '1930', '1931') WHERE seq = 3", "record hash"),
        ("UPDATE journal SET proof = x'00' WHERE seq = 3", "record hash"),
        ("UPDATE journal SET signature = zeroblob(64) WHERE seq = 3", "record signature"),
        ("UPDATE journal SET previous_hash = zeroblob(32) WHERE seq = 3", "journal chain"),
        ("DELETE FROM journal WHERE seq = 3", "journal sequence"),
        ("UPDATE journal SET kind = 'decline' WHERE seq = 3", "record hash"),
    ],
)
def test_verify_names_the_record_that_was_changed(path: Path, statement: str, step: str) -> None:
    with open_journal(path) as journal:
        journal.append_all([sale(n) for n in range(5)])
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER journal_refuses_update")
    connection.execute("DROP TRIGGER journal_refuses_delete")
    connection.execute(statement)
    connection.commit()
    connection.close()
    with JournalReader.open(path) as reader, pytest.raises(AuthenticationFailed, match="3") as caught:
        reader.verify(KEY.public_key())
    assert caught.value.step == step


def test_opening_refuses_a_gap_and_a_newest_record_that_is_not_ours(path: Path) -> None:
    with open_journal(path) as journal:
        journal.append_all([sale(n) for n in range(5)])
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER journal_refuses_delete")
    connection.execute("DROP TRIGGER journal_refuses_update")
    connection.execute("UPDATE journal SET body = replace(body, '1234', '4321') WHERE seq = 5")
    connection.commit()
    with pytest.raises(AuthenticationFailed, match="record 5 was changed"):
        open_journal(path)
    connection.execute("DELETE FROM journal WHERE seq = 2")
    connection.commit()
    connection.close()
    with pytest.raises(AuthenticationFailed, match="record 2 is missing"):
        open_journal(path)


def test_a_journal_has_one_writer_and_one_owner(path: Path) -> None:
    with open_journal(path), pytest.raises(Unavailable, match="another gateway"):
        open_journal(path)
    with pytest.raises(Conflict):
        open_journal(path, gateway_id="gw-other")
    with pytest.raises(Conflict):
        open_journal(path, key=Ed25519PrivateKey.from_private_bytes(bytes(32)))
    open_journal(path).close()


def test_a_reader_sees_what_is_committed_while_the_gateway_runs_and_after(path: Path) -> None:
    with pytest.raises(NotFound):
        JournalReader.open(path)
    with open_journal(path) as journal:
        journal.append_all([sale(0)])
        with JournalReader.open(path) as reader:
            assert reader.gateway_id == "gw-test"
            assert reader.verify(KEY.public_key()) == 1
            journal.append_all([sale(1)])
            assert [record.sequence for record in reader.records()] == [1, 2]
            assert reader.get(new_id(1)).sequence == 2
    with JournalReader.open(path) as reader:
        assert reader.verify(KEY.public_key()) == 2


def test_something_that_is_no_journal_is_refused(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(Unavailable, match="cannot be read"):
        JournalReader.open(path)
    with pytest.raises(Unavailable, match="cannot be opened"):
        open_journal(path)


def test_many_threads_share_commits_and_each_gets_its_own_record(path: Path) -> None:
    threads_count, each = 16, 20
    results: list[list[Record]] = [[] for _ in range(threads_count)]
    commits = 0
    write = JournalFile.write

    with open_journal(path) as journal:

        def counted(file: JournalFile, *args: object) -> None:
            nonlocal commits
            commits += 1
            time.sleep(0.002)
            write(file, *args)  # type: ignore[arg-type]

        def work(lane: int) -> None:
            for turn in range(each):
                results[lane] += journal.append_all([sale(lane * each + turn)])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JournalFile, "write", counted)
            threads = [threading.Thread(target=work, args=(lane,)) for lane in range(threads_count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=60)
        assert journal.verify() == threads_count * each
        for lane, records in enumerate(results):
            assert [record.id for record in records] == [new_id(lane * each + turn) for turn in range(each)]
        assert commits < threads_count * each / 2


def test_one_conflict_in_a_shared_commit_harms_nobody_else(path: Path) -> None:
    with open_journal(path) as journal:
        journal.append_all([sale(0)])
        gate, outcomes = threading.Event(), dict[int, object]()
        write = JournalFile.write

        def held(file: JournalFile, *args: object) -> None:
            gate.wait(timeout=30)
            write(file, *args)  # type: ignore[arg-type]

        def work(number: int, drafts: list[Draft]) -> None:
            try:
                outcomes[number] = journal.append_all(drafts)
            except Conflict as error:
                outcomes[number] = error

        requests = [
            [sale(1)],
            [sale(2)],
            [sale(4), sale(0, amount_minor=7)],
            [sale(0)],
            [sale(3)],
            [sale(3), sale(4)],
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JournalFile, "write", held)
            threads = []
            for waiting, request in enumerate(requests):
                threads.append(threading.Thread(target=work, args=(waiting, request), daemon=True))
                threads[-1].start()
                # The first leads and is held; the others wait for it, in this order.
                while journal._leading is False or len(journal._waiting) < waiting:
                    time.sleep(0.001)
            gate.set()
            for thread in threads:
                thread.join(timeout=30)
        assert isinstance(outcomes[2], Conflict)
        assert outcomes[3] == [journal.get(new_id(0))]
        assert outcomes[4] == [journal.get(new_id(3))]
        assert outcomes[5] == [journal.get(new_id(3)), journal.get(new_id(4))]
        assert journal.verify() == 5


def test_a_real_write_error_is_a_clear_failure_and_payments_go_on_after_it(path: Path) -> None:
    """The kernel refuses to let files grow: SQLite meets real errors of `pwrite`."""
    with open_journal(path) as journal:
        journal.append_all([sale(0)])
        size = path.with_name(path.name + "-wal").stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises((Unavailable, OutcomeUnknown)):
                journal.append_all([sale(1)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert [record.sequence for record in journal.append_all([sale(2), sale(1)])] == [2, 3]
        assert journal.exposure.count == 3
        assert journal.verify() == 3


class _Break:
    """Breaks the first commit: after it reached the disk, or instead of it."""

    def __init__(self, *, committed: bool) -> None:
        self.committed = committed
        self.write = JournalFile.write
        self.times = 0

    def __call__(self, file: JournalFile, *args: object) -> None:
        self.times += 1
        if self.times > 1 or self.committed:
            self.write(file, *args)  # type: ignore[arg-type]
        if self.times == 1:
            raise sqlite3.OperationalError("disk I/O error")


def test_a_failed_commit_that_is_on_the_disk_after_all_is_told_as_done(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_journal(path) as journal:
        broken = _Break(committed=True)
        monkeypatch.setattr(JournalFile, "write", lambda *args: broken(*args))
        assert journal.append_all([sale(0)])[0].sequence == 1
        assert journal.append_all([sale(1)])[0].sequence == 2
        assert journal.exposure.count == journal.verify() == 2


def test_a_failed_commit_that_is_not_on_the_disk_is_told_as_not_recorded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_journal(path) as journal:
        broken = _Break(committed=False)
        monkeypatch.setattr(JournalFile, "write", lambda *args: broken(*args))
        with pytest.raises(Unavailable, match="nothing was recorded"):
            journal.append_all([sale(0)])
        assert journal.exposure.count == 0
        assert journal.append_all([sale(1)])[0].sequence == 1


def test_a_disk_that_cannot_be_read_again_leaves_the_outcome_unknown_until_it_can(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_journal(path) as journal:
        broken = _Break(committed=True)

        def refuse(*_: object, **__: object) -> JournalFile:
            raise sqlite3.OperationalError("unable to open database file")

        with monkeypatch.context() as patch:
            patch.setattr(JournalFile, "write", lambda *args: broken(*args))
            patch.setattr(JournalFile, "open_for_writing", refuse)
            with pytest.raises(OutcomeUnknown):
                journal.append_all([sale(0)])
            with pytest.raises(Unavailable):
                journal.append_all([sale(1)])
        assert journal.append_all([sale(0)])[0].sequence == 1
        assert journal.verify() == 1


_FILL_A_DISK = """
import sys
from dataclasses import replace
from pathlib import Path
from uuid import UUID
from pos_gateway.errors import Unavailable
from tests.gateway.journalling import open_journal, sale

folder = Path(sys.argv[1])
with open_journal(folder / "journal.sqlite3") as journal:
    (folder / "ballast").write_bytes(bytes(200_000))
    number = 0
    try:
        while number < 10_000:
            journal.append_all([sale(number)])
            number += 1
    except Unavailable as error:
        print("FULL:", error)
    assert journal.verify() == journal.exposure.count == number
    (folder / "ballast").unlink()
    journal.append_all([sale(number)])
    assert journal.verify() == number + 1
with open_journal(folder / "journal.sqlite3") as journal:
    assert journal.verify() == number + 1
"""


def test_a_full_disk_stops_payments_with_a_clear_message_and_room_lets_them_go_on(tmp_path: Path) -> None:
    """On a real, small file system of its own, in namespaces of its own."""
    namespaces = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*namespaces, "true"], check=False).returncode:
        pytest.skip("no mount namespaces here")
    script = f'mount -t tmpfs -o size=1m tmpfs "{tmp_path}" && exec "$@"'
    done = subprocess.run(
        [*namespaces, "sh", "-c", script, "sh", sys.executable, "-c", _FILL_A_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout
    assert "nothing was recorded" in done.stdout


_APPEND_FOR_EVER = """
import sys
from dataclasses import replace
from pathlib import Path
from uuid import UUID
from tests.gateway.journalling import open_journal, sale

journal = open_journal(Path(sys.argv[1]))
number = journal.last_sequence
while True:
    journal.append_all([sale(number)])
    number += 1
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_being_killed(path: Path) -> None:
    acknowledged = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", _APPEND_FOR_EVER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        for _ in range(50):
            acknowledged = int(process.stdout.readline())
        process.kill()
        rest = process.stdout.read().split()
        process.wait()
        acknowledged = int(rest[-1]) if rest else acknowledged
        with open_journal(path) as journal:
            # One more may be durable without having been told.
            assert journal.verify() - acknowledged in (0, 1)
            acknowledged = journal.last_sequence


def test_no_secret_shows_in_a_repr() -> None:
    assert "sealed proof" not in repr(sale(0))


def test_a_closed_journal_is_one_file(path: Path) -> None:
    with open_journal(path) as journal:
        journal.append_all([sale(0)])
        assert journal.records()
    assert {p.name for p in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}


@pytest.mark.parametrize("together", [1, 2, 3, 7, 64])
def test_each_record_of_a_commit_stands_by_itself(path: Path, together: int) -> None:
    with open_journal(path) as journal:
        records = journal.append_all([sale(n) for n in range(together)])
    assert len({record.signature[:64] for record in records}) == 1, "signed once"
    stranger = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()
    for record in records:
        travelled = Record.from_wire(record.to_wire())
        travelled.verify(KEY.public_key())
        with pytest.raises(AuthenticationFailed, match="record signature"):
            travelled.verify(stranger)
        for place in range(len(record.signature)):
            changed = bytearray(record.signature)
            changed[place] ^= 1
            with pytest.raises(AuthenticationFailed, match="record signature"):
                replace(record, signature=bytes(changed)).verify(KEY.public_key(), set())
    if together > 1:
        with pytest.raises(AuthenticationFailed, match="record signature"):
            replace(records[0], signature=records[1].signature).verify(KEY.public_key())


def test_a_remembered_signature_vouches_for_its_own_commit_only(path: Path) -> None:
    with open_journal(path) as journal:
        first = journal.append_all([sale(n) for n in range(4)])
        other = journal.append_all([sale(n) for n in range(4, 8)])
    known: set[bytes] = set()
    for record in first:
        record.verify(KEY.public_key(), known)
    assert len(known) == 1
    with pytest.raises(AuthenticationFailed, match="record signature"):
        replace(other[0], signature=first[0].signature).verify(KEY.public_key(), known)


@pytest.mark.parametrize("length", [0, 63, 65, 96, 98, 64 + 33 * 25])
def test_a_signature_of_another_shape_is_refused(path: Path, length: int) -> None:
    with open_journal(path) as journal:
        record = journal.append_all([sale(0)])[0]
    crooked = replace(record, signature=bytes(length))
    with pytest.raises(AuthenticationFailed, match="record signature"):
        crooked.verify(KEY.public_key())
    with pytest.raises(InvalidMessage, match="signature"):
        Record.from_wire(crooked.to_wire())


def test_a_backup_is_taken_while_the_gateway_runs_and_opens_as_the_journal_did(
    path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "backup.sqlite3"
    with open_journal(path) as journal:
        journal.append_all([sale(n) for n in range(5)])
        with JournalReader.open(path) as reader:
            assert reader.backup(copy, KEY.public_key()) == 5
            with pytest.raises(Conflict):
                reader.backup(copy, KEY.public_key())
        journal.append_all([sale(5)])
        view = journal.view
    assert copy.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("backup")] == [copy.name]
    with open_journal(copy) as restored:
        assert restored.verify() == 5
        # What came after the backup can be put in again: the same records, the same sums.
        restored.append_all([sale(5)])
        assert restored.view == view


def test_a_backup_of_a_changed_journal_is_refused_and_leaves_nothing(path: Path, tmp_path: Path) -> None:
    with open_journal(path) as journal:
        journal.append_all([sale(n) for n in range(3)])
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER journal_refuses_update")
    connection.execute("UPDATE journal SET proof = x'00' WHERE seq = 2")
    connection.commit()
    connection.close()
    with JournalReader.open(path) as reader, pytest.raises(AuthenticationFailed, match="record 2"):
        reader.backup(tmp_path / "backup", KEY.public_key())
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("backup")]
    with JournalReader.open(path) as reader, pytest.raises(Unavailable):
        reader.backup(tmp_path / "no such folder" / "backup", KEY.public_key())


def test_an_export_is_enough_to_check_chain_and_signatures(path: Path) -> None:
    with open_journal(path) as journal:
        journal.append_all([sale(n) for n in range(3)])
        journal.append_all([acknowledgement(0)])
    with JournalReader.open(path) as reader:
        lines = list(reader.export())
        assert [line["sequence"] for line in reader.export(after=2)] == [3, 4]
    previous = bytes(32)
    for line in lines:
        assert "proof" not in line
        digest = hashlib.sha256(b"pos-gateway journal record 1\0" + line["sequence"].to_bytes(8, "big"))
        digest.update(previous + UUID(line["id"]).bytes)
        for part in (line["kind"].encode(), line["body"].encode()):
            digest.update(hashlib.sha256(part).digest())
        digest.update(bytes.fromhex(line["proof_sha256"]))
        previous = digest.digest()
        assert line["hash"] == previous.hex()
        signature = base64.b64decode(line["signature"])
        root = previous
        for at in range(64, len(signature), 33):
            side, neighbour = signature[at], signature[at + 1 : at + 33]
            pair = neighbour + root if side == 0 else root + neighbour
            root = hashlib.sha256(b"pos-gateway commit node 1\0" + pair).digest()
        KEY.public_key().verify(signature[:64], b"pos-gateway record signature 1\0" + root)


def test_no_room_for_what_is_begun_is_told_before_anything_begins(path: Path) -> None:
    with open_journal(path) as journal:
        room = journal.room(headroom_bytes=0)
        assert not room.short
        room.check()
        journal.append_all([sale(n) for n in range(10)])
        assert journal.room(headroom_bytes=0).needed_bytes == 10 * 2048
        short = journal.room(headroom_bytes=1 << 62)
        assert short.short
        with pytest.raises(Unavailable, match="nearly full"):
            short.check()
