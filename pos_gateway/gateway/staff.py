"""Who works here: names, roles and PINs, and the tokens of programs.

One small file in the gateway's home, replaced atomically. PINs are kept as argon2id hashes, tokens as
SHA-256. A PIN has few digits, so what protects it is that only a few guesses count: each attempt is on
the disk before it is tried, and after five wrong ones every further one waits twice as long.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import argon2
from argon2.exceptions import VerifyMismatchError

from pos_gateway.errors import Conflict, InvalidConfiguration, InvalidMessage, NotFound, NotPermitted
from pos_gateway.gateway.journal_file import fsync_folder

MAX_NAME_CHARACTERS: Final = 40
MAX_MEMBERS: Final = 200
MAX_TOKENS: Final = 50

_FREE_ATTEMPTS: Final = 5
_FIRST_LOCK_S: Final = 30
_LONGEST_LOCK_S: Final = 3600
_PIN: Final = re.compile(r"\d{4,12}", re.ASCII)
_TOKEN_BYTES: Final = 32
_HASHER: Final = argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
"""19 MiB and two passes: a tenth of a second on a small board, and it has the memory."""


class Role(IntEnum):
    """Each may do what those before it may."""

    PUBLIC = 0
    DISPLAY = 1
    """A second screen that customers look at: one lane's amount and result."""
    CASHIER = 2
    MANAGER = 3
    OWNER = 4

    @property
    def word(self) -> str:
        return self.name.lower()


STAFF_ROLES: Final = (Role.CASHIER, Role.MANAGER, Role.OWNER)
_PIN_DIGITS: Final = {Role.CASHIER: 4, Role.MANAGER: 6, Role.OWNER: 6}


def staff_role(word: str) -> Role:
    """
    Raises:
        InvalidMessage: no role that a member of the staff can have.
    """
    for role in STAFF_ROLES:
        if role.word == word:
            return role
    known = ", ".join(role.word for role in STAFF_ROLES)
    raise InvalidMessage("no such role", where="role", advice=f"one of {known}")


@dataclass(frozen=True, slots=True)
class Attempts:
    """Wrong PINs in a row, and until when no further one is tried."""

    wrong: int = 0
    locked_until_unix_ms: int = 0

    def after_one_more(self, now_unix_ms: int) -> Attempts:
        """An attempt begins: it counts as wrong until it turns out right."""
        wrong = self.wrong + 1
        if wrong < _FREE_ATTEMPTS:
            return Attempts(wrong)
        lock_s = min(_LONGEST_LOCK_S, _FIRST_LOCK_S << min(wrong - _FREE_ATTEMPTS, 12))
        return Attempts(wrong, now_unix_ms + 1000 * lock_s)

    def check(self, now_unix_ms: int) -> None:
        """
        Raises:
            NotPermitted: locked out for now.
        """
        # A clock set back must not lock anybody out for longer than the longest lock.
        left_ms = min(self.locked_until_unix_ms - now_unix_ms, 1000 * _LONGEST_LOCK_S)
        if left_ms > 0:
            left_s = -(-left_ms // 1000)
            raise NotPermitted(
                f"too many wrong attempts: wait {left_s} s",
                retry_after_s=left_s,
                advice="a manager or the owner can set a new PIN",
            )


@dataclass(frozen=True, slots=True)
class Member:
    """One person."""

    id: str
    name: str
    role: Role
    pin_hash: str = field(repr=False)
    active: bool = True
    attempts: Attempts = Attempts()

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "name": self.name, "role": self.role.word, "active": self.active}


@dataclass(frozen=True, slots=True)
class ProgramToken:
    """A program that may use the API, and as whom."""

    id: str
    name: str
    role: Role
    sha256: str = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "name": self.name, "role": self.role.word}


class Staff:
    """The register. Safe to call from any thread; checking a PIN takes a tenth of a second.

    `now_unix_ms`: the clock. `setup_code`: the file of the code that the first owner types in.
    """

    def __init__(self, path: Path, setup_code: Path, now_unix_ms: Callable[[], int]) -> None:
        """
        Raises:
            InvalidConfiguration: the file cannot be read.
        """
        self._path = path
        self._setup_code = setup_code
        self._now_unix_ms = now_unix_ms
        self._lock = threading.Lock()
        self._members: dict[str, Member] = {}
        self._tokens: dict[str, ProgramToken] = {}
        self._setup = Attempts()
        self._load()

    @property
    def has_owner(self) -> bool:
        return any(member.active and member.role is Role.OWNER for member in self._members.values())

    @property
    def members(self) -> Sequence[Member]:
        """In the order of their names."""
        return sorted(self._members.values(), key=lambda member: member.name.casefold())

    @property
    def tokens(self) -> Sequence[ProgramToken]:
        return tuple(self._tokens.values())

    def member(self, member_id: str) -> Member | None:
        """None too if they work here no more."""
        found = self._members.get(member_id)
        return found if found is not None and found.active else None

    def setup_code(self) -> str | None:
        """The code for the first owner, made if there is none yet; None once there is an owner."""
        if self.has_owner:
            return None
        with self._lock:
            if not self._setup_code.exists():
                _write_secret(self._setup_code, f"{secrets.randbelow(10**8):08d}")
            return self._setup_code.read_text().strip()

    def set_first_owner(self, code: str, name: str, pin: str) -> Member:
        """
        Raises:
            Conflict: there is an owner.
            NotPermitted: the code is wrong, or too many were.
            InvalidMessage: name or PIN are none.
        """
        _check_name(name)
        _check_pin(pin, Role.OWNER)
        wanted = self.setup_code()
        if wanted is None:
            raise Conflict("there is an owner already", advice="sign in")
        with self._lock:
            if self.has_owner:
                raise Conflict("there is an owner already", advice="sign in")
            now = self._now_unix_ms()
            self._setup.check(now)
            self._setup = self._setup.after_one_more(now)
            self._save()
            if not secrets.compare_digest(code.encode(), wanted.encode()):
                raise NotPermitted("this is not the code", advice="the gateway prints it when it starts")
            self._setup = Attempts()
            member = self._put(Member(_new_id(), name.strip(), Role.OWNER, _HASHER.hash(pin)))
            self._setup_code.unlink(missing_ok=True)
            return member

    def add(self, name: str, role: Role, pin: str) -> Member:
        """
        Raises:
            InvalidMessage: name or PIN are none.
            Conflict: the name is taken, or there are too many.
        """
        _check_name(name)
        _check_pin(pin, role)
        pin_hash = _HASHER.hash(pin)
        with self._lock:
            if any(m.name.casefold() == name.strip().casefold() for m in self._members.values()):
                raise Conflict("somebody of this name is here already", advice="add an initial")
            if len(self._members) >= MAX_MEMBERS:
                raise Conflict(f"at most {MAX_MEMBERS} people")
            member = self._put(Member(_new_id(), name.strip(), role, pin_hash))
            if self.has_owner:
                self._setup_code.unlink(missing_ok=True)
            return member

    def change(
        self, member_id: str, *, role: Role | None = None, pin: str | None = None, active: bool | None = None
    ) -> Member:
        """A new PIN lifts a lock-out.

        Raises:
            NotFound: nobody has this id.
            InvalidMessage: the PIN is none, or too short for the role.
            Conflict: the shop would be left without an owner.
        """
        with self._lock:
            member = self._members.get(member_id)
            if member is None:
                raise NotFound("nobody here has this id")
            changed = member
            if role is not None:
                if pin is None and _PIN_DIGITS[role] > _PIN_DIGITS[member.role]:
                    raise InvalidMessage("a new PIN is needed with this role", where="pin")
                changed = replace(changed, role=role)
            if pin is not None:
                _check_pin(pin, changed.role)
                changed = replace(changed, pin_hash=_HASHER.hash(pin), attempts=Attempts())
            if active is not None:
                changed = replace(changed, active=active)
            others = [m for m in self._members.values() if m.id != member_id]
            if not any(m.active and m.role is Role.OWNER for m in (*others, changed)):
                raise Conflict("somebody must stay the owner", advice="make another owner first")
            return self._put(changed)

    def check_pin(self, member_id: str, pin: str) -> Member:
        """Who that is, if the PIN is theirs.

        Raises:
            NotPermitted: it is not, or too many were tried.
        """
        wrong = NotPermitted("name and PIN do not go together")
        with self._lock:
            member = self.member(member_id)
            if member is None:
                raise wrong
            now = self._now_unix_ms()
            member.attempts.check(now)
            attempts = member.attempts.after_one_more(now)
            self._put(replace(member, attempts=attempts))
            try:
                _HASHER.verify(member.pin_hash, pin)
            except VerifyMismatchError:
                raise wrong from None
            return self._put(replace(member, attempts=Attempts()))

    def new_token(self, name: str, role: Role) -> tuple[str, ProgramToken]:
        """A program's token, told this once.

        Raises:
            InvalidMessage, Conflict: see `add`.
        """
        _check_name(name)
        with self._lock:
            if len(self._tokens) >= MAX_TOKENS:
                raise Conflict(f"at most {MAX_TOKENS} programs", advice="remove one that is not used")
            secret = secrets.token_urlsafe(_TOKEN_BYTES)
            token = ProgramToken(_new_id(), name.strip(), role, _digest(secret))
            self._tokens[token.sha256] = token
            self._save()
            return secret, token

    def remove_token(self, token_id: str) -> ProgramToken:
        """
        Raises:
            NotFound: no program has this id.
        """
        with self._lock:
            for digest, token in self._tokens.items():
                if token.id == token_id:
                    del self._tokens[digest]
                    self._save()
                    return token
        raise NotFound("no program has this id")

    def program(self, secret: str) -> ProgramToken | None:
        return self._tokens.get(_digest(secret))

    def _put(self, member: Member) -> Member:
        self._members[member.id] = member
        self._save()
        return member

    def _load(self) -> None:
        try:
            document = json.loads(self._path.read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError):
            raise InvalidConfiguration("cannot be read", where=str(self._path)) from None
        try:
            for raw in document["members"]:
                attempts = Attempts(**raw["attempts"])
                member = Member(**{**raw, "role": Role(raw["role"]), "attempts": attempts})
                self._members[member.id] = member
            for raw in document["tokens"]:
                token = ProgramToken(**{**raw, "role": Role(raw["role"])})
                self._tokens[token.sha256] = token
            self._setup = Attempts(**document["setup"])
        except (KeyError, TypeError, ValueError):
            raise InvalidConfiguration("is no register of staff", where=str(self._path)) from None

    def _save(self) -> None:
        document: Mapping[str, Any] = {
            "members": [asdict(member) for member in self._members.values()],
            "tokens": [asdict(token) for token in self._tokens.values()],
            "setup": asdict(self._setup),
        }
        _write_secret(self._path, json.dumps(document, ensure_ascii=False))


def machine_token(path: Path) -> str:
    """The token of this machine's own programs, made at the first start: whoever can read the file has
    the gateway's keys too."""
    try:
        token = path.read_text().strip()
    except FileNotFoundError:
        token = ""
    if not token:
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        _write_secret(path, token)
    return token


def _write_secret(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)


def _new_id() -> str:
    return secrets.token_hex(8)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _check_name(name: str) -> None:
    if not 1 <= len(name.strip()) <= MAX_NAME_CHARACTERS or not name.isprintable():
        raise InvalidMessage(f"1 to {MAX_NAME_CHARACTERS} characters", where="name")


def _check_pin(pin: str, role: Role) -> None:
    least = _PIN_DIGITS[role]
    if _PIN.fullmatch(pin) is None or len(pin) < least:
        raise InvalidMessage(f"a {role.word}'s PIN has {least} to 12 digits", where="pin")
    steps = {(int(b) - int(a)) % 10 for a, b in itertools.pairwise(pin)}
    if len(steps) == 1 and steps <= {0, 1, 9}:
        raise InvalidMessage("too easy to guess", where="pin", advice="no 1111 and no 1234")
