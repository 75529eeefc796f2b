"""Signing in and out, approvals, and who works here.

POST /v1/first-owner          {"code", "name", "pin"} → signed in as the owner
POST /v1/session              {"member", "pin"} → signed in
POST /v1/session/used         the person at the screen is still there
POST /v1/session/end          sign out
POST /v1/approvals            {"member", "pin", "route", "payment"} → a manager's word, good once
POST /v1/displays             this browser becomes a second screen
GET  /v1/staff, POST /v1/staff, POST /v1/staff/{id}
GET  /v1/tokens, POST /v1/tokens, POST /v1/tokens/{id}/remove
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from pos_gateway.errors import InvalidMessage, NotPermitted
from pos_gateway.gateway.access import (
    APPROVABLE,
    DISPLAY_COOKIE,
    LEAST_ROLES,
    SESSION_COOKIE,
    Door,
    caller_of,
    facts_of,
    set_cookie,
)
from pos_gateway.gateway.deeds import Deeds
from pos_gateway.gateway.shapes import Approve, ChangeMember, FirstOwner, NewMember, NewToken, Nothing, SignIn
from pos_gateway.gateway.staff import Member, staff_role
from pos_gateway.gateway.wire import body_of, json_answer, uuid_of


def add_staff_routes(app: web.Application, door: Door, deeds: Deeds) -> None:
    staff, sessions = door.staff, door.sessions

    def signed_in(member: Member) -> web.Response:
        response = json_answer({"name": member.name, "role": member.role.word})
        set_cookie(response, door, SESSION_COOKIE, sessions.begin(member))
        return response

    async def first_owner(request: web.Request) -> web.Response:
        told = await body_of(request, FirstOwner)
        code = "".join(told.code.split()).replace("-", "")
        member = await asyncio.to_thread(staff.set_first_owner, code, told.name, told.pin)
        await asyncio.to_thread(deeds.note, "first_owner", _who(member))
        return signed_in(member)

    async def sign_in(request: web.Request) -> web.Response:
        told = await body_of(request, SignIn)
        member = await _checked(told)
        old = request.cookies.get(SESSION_COOKIE)
        if old:
            sessions.end(old)
        await asyncio.to_thread(deeds.note, "signed_in", _who(member))
        return signed_in(member)

    async def _checked(told: SignIn) -> Member:
        try:
            return await asyncio.to_thread(staff.check_pin, told.member, told.pin)
        except NotPermitted:
            known = staff.member(told.member)
            if known is not None and known.attempts.locked_until_unix_ms:
                await asyncio.to_thread(deeds.note, "locked_out", _who(known), wrong=known.attempts.wrong)
            raise

    async def used(request: web.Request) -> web.Response:
        await body_of(request, Nothing)
        session = caller_of(request).session
        if session is not None:
            sessions.used(session)
        return json_answer({"idle_s": sessions.idle_s})

    async def sign_out(request: web.Request) -> web.Response:
        await body_of(request, Nothing)
        sessions.end(request.cookies.get(SESSION_COOKIE, ""))
        response = json_answer({})
        response.del_cookie(SESSION_COOKIE, path="/")
        return response

    async def approve(request: web.Request) -> web.Response:
        told = await body_of(request, Approve)
        session = caller_of(request).session
        if session is None:
            raise NotPermitted("approvals are for people who are signed in", signed_in=True)
        route = f"/v1/payments/{{id}}/{told.route}"
        if route not in APPROVABLE:
            raise InvalidMessage("nothing that can be approved", where="route")
        payment = uuid_of(told.payment, "payment")
        approver = await _checked(told)
        if approver.role < LEAST_ROLES["POST", route]:
            raise NotPermitted("this needs a manager", signed_in=True)
        await asyncio.to_thread(
            deeds.record,
            f"approved_{told.route}",
            _who(approver),
            payment,
            **{"for": caller_of(request).name},
        )
        return json_answer({"approval": sessions.approve(approver, session, route, str(payment))})

    async def display(request: web.Request) -> web.Response:
        await body_of(request, Nothing)
        response = json_answer({})
        set_cookie(response, door, DISPLAY_COOKIE, sessions.new_display())
        return response

    async def members(request: web.Request) -> web.Response:
        return json_answer({"staff": [member.as_json() for member in staff.members]})

    async def add(request: web.Request) -> web.Response:
        told = await body_of(request, NewMember)
        member = await asyncio.to_thread(staff.add, told.name, staff_role(told.role), told.pin)
        await asyncio.to_thread(
            deeds.record,
            "staff_added",
            facts_of(caller_of(request)),
            member=member.name,
            is_now=member.role.word,
        )
        return json_answer(member.as_json(), status=201)

    async def change(request: web.Request) -> web.Response:
        told = await body_of(request, ChangeMember)
        role = staff_role(told.role) if told.role is not None else None
        member_id = request.match_info["id"]
        member = await asyncio.to_thread(
            lambda: staff.change(member_id, role=role, pin=told.pin, active=told.active)
        )
        sessions.end_all_of(member.id)
        await asyncio.to_thread(
            deeds.record,
            "staff_changed",
            facts_of(caller_of(request)),
            member=member.name,
            is_now=member.role.word,
            active=member.active,
            new_pin=told.pin is not None,
        )
        return json_answer(member.as_json())

    async def tokens(request: web.Request) -> web.Response:
        return json_answer({"tokens": [token.as_json() for token in staff.tokens]})

    async def add_token(request: web.Request) -> web.Response:
        told = await body_of(request, NewToken)
        secret, token = await asyncio.to_thread(staff.new_token, told.name, staff_role(told.role))
        await asyncio.to_thread(
            deeds.record, "token_made", facts_of(caller_of(request)), program=token.name, may=token.role.word
        )
        return json_answer({**token.as_json(), "token": secret}, status=201)

    async def remove_token(request: web.Request) -> web.Response:
        await body_of(request, Nothing)
        token = await asyncio.to_thread(staff.remove_token, request.match_info["id"])
        await asyncio.to_thread(
            deeds.record, "token_removed", facts_of(caller_of(request)), program=token.name
        )
        return json_answer(token.as_json())

    app.add_routes(
        [
            web.post("/v1/first-owner", first_owner),
            web.post("/v1/session", sign_in),
            web.post("/v1/session/used", used),
            web.post("/v1/session/end", sign_out),
            web.post("/v1/approvals", approve),
            web.post("/v1/displays", display),
            web.get("/v1/staff", members),
            web.post("/v1/staff", add),
            web.post("/v1/staff/{id}", change),
            web.get("/v1/tokens", tokens),
            web.post("/v1/tokens", add_token),
            web.post("/v1/tokens/{id}/remove", remove_token),
        ]
    )


def _who(member: Member) -> dict[str, str]:
    return {"by": member.name, "role": member.role.word}
