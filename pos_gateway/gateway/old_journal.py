"""The journal of a till that is dead: from its disk, or from a backup. Nothing of it is changed.

Every record in it stands by its own signature, so it needs no key: another gateway of the same merchant
presents it, over the line or on a stick, or the issuer takes the file itself.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.carrying import ROOT, TO_LEDGER, SignedBatch, is_gateway_id
from pos_gateway.errors import InvalidMessage, NotFound, Unavailable
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.journal import JournalReader
from pos_gateway.gateway.ledger_client import LedgerClient
from pos_gateway.stick import write_set

_AT_ONCE: Final = 200
_LOG_SUFFIX: Final = "-wal"


@contextmanager
def opened_copy(old: Path) -> Iterator[JournalReader]:
    """Open a journal file, or the one in an old home directory, by a copy: the disk may be write-protected,
    and its newest records may stand in the write-ahead log.

    Raises:
        NotFound: there is no journal.
        Unavailable: it cannot be read.
        InvalidMessage: it names no gateway.
    """
    path = Home(old).journal if old.is_dir() else old
    if not path.is_file():
        raise NotFound(f"there is no journal at {path}", advice="name the old home directory, or a backup")
    with tempfile.TemporaryDirectory(prefix="pos-gateway-journal-") as folder:
        copy = Path(folder) / path.name
        try:
            shutil.copyfile(path, copy)
            log = path.with_name(path.name + _LOG_SUFFIX)
            if log.is_file():
                shutil.copyfile(log, copy.with_name(log.name))
        except OSError as error:
            raise Unavailable(f"{path} cannot be copied: {error.strerror}", advice="check the disk") from None
        with JournalReader.open(copy) as journal:
            if not is_gateway_id(journal.gateway_id):
                raise InvalidMessage("it names no gateway", where=str(path))
            yield journal


async def adopt(
    journal: JournalReader, client: LedgerClient, gateway_id: str, key: Ed25519PrivateKey
) -> Counter[str]:
    """Present a dead till's queue over this gateway's line; returns how often the ledger said what. Doing
    it again is harmless.

    Raises:
        AuthenticationFailed: another merchant's till, or this one is not let in.
        LedgerUnreachable: what was taken so far stays so; go on later.
    """
    counts: Counter[str] = Counter()
    for records in journal.open_records(_AT_ONCE):
        answers = await client.adopt(gateway_id, journal.gateway_id, records, key)
        counts.update(answer.verdict.value for answer in answers)
    return counts


def export_adopted(journal: JournalReader, gateway_id: str, key: Ed25519PrivateKey, folder: Path) -> int:
    """Write a dead till's queue onto a stick; returns how many records.

    Raises:
        Unavailable: see `stick.write_set`.
    """
    count = 0

    def contents() -> Iterator[bytes]:
        nonlocal count
        for records in journal.open_records(_AT_ONCE):
            count += len(records)
            yield SignedBatch.make(gateway_id, records, key, dead_id=journal.gateway_id).to_text().encode()

    write_set(folder / ROOT / TO_LEDGER / journal.gateway_id, contents())
    return count
