"""Who may do what over HTTP: every page and route has its least role in the one table of this module.

Who asks is known by one of three things:

- a **token** in `Authorization: Bearer …`: this machine's own programs (the file `api-token` in the
  gateway's home, readable by its user alone), or a program that the owner has given a token of its own;
- a **session cookie**: somebody has signed in with a PIN. Whatever changes something must then carry the
  session's CSRF token too, and come from a page of this server;
- a **display cookie**: a second screen, which may show the customer view and nothing else.

A route that is not in the table is not served at all.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from pos_gateway.errors import NotPermitted
from pos_gateway.gateway.sessions import Session, Sessions
from pos_gateway.gateway.staff import Member, Role, Staff

SESSION_COOKIE: Final = "pos_gateway_session"
DISPLAY_COOKIE: Final = "pos_gateway_display"
CSRF_HEADER: Final = "X-CSRF-Token"
APPROVAL_HEADER: Final = "X-Approval"
THIS_MACHINE: Final = "this machine"

REVERSAL: Final = "/v1/payments/{id}/reversal"
REFUNDS: Final = "/v1/payments/{id}/refunds"
APPROVABLE: Final = frozenset({REVERSAL, REFUNDS})
"""A manager can approve these on the spot, with a PIN, for whoever is signed in."""

LEAST_ROLES: Final[Mapping[tuple[str, str], Role]] = {
    # Pages
    ("GET", "/static"): Role.PUBLIC,
    ("GET", "/sign-in"): Role.PUBLIC,
    ("GET", "/first-run"): Role.PUBLIC,
    ("GET", "/language"): Role.PUBLIC,
    ("GET", "/customer"): Role.DISPLAY,
    ("GET", "/"): Role.CASHIER,
    ("GET", "/today"): Role.CASHIER,
    ("GET", "/line"): Role.CASHIER,
    ("GET", "/transactions"): Role.CASHIER,
    ("GET", "/transactions/{id}"): Role.CASHIER,
    ("GET", "/transactions/{id}/receipt"): Role.CASHIER,
    ("GET", "/closing"): Role.CASHIER,
    ("GET", "/docs"): Role.CASHIER,
    ("GET", "/transactions.csv"): Role.MANAGER,
    ("GET", "/reports/{id}"): Role.MANAGER,
    ("GET", "/settings"): Role.MANAGER,
    # Signing in and out
    ("POST", "/v1/first-owner"): Role.PUBLIC,
    ("POST", "/v1/session"): Role.PUBLIC,
    ("POST", "/v1/session/used"): Role.CASHIER,
    ("POST", "/v1/session/end"): Role.CASHIER,
    ("POST", "/v1/approvals"): Role.CASHIER,
    ("POST", "/v1/displays"): Role.CASHIER,
    # Payments
    ("GET", "/v1/openapi.json"): Role.CASHIER,
    ("POST", "/v1/payments"): Role.CASHIER,
    ("GET", "/v1/offers"): Role.CASHIER,
    ("GET", "/v1/payments/{id}"): Role.CASHIER,
    ("POST", "/v1/payments/{id}/cancel"): Role.CASHIER,
    ("GET", "/v1/payments/{id}/events"): Role.CASHIER,
    ("GET", "/v1/payments/{id}/receipt"): Role.CASHIER,
    ("POST", "/v1/payments/{id}/print"): Role.CASHIER,
    ("POST", REVERSAL): Role.MANAGER,
    ("POST", REFUNDS): Role.MANAGER,
    # The gateway
    ("GET", "/v1/status"): Role.CASHIER,
    ("GET", "/v1/events"): Role.CASHIER,
    ("GET", "/v1/customer-events"): Role.DISPLAY,
    ("POST", "/v1/synchronise"): Role.CASHIER,
    ("POST", "/v1/limits"): Role.MANAGER,
    ("POST", "/v1/clock"): Role.MANAGER,
    ("POST", "/v1/carry/export"): Role.MANAGER,
    ("POST", "/v1/carry/import"): Role.MANAGER,
    # Whoever watches this machine: no amounts of customers, no names, no keys.
    ("GET", "/metrics"): Role.PUBLIC,
    ("GET", "/v1/health"): Role.PUBLIC,
    ("GET", "/v1/ready"): Role.PUBLIC,
    # Shifts and the day
    ("POST", "/v1/shifts"): Role.CASHIER,
    ("POST", "/v1/shifts/current/cash"): Role.CASHIER,
    ("POST", "/v1/shifts/current/count"): Role.CASHIER,
    ("POST", "/v1/shifts/current/close"): Role.CASHIER,
    ("GET", "/v1/reports/x"): Role.MANAGER,
    ("POST", "/v1/reports/z"): Role.MANAGER,
    ("GET", "/v1/reports/{id}"): Role.MANAGER,
    # People and programs
    ("GET", "/v1/staff"): Role.OWNER,
    ("POST", "/v1/staff"): Role.OWNER,
    ("POST", "/v1/staff/{id}"): Role.OWNER,
    ("GET", "/v1/tokens"): Role.OWNER,
    ("POST", "/v1/tokens"): Role.OWNER,
    ("POST", "/v1/tokens/{id}/remove"): Role.OWNER,
}

_SAFE: Final = frozenset({"GET", "HEAD"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `session`: signed in at a browser; `approver`: who approved it, if somebody else did."""

    role: Role
    name: str = ""
    member: Member | None = None
    session: Session | None = None
    approver: Member | None = None

    @property
    def by(self) -> str:
        """Who is to answer for it, in the books."""
        return self.approver.name if self.approver is not None else self.name


NOBODY: Final = Caller(Role.PUBLIC)
_KEY: Final[web.RequestKey[Caller]] = web.RequestKey("caller", Caller)


def caller_of(request: web.Request) -> Caller:
    """Whom the guard has let in."""
    caller: Caller = request.get(_KEY, NOBODY)
    return caller


@dataclass(frozen=True, slots=True)
class Door:
    """What the guard needs. `token`: of this machine's own programs. `secure`: served over TLS."""

    staff: Staff
    sessions: Sessions
    token: str
    host_names: tuple[str, ...]
    secure: bool = False

    def caller(self, request: web.Request) -> Caller:
        """Whoever asks, as far as they have shown it.

        Raises:
            NotPermitted: a token that nobody has (any more).
        """
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            if secrets.compare_digest(secret.encode(), self.token.encode()):
                return Caller(Role.OWNER, THIS_MACHINE)
            program = self.staff.program(secret)
            if program is None:
                raise NotPermitted("this token is not known", advice="ask the owner for another")
            return Caller(program.role, program.name)
        cookie = request.cookies.get(SESSION_COOKIE)
        session = self.sessions.find(cookie) if cookie else None
        member = self.staff.member(session.member_id) if session is not None else None
        if member is not None:
            return Caller(member.role, member.name, member, session)
        display = request.cookies.get(DISPLAY_COOKIE)
        if display and self.sessions.is_display(display):
            return Caller(Role.DISPLAY)
        return NOBODY


def guard(door: Door, refuse: Callable[[web.Request, NotPermitted], web.StreamResponse]) -> Middleware:
    """The middleware in front of every handler. `refuse` makes the answer to what is not permitted."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not _is_own_name(request.host, door):
            raise web.HTTPMisdirectedRequest(reason="This server does not answer to that name")
        resource = request.match_info.route.resource
        if resource is None:
            return await handler(request)
        method = "GET" if request.method in _SAFE else request.method
        least = LEAST_ROLES.get((method, resource.canonical))
        if least is None:
            raise web.HTTPNotFound
        try:
            caller = door.caller(request)
            if method != "GET":
                _check_origin(request, caller)
            caller = _admit(request, door, caller, least, resource.canonical)
        except NotPermitted as error:
            return refuse(request, error)
        request[_KEY] = caller
        return await handler(request)

    return check


def _admit(request: web.Request, door: Door, caller: Caller, least: Role, route: str) -> Caller:
    if caller.role >= least:
        return caller
    approval = request.headers.get(APPROVAL_HEADER)
    if approval and route in APPROVABLE and caller.session is not None and caller.role >= Role.CASHIER:
        approver = door.sessions.take_approval(
            approval, caller.session, route, request.match_info.get("id", "")
        )
        now = door.staff.member(approver.id) if approver is not None else None
        if now is not None and now.role >= least:
            return Caller(caller.role, caller.name, caller.member, caller.session, now)
    if caller.role >= Role.CASHIER:
        raise NotPermitted(
            f"this needs a {least.word}", signed_in=True, advice=f"ask a {least.word} to do or approve it"
        )
    raise NotPermitted("sign in first", advice="with your PIN, or a program's token")


def _check_origin(request: web.Request, caller: Caller) -> None:
    """Nothing is changed for a page that is not ours, nor by a form."""
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != request.host:
        raise NotPermitted("another web page may not do this", signed_in=True)
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(reason="Send application/json")
    if caller.session is not None:
        told = request.headers.get(CSRF_HEADER, "")
        if not secrets.compare_digest(told.encode(), caller.session.csrf.encode()):
            raise NotPermitted("this page is out of date", signed_in=True, advice="reload the page")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_own_name(host: str, door: Door) -> bool:
    """A page of somebody else's can make its own name lead here (DNS rebinding), but not an address."""
    name, colon, port = host.rpartition(":")
    bare = name if colon and port.isdigit() else host
    if bare.lower() in door.host_names:
        return True
    if not door.secure:
        return False
    try:
        ipaddress.ip_address(bare.strip("[]"))
    except ValueError:
        return False
    return True


def set_cookie(response: web.StreamResponse, door: Door, name: str, secret: str) -> None:
    response.set_cookie(name, secret, path="/", httponly=True, samesite="Strict", secure=door.secure)


def sign_in_path(request: web.Request, door: Door) -> str:
    """Where whoever is not signed in is sent to, to come back here."""
    if not door.staff.has_owner:
        return "/first-run"
    return f"/sign-in?next={quote(request.path_qs, safe='')}"


def safe_next(path: str) -> str:
    """Where to go after signing in: a page of ours, whatever was asked for."""
    inside = path.startswith("/") and not path.startswith(("//", "/\\")) and "\\" not in path
    return path if inside and path.isprintable() else "/"


def facts_of(caller: Caller) -> dict[str, Any]:
    """Who did it, for a staff record."""
    facts: dict[str, Any] = {"by": caller.by, "role": (caller.approver or caller).role.word}
    if caller.approver is not None:
        facts["for"] = caller.name
    return facts
