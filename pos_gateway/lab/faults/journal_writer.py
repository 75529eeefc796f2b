"""`python -m pos_gateway.lab.faults.journal_writer FOLDER COMMITS`: a gateway's journal in a scripted run.

Single commits, groups, reopenings, acknowledgements and pruning. Before each commit its ids go into the
file `told` as `try`, after it the outcome: `yes` (durable, we say), `no` (certainly not there), `unknown`.
A recording of the folder's calls thus holds also what had been promised when.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.errors import OutcomeUnknown, PosGatewayError, Unavailable
from pos_gateway.gateway.journal import Draft, Journal
from pos_gateway.records import MAX_PROOF_BYTES, Kind, uuid7

GATEWAY_ID: Final = "gateway-of-the-lab"
KEY: Final = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
"""Of no secret: it signs a journal that is thrown away."""
JOURNAL: Final = "journal.sqlite3"
TOLD: Final = "told"
AMOUNT_MINOR: Final = 7
_AT_UNIX_MS: Final = 1_764_000_000_000
_GROUP: Final = 40
_GROUP_EVERY: Final = 25
_REOPEN_EVERY: Final = 60
_PRUNE_EVERY: Final = 14
_PRUNED_LATER_MS: Final = 1_000_000


def open_journal(folder: Path) -> Journal:
    return Journal.open(folder / JOURNAL, gateway_key=KEY, gateway_id=GATEWAY_ID)


def draft(number: int) -> Draft:
    """Payment `number`, with as large a proof as there can be."""
    chance = random.Random(number)
    record_id = uuid7(_AT_UNIX_MS + number, chance.randbytes(10))
    facts = {
        "sale_id": str(record_id),
        "amount_minor": AMOUNT_MINOR,
        "at_unix_ms": _AT_UNIX_MS + number,
        "token_key": f"{number % 7:032x}",
        "token_last4": "0000",
        "counter_before": number * AMOUNT_MINOR,
        "counter_after": (number + 1) * AMOUNT_MINOR,
    }
    return Draft(
        Kind.AUTHORIZATION, record_id, facts, chance.randbytes(chance.choice((900, MAX_PROOF_BYTES)))
    )


def run(folder: Path, commits: int) -> None:
    told = os.open(folder / TOLD, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        _write(folder, commits, told)
    finally:
        os.close(told)


def _write(folder: Path, commits: int, told: int) -> None:
    journal: Journal | None = None
    number = acknowledged = 0
    for turn in range(1, commits + 1):
        drafts = [draft(number + place) for place in range(_GROUP if turn % _GROUP_EVERY == 0 else 1)]
        number += len(drafts)
        _tell(told, "try", drafts)
        try:
            journal = journal or open_journal(folder)
            journal.append_all(drafts)
        except Unavailable:
            _tell(told, "no", drafts)
        except OutcomeUnknown:
            _tell(told, "unknown", drafts)
        else:
            _tell(told, "yes", drafts)
        if turn % _PRUNE_EVERY == 0 and journal is not None:
            with contextlib.suppress(Unavailable, OutcomeUnknown):
                _prune(journal, acknowledged, number)
                acknowledged = number
        if turn % _REOPEN_EVERY == 0 and journal is not None:
            journal.close()
            journal = None
    if journal is not None:
        journal.close()


def _prune(journal: Journal, first: int, last: int) -> None:
    """Acknowledge payments, but for one among them that is refused; prune, and stop half-way."""
    journal.append_all([_acknowledgement(number) for number in range(first, last)])
    later_unix_ms = _AT_UNIX_MS + _PRUNED_LATER_MS
    journal.prune(later_unix_ms, later_unix_ms)
    journal.prune_some()


def _acknowledgement(number: int) -> Draft:
    at_unix_ms = _AT_UNIX_MS + _PRUNED_LATER_MS // 2 + number
    facts = {
        "about": str(draft(number).id),
        "verdict": "late" if number % 10 == 3 else "posted",
        "reason": "",
        "at_unix_ms": at_unix_ms,
    }
    return Draft(Kind.ACKNOWLEDGEMENT, uuid7(at_unix_ms, random.Random(-number).randbytes(10)), facts)


def _tell(told: int, outcome: str, drafts: Sequence[Draft]) -> None:
    os.write(told, "".join(f"{outcome} {draft.id}\n" for draft in drafts).encode())


def read_told(text: bytes) -> dict[UUID, str]:
    """The last word on each id."""
    last: dict[UUID, str] = {}
    for line in text.decode().splitlines():
        outcome, record_id = line.split()
        last[UUID(record_id)] = outcome
    return last


def what_is_wrong(folder: Path, told: dict[UUID, str]) -> tuple[int, list[str]]:
    """Open what is found with the real code. Returns how many promised records are lost, and what else is
    not as it was told."""
    try:
        with open_journal(folder) as journal:
            journal.verify()
            found = set()
            after = 0
            while page := journal.records(after):
                after = page[-1].sequence
                found |= {record.id for record in page if record.kind is Kind.AUTHORIZATION}
            found |= {record_id for record_id in told if journal.was_pruned(record_id)}
    except PosGatewayError as error:
        return sum(outcome == "yes" for outcome in told.values()), [f"the journal does not open: {error}"]
    lost = sum(outcome == "yes" and record_id not in found for record_id, outcome in told.items())
    denied = sum(told.get(record_id) == "no" for record_id in found)
    wrong = [f"{denied} records are there that were denied"] if denied else []
    if strangers := found - told.keys():
        wrong.append(f"{len(strangers)} records are there that nobody made")
    return lost, wrong


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
