"""Who is signed in at which browser, and what a manager has just approved. In memory: after a restart
everybody signs in again."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pos_gateway.gateway.staff import Member

_SECRET_BYTES: Final = 32
_MAX_SESSIONS: Final = 200
_MAX_DISPLAYS: Final = 32
_MAX_APPROVALS: Final = 100
_APPROVAL_S: Final = 90.0


@dataclass(slots=True)
class Session:
    """One browser in which somebody has signed in."""

    member_id: str
    csrf: str = field(repr=False)
    begun_s: float
    used_s: float


@dataclass(frozen=True, slots=True)
class Approval:
    """A manager's word for one request: of this session, on this route, about this payment."""

    approver: Member
    session: str
    route: str
    about: str
    given_s: float


class Sessions:
    """`idle_s`: without use for so long a session is over; `longest_s`: with use, too."""

    def __init__(
        self, *, idle_s: float, longest_s: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.idle_s = idle_s
        self._longest_s = longest_s
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._displays: OrderedDict[str, None] = OrderedDict()
        self._approvals: OrderedDict[str, Approval] = OrderedDict()

    def begin(self, member: Member) -> str:
        """Returns the session's secret."""
        secret, now = secrets.token_urlsafe(_SECRET_BYTES), self._monotonic()
        with self._lock:
            self._sessions[_key(secret)] = Session(member.id, secrets.token_urlsafe(_SECRET_BYTES), now, now)
            while len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return secret

    def find(self, secret: str) -> Session | None:
        """None once it is over. Looking does not keep it alive; see `used`."""
        now = self._monotonic()
        with self._lock:
            session = self._sessions.get(_key(secret))
            if session is None:
                return None
            if now - session.used_s > self.idle_s or now - session.begun_s > self._longest_s:
                del self._sessions[_key(secret)]
                return None
            return session

    def used(self, session: Session) -> None:
        session.used_s = self._monotonic()

    def end(self, secret: str) -> None:
        with self._lock:
            self._sessions.pop(_key(secret), None)

    def end_all_of(self, member_id: str) -> None:
        with self._lock:
            for key in [k for k, s in self._sessions.items() if s.member_id == member_id]:
                del self._sessions[key]

    def new_display(self) -> str:
        """A second screen's secret: it outlives the idle lock, and opens the customer view alone."""
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        with self._lock:
            self._displays[_key(secret)] = None
            while len(self._displays) > _MAX_DISPLAYS:
                self._displays.popitem(last=False)
        return secret

    def is_display(self, secret: str) -> bool:
        return _key(secret) in self._displays

    def approve(self, approver: Member, session: Session, route: str, about: str) -> str:
        """Returns the approval's secret: good once, for a minute and a half."""
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        with self._lock:
            self._approvals[_key(secret)] = Approval(approver, session.csrf, route, about, self._monotonic())
            while len(self._approvals) > _MAX_APPROVALS:
                self._approvals.popitem(last=False)
        return secret

    def take_approval(self, secret: str, session: Session, route: str, about: str) -> Member | None:
        """Who approved exactly that; used up by asking."""
        with self._lock:
            found = self._approvals.pop(_key(secret), None)
        if found is None or self._monotonic() - found.given_s > _APPROVAL_S:
            return None
        same = (found.session, found.route, found.about) == (session.csrf, route, about)
        return found.approver if same else None


def _key(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
