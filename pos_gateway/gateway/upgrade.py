"""From one version of the program to another and back, without a record lost.

`prepare` is run by the new program while none serves: a verified backup first, then the journal takes the new
program's form. `revert` is run by the old one: from the backup in its own form and the records that were
written since, it makes a journal of its own form again. Records are the same in every form: each carries its
hash and signature, and both directions verify the whole chain before anything takes the journal's place.

    HOME/upgrades/NUMBER-VERSION/    journal.sqlite3, and copies of the home's small files

The power may go at any moment: a backup has its name only when it is whole; a form is taken step by step,
each a transaction; a reverted journal takes the place of the other in one rename. A program that finds a
newer form than its own does not touch it, and says so.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pos_gateway
from pos_gateway.errors import Conflict, NotFound, Unavailable
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.identity import load_identity
from pos_gateway.gateway.journal import Journal, JournalReader, lock_journal
from pos_gateway.gateway.journal_file import JournalFile, fsync_file, fsync_folder
from pos_gateway.gateway.journal_view import about

FOLDER: Final = "upgrades"

_KEPT_OF_EACH_FORM: Final = 2
_NAME: Final = re.compile(r"(\d{6})-[0-9A-Za-z.+]+", re.ASCII)
_PAGE_RECORDS: Final = 1000


@dataclass(frozen=True, slots=True)
class Prepared:
    """`backup` is None where there was no journal yet."""

    backup: Path | None
    records: int
    last_sequence: int
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reverted:
    """`brought`: records written since the backup. `backup` is None where nothing was to be done."""

    backup: Path | None
    brought: int
    last_sequence: int


def prepare(home: Home) -> Prepared:
    """Back the journal up, verify the copy, and bring the journal to this program's form. Doing it again is
    harmless.

    Raises:
        Unavailable: a gateway is running, or the disk has no room for the backup; nothing was changed.
        Conflict: the journal is of a newer form than this program's.
        AuthenticationFailed: the journal does not verify; nothing was changed.
    """
    key = load_identity(home.identity_key)
    if not home.journal.exists():
        return Prepared(None, 0, 0, (), ())
    descriptor = lock_journal(home.journal)
    try:
        before = _form(home.journal)
        if not set(before) <= set(JournalFile.known_form()):
            raise Conflict(
                "the journal is of a newer program's form",
                advice="use that program, or `pos-gateway gateway revert` with this one",
            )
        backup = _back_up(home)
    finally:
        os.close(descriptor)
    with JournalReader.open(home.journal) as reader:
        gateway_id = reader.gateway_id
    with Journal.open(home.journal, gateway_key=key, gateway_id=gateway_id) as journal:
        records, last = journal.verify(), journal.last_sequence
    _remove_old(home)
    return Prepared(backup, records, last, before, _form(home.journal))


def revert(home: Home, *, only_if_newer: bool = False) -> Reverted:
    """Bring a journal that a newer program has taken over back to this program's form, with all that was
    written since. The newer one stays in the backup's folder.

    Raises:
        NotFound: no backup of a form that this program knows.
        Unavailable: a gateway is running, or the disk refused; the journal is as it was.
        AuthenticationFailed: a record of a kind that this program does not know, or one that was changed;
            the journal is as it was.
    """
    if not home.journal.exists():
        return Reverted(None, 0, 0)
    descriptor = lock_journal(home.journal)
    try:
        if only_if_newer and set(_form(home.journal)) <= set(JournalFile.known_form()):
            with JournalReader.open(home.journal) as reader:
                return Reverted(None, 0, reader.last_sequence)
        return _revert(home, _newest_known(home))
    finally:
        os.close(descriptor)


def _revert(home: Home, backup: Path) -> Reverted:
    key = load_identity(home.identity_key).public_key()
    fresh = home.journal.with_name(home.journal.name + ".reverting")
    try:
        _fold(home.journal)
        _remove(fresh)
        shutil.copyfile(backup / home.journal.name, fresh)
        fresh.chmod(0o600)
        with JournalReader.open(home.journal) as newer:
            gateway_id, last = newer.gateway_id, newer.last_sequence
            file = JournalFile.open_for_writing(
                fresh, gateway_id=gateway_id, public_key=key.public_bytes_raw()
            )
            try:
                known = file.last()
                first = after = known.sequence if known is not None else 0
                while page := newer.records(after, _PAGE_RECORDS):
                    subjects = [about(record.kind, record.facts()) for record in page]
                    file.write(page, [subject.bytes if subject is not None else None for subject in subjects])
                    after = page[-1].sequence
            finally:
                file.close()
        _fold(fresh)
        with JournalReader.open(fresh) as reader:
            reader.verify(key)
            if reader.last_sequence != last:
                raise Unavailable("the reverted journal is not whole", advice="run it again")
        fsync_file(fresh)
        with contextlib.suppress(FileExistsError):
            os.link(home.journal, backup / f"{home.journal.name}.newer-{last}")
            fsync_folder(backup)
        fresh.rename(home.journal)
        fsync_folder(home.path)
    except (OSError, sqlite3.Error) as error:
        raise Unavailable(f"the journal could not be reverted: {error}", advice="check the disk") from None
    finally:
        _remove(fresh)
    return Reverted(backup, last - first, last)


def _back_up(home: Home) -> Path:
    place = home.path / FOLDER
    key = load_identity(home.identity_key).public_key()
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        partial = place / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        with JournalReader.open(home.journal) as journal:
            journal.backup(partial / home.journal.name, key)
        for path in (home.identity_key, home.enrolment, home.credentials, home.overrides):
            if path.is_file():
                shutil.copy2(path, partial / path.name)
                fsync_file(partial / path.name)
        fsync_folder(partial)
        number = max((int(match[1]) for match in map(_NAME.fullmatch, os.listdir(place)) if match), default=0)
        named = place / f"{number + 1:06d}-{pos_gateway.__version__}"
        partial.rename(named)
        fsync_folder(place)
    except OSError as error:
        raise Unavailable(
            f"no backup could be made: {error.strerror}", advice="make room; nothing was changed"
        ) from None
    return named


def _backups(home: Home) -> list[Path]:
    """The newest first."""
    place = home.path / FOLDER
    if not place.is_dir():
        return []
    return sorted((path for path in place.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def _newest_known(home: Home) -> Path:
    known = set(JournalFile.known_form())
    for backup in _backups(home):
        if (backup / home.journal.name).is_file() and set(_form(backup / home.journal.name)) <= known:
            return backup
    raise NotFound(
        f"{home.path / FOLDER} has no backup of a form this program knows",
        advice="use the newer program; nothing is lost",
    )


def _remove_old(home: Home) -> None:
    seen: dict[tuple[str, ...], int] = {}
    for backup in _backups(home):
        form = _form(backup / home.journal.name)
        seen[form] = seen.get(form, 0) + 1
        if seen[form] > _KEPT_OF_EACH_FORM:
            shutil.rmtree(backup, ignore_errors=True)


def _form(path: Path) -> tuple[str, ...]:
    file = JournalFile.open_for_reading(path)
    try:
        return file.form
    finally:
        file.close()


def _fold(path: Path) -> None:
    """One file, no write-ahead log beside it: a log that stayed would be taken for another file's."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        if connection.execute("PRAGMA journal_mode = DELETE").fetchone() != ("delete",):
            raise Unavailable(f"{path} is in use", advice="stop the gateway first")


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
