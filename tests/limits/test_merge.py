"""Base and delta merged: exactly the issuer's whole snapshot, or nothing."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pos_gateway.errors import AuthenticationFailed, InvalidSnapshot
from pos_gateway.limits.merge import Merge
from pos_gateway.limits.record import LimitRecord
from pos_gateway.limits.snapshot import Snapshot
from pos_gateway.snapshot_file import SnapshotFile
from tests.limits.making import KEYS, TERMS, built, opened, signing_key, some_records
from tests.limits.merging import MERGED, UNFINISHED, merge
from tests.limits.test_layers import DELTA, REFUSALS, WHOLE, populations

ROOT = Path(__file__).parent.parent.parent


def head_of(data: bytes) -> bytes:
    return opened(data).head


def merged(base: bytes, delta: bytes, head: bytes) -> bytes:
    file = io.BytesIO()
    Merge(opened(base), opened(delta), head, KEYS, 2, file).run()
    return file.getvalue()


def changed(limits: list[LimitRecord]) -> list[LimitRecord]:
    return [record._replace(ceiling=record.ceiling // 2, sequence=7) for record in limits]


@settings(max_examples=150, deadline=None)
@given(base=populations, changes=populations, bits=st.tuples(*[st.none() | st.integers(0, 5)] * 3))
def test_a_merge_is_byte_for_byte_what_the_issuer_published(
    base: dict[bytes, LimitRecord],
    changes: dict[bytes, LimitRecord],
    bits: tuple[int | None, int | None, int | None],
) -> None:
    whole = built((base | changes).values(), terms=WHOLE, bucket_bits=bits[0])
    below = built(base.values(), bucket_bits=bits[1])
    over = built(changes.values(), terms=DELTA, bucket_bits=bits[2])
    assert merged(below, over, head_of(whole)) == whole


def test_a_merge_may_need_more_buckets() -> None:
    limits = some_records(250)
    whole, base = built(limits, terms=WHOLE), built(limits[:90])
    assert opened(whole).header.bucket_bits > opened(base).header.bucket_bits
    assert merged(base, built(limits[90:], terms=DELTA), head_of(whole)) == whole


def test_progress_is_told() -> None:
    limits = some_records(2000)
    base, over = built(limits, bucket_bits=7), built(changed(limits[:20]), terms=DELTA)
    whole = built(changed(limits[:20]) + limits[20:], terms=WHOLE, bucket_bits=7)
    file, told = io.BytesIO(), list[tuple[int, int]]()
    running = Merge(opened(base), opened(over), head_of(whole), KEYS, 2, file)
    assert running.progress == (0, 2000)
    header = running.run(lambda done, of: told.append((done, of)))
    assert told == sorted(told)
    assert len(told) > 4
    assert running.progress == (2000, 2000)
    assert running.step()
    assert opened(file.getvalue()).header == header


FOREIGN: dict[str, dict[str, Any]] = {
    "version": {"version": 9},
    "nonce": {"nonce": bytes(16)},
    "base_version": {"base_version": 7},
    "valid_until_unix_s": {"valid_until_unix_s": TERMS.valid_until_unix_s + 1},
    "issuer": {"issuer": "Another Bank"},
    "revoked_certificates": {"revoked_certificates": ()},
}


@pytest.mark.parametrize("field", FOREIGN)
def test_another_publication_s_head_is_refused(field: str) -> None:
    limits = some_records(20)
    whole = built(limits, terms=replace(WHOLE, **FOREIGN[field]))
    with pytest.raises(InvalidSnapshot, match=field):
        merged(built(limits[:10]), built(limits[10:], terms=DELTA), head_of(whole))


def test_a_head_of_other_records_is_refused_at_the_end() -> None:
    limits = some_records(20)
    base, over = built(limits[:10]), built(limits[10:], terms=DELTA)
    for others in (limits[:19], limits[:19] + some_records(1, seed=5), [*limits, *some_records(1, seed=5)]):
        file = io.BytesIO()
        running = Merge(opened(base), opened(over), head_of(built(others, terms=WHOLE)), KEYS, 2, file)
        with pytest.raises(AuthenticationFailed, match="snapshot root"):
            running.run()
        with pytest.raises(InvalidSnapshot, match="not a limit snapshot"):
            opened(file.getvalue())


def test_a_head_signed_by_strangers_is_refused() -> None:
    limits = some_records(20)
    strangers = {"limits-a": signing_key("one"), "limits-b": signing_key("two")}
    whole = built(limits, terms=WHOLE, signers=strangers)
    head = whole[: len(head_of(built(limits, terms=WHOLE)))]
    with pytest.raises(AuthenticationFailed, match="snapshot signature"):
        merged(built(limits[:10]), built(limits[10:], terms=DELTA), head)


def test_a_delta_over_another_base_is_refused() -> None:
    limits = some_records(20)
    whole = head_of(built(limits, terms=WHOLE))
    over = built(limits[10:], terms=replace(DELTA, base_version=6))
    with pytest.raises(InvalidSnapshot, match="base_version"):
        merged(built(limits[:10]), over, whole)


def test_a_head_cut_short_or_made_longer() -> None:
    limits = some_records(4)
    base, over, head = built(limits[:2]), built(limits[2:], terms=DELTA), head_of(built(limits, terms=WHOLE))
    for length in range(len(head)):
        with pytest.raises(InvalidSnapshot):
            merged(base, over, head[:length])
    with pytest.raises(InvalidSnapshot, match="1 bytes too many"):
        merged(base, over, head + b"\0")


@pytest.mark.parametrize("seed", [20_261_124])
def test_every_byte_of_what_a_merge_is_made_of_changed(seed: int) -> None:
    random, limits = Random(seed), some_records(20)
    files = {
        "base": built(limits[:16], bucket_bits=1),
        "delta": built(changed(limits[:4]) + limits[16:], terms=DELTA, bucket_bits=0),
    }
    whole = built(changed(limits[:4]) + limits[4:], terms=WHOLE, bucket_bits=1)
    files["head"] = head_of(whole)
    assert merged(**files) == whole
    for name, data in files.items():
        for at in range(len(data)):
            spoilt = data[:at] + bytes([data[at] ^ random.randrange(1, 256)]) + data[at + 1 :]
            with pytest.raises(REFUSALS):
                merged(**{**files, name: spoilt})


def test_stopped_after_any_write_it_leaves_nothing_that_opens() -> None:
    """Each state of the file between two writes, and each torn state of the last one."""
    limits = some_records(60)
    base, over = built(limits, bucket_bits=3), built(changed(limits[:9]), terms=DELTA)
    whole = built(changed(limits[:9]) + limits[9:], terms=WHOLE, bucket_bits=3)
    file = _Recorded()
    Merge(opened(base), opened(over), head_of(whole), KEYS, 2, file).run()
    assert file.states.pop() == whole
    assert len(file.states) >= 2
    for state in file.states:
        with pytest.raises(REFUSALS):
            opened(state)
    almost, head = file.states[-1], head_of(whole)
    # A signature may end in zero bytes: then the file is whole before its last byte is written.
    for length in range(len(head.rstrip(b"\0"))):
        with pytest.raises(REFUSALS):
            opened(head[:length] + almost[length:])


class _Recorded(io.BytesIO):
    def __init__(self) -> None:
        super().__init__()
        self.states: list[bytes] = []

    def write(self, data: Any) -> int:
        written = super().write(data)
        self.states.append(self.getvalue())
        return written


@pytest.mark.parametrize("seed", [20_261_124])
def test_killed_at_any_moment_a_merge_begins_again(tmp_path: Path, seed: int) -> None:
    random, limits = Random(seed), some_records(6000)
    whole = built(changed(limits[:60]) + limits[60:], terms=WHOLE)
    put(tmp_path, {"base.snapshot": built(limits), "changes.delta": built(changed(limits[:60]), terms=DELTA)})
    put(tmp_path, {"whole.head": head_of(whole)})
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-m", "tests.limits.merging", str(tmp_path), "0.02"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"merging\n"
            try:
                process.wait(timeout=random.random() * 0.08)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        for name in ("base.snapshot", "changes.delta"):
            assert is_valid(tmp_path / name)
        if (tmp_path / MERGED).exists():
            assert (tmp_path / MERGED).read_bytes() == whole
            (tmp_path / MERGED).unlink()
        else:
            assert not is_valid(tmp_path / UNFINISHED) or (tmp_path / UNFINISHED).read_bytes() == whole
    merge(tmp_path)
    assert (tmp_path / MERGED).read_bytes() == whole
    assert not (tmp_path / UNFINISHED).exists()


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def is_valid(path: Path) -> bool:
    try:
        with SnapshotFile(path) as file:
            snapshot = Snapshot.open(file.read_at, file.size, KEYS, 2)
            return count(snapshot.records()) == snapshot.header.count
    except REFUSALS:
        return False


def count(records: Iterable[LimitRecord]) -> int:
    return sum(1 for _ in records)
