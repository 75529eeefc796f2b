"""A delta: what changed since a base, cumulative, in the same format with `base_version` in its header."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pos_gateway.errors import InvalidInput
from pos_gateway.limits.record import LimitRecord, Status


def changed_records(base: Iterable[LimitRecord], current: Iterable[LimitRecord]) -> Iterator[LimitRecord]:
    """The records of `current` that are new since `base` or differ from it; both sorted by token key.

    A token that vanished comes with ceiling 0 and status CLOSED, since a delta can say no other way that
    a record of the base counts no longer. A merge keeps it so: an issuer who drops tokens from whole
    snapshots keeps them there, closed, until no base that he still supports lists them.

    Raises:
        InvalidInput: records not sorted by token key.
    """
    missing = _ordered(base)
    old = next(missing, None)
    for record in _ordered(current):
        while old is not None and old.token_key < record.token_key:
            yield from _closed(old)
            old = next(missing, None)
        if old is not None and old.token_key == record.token_key:
            if old != record:
                yield record
            old = next(missing, None)
        else:
            yield record
    while old is not None:
        yield from _closed(old)
        old = next(missing, None)


def _closed(old: LimitRecord) -> Iterator[LimitRecord]:
    closed = old._replace(ceiling=0, status=Status.CLOSED)
    if closed != old:
        yield closed


def _ordered(records: Iterable[LimitRecord]) -> Iterator[LimitRecord]:
    last = b""
    for record in records:
        if record.token_key <= last:
            raise InvalidInput(
                "records are not sorted by token key", where=f"token key {record.token_key.hex()}"
            )
        last = record.token_key
        yield record
