"""The gateway's pages: made by the server, live by /v1/events. No build step, no inline script, no CDN."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

import jinja2
import segno
from aiohttp import web
from markupsafe import Markup

from pos_gateway.authorization.reasons import Reason
from pos_gateway.errors import InvalidInput, InvalidMessage, NotFound
from pos_gateway.gateway.access import Caller, Door, caller_of, safe_next, sign_in_path
from pos_gateway.gateway.closing_api import closed
from pos_gateway.gateway.dashboard.advice import advice
from pos_gateway.gateway.dashboard.stories import answer_to_i_paid, sentence_of, steps_of, word_of
from pos_gateway.gateway.history import MAX_FOUND, Found, Search
from pos_gateway.gateway.language import CODES, Language, chosen, language
from pos_gateway.gateway.openapi import fields_of, openapi
from pos_gateway.gateway.receipts.contents import Copy, report
from pos_gateway.gateway.receipts.paper import Centred, Pair, Paper, Qr, Rule
from pos_gateway.gateway.receipts.pdf import as_pdf
from pos_gateway.gateway.receipts.text import as_text
from pos_gateway.gateway.shifts import VARIANCE_REASONS
from pos_gateway.gateway.staff import Role
from pos_gateway.gateway.wire import uuid_of
from pos_gateway.records import Kind

if TYPE_CHECKING:
    from pos_gateway.gateway.api import Parts

_HERE: Final = Path(__file__).parent
_LANGUAGE_COOKIE: Final = "pos_gateway_language"
_ROWS: Final = 50
_DAY_MS: Final = 86_400_000
_SECURITY_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=()",
}
_SPOKEN: Final = re.compile(r'\bsay\(\s*"((?:[^"\\]|\\.)+)"')

TOLD_BY_THE_API: Final = frozenset(
    {
        "name and PIN do not go together",
        "this is not the code",
        "the gateway prints it when it starts",
        "this page is out of date",
        "reload the page",
        "this needs a manager",
        "ask a manager to do or approve it",
        "every lane is taking a payment",
        "finish or cancel one first",
        "no reader is connected",
        "sign in first",
        "too easy to guess at pin",
        "no 1111 and no 1234",
        "a variance needs a reason at reason",
        "the drawer was not counted yet",
        "count it first",
        "a manager or the owner can set a new PIN",
    }
)
"""What the API tells to people at a page, beside what their scripts say."""


def spoken_by_scripts() -> frozenset[str]:
    """Every sentence that the pages' scripts say, in English."""
    texts = (path.read_text() for path in sorted((_HERE / "static").glob("*.js")))
    return frozenset(json.loads(f'"{match}"') for text in texts for match in _SPOKEN.findall(text))


def add_pages(app: web.Application, parts: Parts) -> None:
    pages = _Pages(parts)
    app.add_routes(
        [
            web.get("/", pages.till),
            web.get("/today", pages.today),
            web.get("/line", pages.line),
            web.get("/transactions", pages.transactions),
            web.get("/transactions.csv", pages.export),
            web.get("/transactions/{id}", pages.transaction),
            web.get("/transactions/{id}/receipt", pages.receipt),
            web.get("/closing", pages.closing),
            web.get("/reports/{id}", pages.report),
            web.get("/settings", pages.settings),
            web.get("/customer", pages.customer),
            web.get("/docs", pages.docs),
            web.get("/v1/openapi.json", pages.openapi),
            web.get("/sign-in", pages.sign_in),
            web.get("/first-run", pages.first_run),
            web.get("/language", pages.choose_language),
        ]
    )
    app.router.add_static("/static/", _HERE / "static")
    app.on_response_prepare.append(_add_security_headers(parts.door))


def _add_security_headers(door: Door) -> Any:
    async def add(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(_SECURITY_HEADERS)
        if door.secure:
            response.headers["Strict-Transport-Security"] = "max-age=31536000"
        if not request.path.startswith("/static/"):
            response.headers.setdefault("Cache-Control", "no-store")

    return add


class _Pages:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._shop = parts.desk.shop
        self._spoken = spoken_by_scripts() | TOLD_BY_THE_API
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    async def till(self, request: web.Request) -> web.StreamResponse:
        unit = self._shop.unit
        return self._page(
            request,
            "till.html",
            tab="/",
            exponent=unit.exponent,
            zero=unit.format(0),
            printer=bool(self._parts.desk.printer),
        )

    async def today(self, request: web.Request) -> web.StreamResponse:
        now = datetime.now(self._shop.zone).astimezone(self._shop.zone)
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        since_unix_ms = int(midnight.timestamp() * 1000)
        found = await asyncio.to_thread(self._parts.history.since, since_unix_ms)
        totals, tongue = found.as_json(), self._language(request)
        declined = [(_reason(reason, tongue), count) for reason, count in found.declined.most_common()]
        return self._page(
            request,
            "today.html",
            tab="/today",
            date=f"{now:%Y-%m-%d}",
            totals=totals,
            bars=self._bars(found.by_hour),
            declined=declined,
            declined_count=sum(found.declined.values()),
        )

    def _bars(self, by_hour: Mapping[int, int]) -> list[dict[str, Any]]:
        if not by_hour:
            return []
        highest = max(1, *by_hour.values())
        first = min(*by_hour, 16)  # at least eight hours, so that one bar is no wall
        hours = range(first, max(first + 7, *by_hour) + 1)
        return [
            {
                "hour": hour,
                "label": f"{hour:02d}:00",
                "amount": self._money(by_hour.get(hour, 0)),
                "height": max(2, 110 * max(0, by_hour.get(hour, 0)) // highest),
            }
            for hour in hours
        ]

    async def line(self, request: web.Request) -> web.StreamResponse:
        status, tongue = await asyncio.to_thread(self._parts.status), self._language(request)
        _ = tongue.tell
        queue, snapshot = status["queue"], status["snapshot"]
        word = {True: _("Up"), False: _("Off the network"), None: _("Not tried yet")}[status["line"]["up"]]
        fresh = {
            "fresh": _("Fresh"),
            "stale": _("Getting old"),
            "expired": _("Expired"),
            "not_yet_valid": _("Not yet valid"),
        }
        return self._page(
            request,
            "line.html",
            tab="/line",
            status=status,
            advice=advice(status, tongue),
            forecast=self._forecast(status["forecast"], tongue),
            line_word=word,
            freshness=fresh[snapshot["freshness"]] if snapshot else "",
            left=self._money(max(0, queue["cap_minor"] - queue["amount_minor"])),
        )

    def _forecast(self, forecast: Mapping[str, Any], tongue: Language) -> str:
        """How long it goes on without a line, and what ends it first."""
        _ = tongue.tell
        bounds = {
            "unsynchronised_count": _("the number of payments that may wait"),
            "unsynchronised_amount": _("the amount that may wait"),
            "unsynchronised_age": _("how long the oldest payment may wait"),
            "limits_stale": _("limits to be refreshed; then smaller taps only"),
            "limits_expire": _("the end of the limits here"),
            "no_limits": _("no valid limits are here"),
            "clock": _("the clock is not trusted"),
        }
        bound = bounds.get(forecast["first"], "")
        if forecast["stopped"]:
            return _("Without a line nothing more can be approved: {bound}.", bound=bound)
        said = _(
            "Without a line: {amount} more, one tap up to {cap}.",
            amount=forecast["amount_left"],
            cap=forecast["per_tap_cap"],
        )
        if not bound:
            return said
        first = _("First comes: {bound}", bound=bound)
        at = f" ({self._when(forecast['first_at_unix_ms'])})" if forecast["first_at_unix_ms"] else ""
        return f"{said} {first}{at}"

    async def transactions(self, request: web.Request) -> web.StreamResponse:
        tongue = self._language(request)
        _ = tongue.tell
        query = {
            name: request.query.get(name, "")[:40]
            for name in ("from", "to", "amount", "card", "reference", "result")
        }
        problem, found = "", list[Found]()
        try:
            search = self._search(request)
            found = await asyncio.to_thread(self._parts.history.search, search, _ROWS + 1)
        except InvalidInput as error:
            problem = str(error)
        older = ""
        if len(found) > _ROWS:
            found = found[:_ROWS]
            older = urlencode({**query, "before": found[-1].sequence})
        return self._page(
            request,
            "transactions.html",
            tab="/transactions",
            query=query,
            query_string=urlencode(query),
            results=[("", _("all")), ("approved", _("approved")), ("declined", _("declined"))],
            may_export=caller_of(request).role >= Role.MANAGER,
            rows=[self._row(one, tongue) for one in found],
            older=older,
            problem=problem,
        )

    async def export(self, request: web.Request) -> web.StreamResponse:
        search = self._search(request)
        found = await asyncio.to_thread(self._parts.history.search, search, MAX_FOUND)
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(
            ["time", "reference", "result", "amount", "currency", "card", "approval", "verdict", "money"]
        )
        for one in found:
            facts = one.facts
            approved = one.kind is Kind.AUTHORIZATION
            writer.writerow(
                [
                    self._when(facts["at_unix_ms"]),
                    facts["sale_id"],
                    "approved" if approved else facts["reason"],
                    self._shop.unit.format(facts["amount_minor"]),
                    self._shop.unit.code,
                    facts["token_last4"],
                    one.sequence if approved else "",
                    one.verdict.value if one.verdict else ("waiting" if approved else ""),
                    one.meaning.money.value if approved else "",
                ]
            )
        # With its mark, spreadsheets read it as UTF-8.
        return web.Response(
            body=b"\xef\xbb\xbf" + out.getvalue().encode(),
            content_type="text/csv",
            headers={"Content-Disposition": 'attachment; filename="transactions.csv"'},
        )

    async def transaction(self, request: web.Request) -> web.StreamResponse:
        payment_id = uuid_of(request.match_info["id"], "path")
        tongue, caller = self._language(request), caller_of(request)
        records = await asyncio.to_thread(self._parts.history.story, payment_id)
        own = [r for r in records if r.kind in (Kind.AUTHORIZATION, Kind.DECLINE)]
        if not own:
            raise NotFound("no payment is known under this id", advice="nothing was charged under it")
        main = next((r for r in own if r.kind is Kind.AUTHORIZATION), own[-1])
        facts, approved = main.facts(), main.kind is Kind.AUTHORIZATION
        view = await asyncio.to_thread(self._parts.payments.show, payment_id)
        left = 0 if view.voided or not approved else view.amount_minor - view.refunded_minor
        may = caller.role >= Role.MANAGER
        managers = [m for m in self._parts.door.staff.members if m.active and m.role >= Role.MANAGER]
        return self._page(
            request,
            "transaction.html",
            tab="/transactions",
            id=str(payment_id),
            approved=approved,
            word=word_of(view, tongue),
            amount=self._money(facts["amount_minor"]),
            sentence=sentence_of(main, records, tongue),
            time=self._when(facts["at_unix_ms"]),
            card=facts["token_last4"],
            answer=answer_to_i_paid(records, tongue),
            needs_approval=not may,
            managers=managers,
            left_minor=left,
            left=self._shop.unit.format(left),
            may_void=not view.refunded_minor,
            steps=[
                {**step, "time": self._when(step["at_unix_ms"])}
                for step in steps_of(records, tongue, self._money)
            ],
        )

    async def receipt(self, request: web.Request) -> web.StreamResponse:
        payment_id = uuid_of(request.match_info["id"], "path")
        try:
            copy = Copy(request.query.get("copy", "customer"))
        except ValueError:
            raise InvalidMessage("customer or merchant", where="copy") from None
        tongue = self._language(request)
        paper = await asyncio.to_thread(
            lambda: self._parts.desk.paper(payment_id, copy, tongue, issue=request.method == "GET")
        )
        return self._paper(
            request, paper, back=f"/transactions/{payment_id}", payment=str(payment_id), copy=copy.value
        )

    async def closing(self, request: web.Request) -> web.StreamResponse:
        tongue, caller = self._language(request), caller_of(request)
        _ = tongue.tell
        shift = self._parts.shifts.current
        words = {
            "wrong_change": _("wrong change was given"),
            "miscounted": _("miscounted"),
            "unrecorded_cash": _("cash was moved and not recorded"),
            "float_was_wrong": _("the cash to begin with was wrong"),
            "unexplained": _("nobody knows"),
        }
        manager = caller.role >= Role.MANAGER
        return self._page(
            request,
            "closing.html",
            tab="/closing",
            shift=shift.as_json() if shift else None,
            is_manager=manager,
            reasons=[(reason, words[reason]) for reason in VARIANCE_REASONS],
            days=await asyncio.to_thread(self._days, tongue) if manager else [],
        )

    def _days(self, tongue: Language) -> list[dict[str, Any]]:
        _ = tongue.tell
        words = {
            "provisional": _("provisional"),
            "settled": _("settled"),
            "differs": _("settled, with differences"),
        }
        days = []
        for record in self._parts.history.days():
            facts = closed(self._parts.shifts, self._parts.history, record.id)
            days.append(
                {
                    "id": str(record.id),
                    "number": facts["number"],
                    "time": self._when(facts["at_unix_ms"]),
                    "takings": self._money(facts["totals"]["net_minor"]),
                    "state": words[facts["totals"]["state"]],
                }
            )
        return days

    async def report(self, request: web.Request) -> web.StreamResponse:
        tongue, asked = self._language(request), request.match_info["id"]
        paper = await asyncio.to_thread(self._report, asked, tongue)
        return self._paper(request, paper, back="/closing", payment="", copy="")

    def _report(self, asked: str, tongue: Language) -> Paper:
        _ = tongue.tell
        if asked == "x":
            totals = self._parts.shifts.day_so_far().as_json()
            now = datetime.now(self._shop.zone).astimezone(self._shop.zone)
            head = [(_("Printed"), f"{now:%Y-%m-%d %H:%M}"), (_("Terminal"), self._shop.terminal_id)]
            return report(self._shop, _("X report – the day so far"), head, totals, tongue)
        facts = closed(self._parts.shifts, self._parts.history, uuid_of(asked, "path"))
        head = [
            (_("Closed"), self._when(facts["at_unix_ms"])),
            (_("By"), facts["by"]),
            (_("Terminal"), self._shop.terminal_id),
        ]
        if facts["event"] == "day":
            title = _("Z report {number}", number=facts["number"])
            head.append((_("Shifts"), str(facts["shifts"])))
        else:
            title = _("Shift report")
            head += [
                (_("Opened by"), facts["opened_by"]),
                (_("Cash expected"), self._money(facts["expected_minor"])),
                (_("Cash counted"), self._money(facts["counted_minor"])),
                (_("Difference"), self._money(facts["variance_minor"])),
            ]
        return report(self._shop, title, head, facts["totals"], tongue)

    async def settings(self, request: web.Request) -> web.StreamResponse:
        _ = self._language(request).tell
        status = await asyncio.to_thread(self._parts.status)
        staff, caller = self._parts.door.staff, caller_of(request)
        lanes = ", ".join(lane["reader"] for lane in status["lanes"]) or _("No reader is connected.")
        facts = [
            (_("Merchant"), f"{self._shop.merchant_name} ({self._shop.merchant_id})"),
            (_("Terminal"), self._shop.terminal_id),
            (_("Issuer"), self._shop.issuer),
            (_("Currency"), self._shop.unit.code),
            (_("Readers"), lanes),
            (_("Receipt printer"), self._parts.desk.printer or _("none")),
            (_("Locks after"), _("{n} s", n=int(self._parts.door.sessions.idle_s))),
            (_("Reached over the network"), _("yes, with TLS") if self._parts.door.secure else _("no")),
        ]
        return self._page(
            request,
            "settings.html",
            tab="/settings",
            members=staff.members,
            tokens=staff.tokens,
            is_owner=caller.role >= Role.OWNER,
            facts=facts,
        )

    async def customer(self, request: web.Request) -> web.StreamResponse:
        lane = request.query.get("lane", "")[:64]
        return self._page(
            request,
            "customer.html",
            tab="",
            lane=lane,
            events="/v1/customer-events?" + urlencode({"lane": lane}),
            idle_s=0,
        )

    async def docs(self, request: web.Request) -> web.StreamResponse:
        document = openapi()
        return self._page(
            request,
            "docs.html",
            tab="",
            document=document,
            fields=lambda operation: fields_of(document, operation),
        )

    async def openapi(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(openapi())

    async def sign_in(self, request: web.Request) -> web.StreamResponse:
        staff = self._parts.door.staff
        if not staff.has_owner:
            raise web.HTTPSeeOther(sign_in_path(request, self._parts.door))
        return self._page(
            request,
            "sign_in.html",
            tab="",
            events="",
            idle_s=0,
            members=[member for member in staff.members if member.active],
            next=safe_next(request.query.get("next", "/")),
        )

    async def first_run(self, request: web.Request) -> web.StreamResponse:
        if self._parts.door.staff.has_owner:
            raise web.HTTPSeeOther("/")
        return self._page(request, "first_run.html", tab="", events="", idle_s=0)

    async def choose_language(self, request: web.Request) -> web.StreamResponse:
        response = web.Response(status=303, headers={"Location": safe_next(request.query.get("next", "/"))})
        code = request.query.get("to", "")
        if code in CODES:
            response.set_cookie(
                _LANGUAGE_COOKIE, code, max_age=366 * 86_400, path="/", httponly=True, samesite="Lax"
            )
        return response

    def _paper(
        self, request: web.Request, paper: Paper, *, back: str, payment: str, copy: str
    ) -> web.StreamResponse:
        form = request.query.get("form", "html")
        name = "".join(c if c.isalnum() and c.isascii() else "-" for c in paper.title)
        if form == "pdf":
            return web.Response(
                body=as_pdf(paper),
                content_type="application/pdf",
                headers={"Content-Disposition": f'inline; filename="{name}.pdf"'},
            )
        if form == "text":
            return web.Response(text=as_text(paper), content_type="text/plain")
        if form != "html":
            raise InvalidMessage("html, text or pdf", where="form")
        here = {"copy": copy} if copy else {}
        return self._page(
            request,
            "paper.html",
            tab="",
            paper=paper,
            lines=[_drawn(line) for line in paper.lines],
            back=back,
            payment=payment,
            printer=bool(self._parts.desk.printer),
            print_body=json.dumps({"copy": copy, "language": self._language(request).code}),
            pdf="?" + urlencode({**here, "form": "pdf"}),
            text="?" + urlencode({**here, "form": "text"}),
        )

    def _row(self, one: Found, tongue: Language) -> dict[str, Any]:
        facts, approved = one.facts, one.kind is Kind.AUTHORIZATION
        _ = tongue.tell
        money = {
            "paid": _("paid"),
            "not_paid": _("not paid"),
            "under_review": _("under review"),
            "waiting": _("guaranteed, on its way"),
        }
        return {
            "id": facts["sale_id"],
            "time": self._when(facts["at_unix_ms"]),
            "amount": self._shop.unit.format(facts["amount_minor"]),
            "card": f"•••• {facts['token_last4']}" if facts["token_last4"] else "–",
            "approved": approved,
            "result": _("approved") if approved else _reason(facts["reason"], tongue),
            "money": money[one.meaning.money.value] if approved else "",
        }

    def _search(self, request: web.Request) -> Search:
        """
        Raises:
            InvalidInput: names the field that is no date, amount or number.
        """
        query = request.query
        fields: dict[str, Any] = {"result": query.get("result", "")}
        if query.get("from"):
            fields["since_unix_ms"] = self._day(query["from"], "from")
        if query.get("to"):
            fields["until_unix_ms"] = self._day(query["to"], "to") + _DAY_MS - 1
        if query.get("amount"):
            fields["amount_minor"] = self._shop.unit.parse(query["amount"])
        if query.get("card"):
            fields["last4"] = query["card"][:4]
        fields["sale_id_prefix"] = query.get("reference", "").strip().lower()[:36]
        before = query.get("before", "")
        if before:
            if not (before.isascii() and before.isdigit() and len(before) < 18):
                raise InvalidMessage("not a number", where="before")
            fields["before"] = int(before)
        return Search(**fields)

    def _day(self, text: str, where: str) -> int:
        try:
            day = datetime.strptime(text, "%Y-%m-%d")  # noqa: DTZ007 - the shop's own day
        except ValueError:
            raise InvalidMessage("not a date", where=where, advice="write it like 2026-11-24") from None
        zoned = day.replace(tzinfo=self._shop.zone) if self._shop.zone else day.astimezone()
        return int(zoned.timestamp() * 1000)

    def _money(self, amount_minor: int) -> str:
        return f"{self._shop.unit.format(amount_minor)} {self._shop.unit.code}"

    def _when(self, unix_ms: int | None) -> str:
        if unix_ms is None:
            return "–"
        at = datetime.fromtimestamp(unix_ms / 1000, self._shop.zone).astimezone(self._shop.zone)
        return f"{at:%Y-%m-%d %H:%M:%S}"

    def _language(self, request: web.Request) -> Language:
        return chosen(request.cookies.get(_LANGUAGE_COOKIE), request.headers.get("Accept-Language", ""))

    def _page(self, request: web.Request, template: str, *, tab: str, **values: Any) -> web.StreamResponse:
        tongue, caller = self._language(request), caller_of(request)
        other = language("zh" if tongue.code == "en" else "en")
        unit = self._shop.unit
        data = {
            "words": {english: tongue.words[english] for english in self._spoken if english in tongue.words},
            "language": tongue.code,
            "currency": unit.code,
            "exponent": unit.exponent,
            "events": values.pop("events", "/v1/events"),
            "idle_s": values.pop("idle_s", self._parts.door.sessions.idle_s if caller.session else 0),
        }
        html = self._environment.get_template(template).render(
            {
                "_": tongue.tell,
                "language": tongue,
                "other_language": other.code,
                "other_tag": other.tag,
                "other_name": {"en": "English", "zh": "中文"}[other.code],
                "here": request.path_qs,
                "merchant": self._shop.merchant_name,
                "terminal_id": self._shop.terminal_id,
                "currency": unit.code,
                "training": self._shop.training,
                "caller": caller,
                "csrf": caller.session.csrf if caller.session else "",
                "page_data": _for_a_script(data),
                "tabs": self._tabs(caller, tongue),
                "tab": tab,
                "money": self._money,
                "when": self._when,
                **values,
            }
        )
        return web.Response(text=html, content_type="text/html")

    def _tabs(self, caller: Caller, tongue: Language) -> list[tuple[str, str, str]]:
        _ = tongue.tell
        tabs = [
            ("/", "till", _("Till")),
            ("/today", "today", _("Today")),
            ("/transactions", "transactions", _("Transactions")),
            ("/closing", "closing", _("Closing")),
            ("/line", "line", _("Line and risk")),
        ]
        return [*tabs, ("/settings", "settings", _("Settings"))] if caller.role >= Role.MANAGER else tabs


def _for_a_script(data: Mapping[str, Any]) -> Markup:
    """JSON that may stand inside a script element: nothing in it can end that, nor begin another."""
    text = json.dumps(data, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - escaped above


def _reason(value: str, tongue: Language) -> str:
    told = Reason(value).explanation
    return told.chinese if tongue.code == "zh" else told.english


def _drawn(line: Any) -> dict[str, Any]:
    match line:
        case Centred(text, weight):
            return {"kind": "centred", "text": text, "weight": weight.value}
        case Pair(name, value, weight):
            return {"kind": "pair", "name": name, "value": value, "weight": weight.value}
        case Rule():
            return {"kind": "rule"}
        case Qr(data, caption):
            svg = segno.make_qr(data, error="m").svg_inline(scale=2, title=caption)
            return {"kind": "qr", "svg": Markup(svg), "caption": caption}  # noqa: S704 - segno's own
        case _:
            raise TypeError
