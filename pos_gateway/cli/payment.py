"""`payment start|show|cancel|void|refund`: take a payment on the running gateway, or take it back."""

from __future__ import annotations

import os
import time
from typing import Annotated, Any
from uuid import UUID

import typer

from pos_gateway.cli.places import GATEWAY_HOME, GatewayHome
from pos_gateway.cli.terminal import EXIT_NO, Json, emit, emit_rows, percent
from pos_gateway.errors import InvalidInput
from pos_gateway.gateway.config import Home, load_settings
from pos_gateway.gateway.local_client import ask, watch
from pos_gateway.money import currency
from pos_gateway.records import uuid7

app = typer.Typer(no_args_is_help=True, help="Take a payment on the running gateway.")

_OFFER_COLUMNS = ("offer", "periods", "each", "fees", "annual_percentage_rate")

_SENTENCES = {
    "present_card": "Present card.",
    "processing": "Processing; keep the card at the reader.",
    "tap_again": "The card left too early. Tap it again.",
    "remove_card": "Take the last card away first.",
    "reader_missing": "The reader is missing.",
}


@app.command()
def start(
    amount: Annotated[str, typer.Argument(help="Like 19.30, in the till's currency.")],
    payment_id: Annotated[
        str | None, typer.Option("--id", help="A UUID; the same again never pays twice.")
    ] = None,
    lane: Annotated[str | None, typer.Option(help="Which lane; a free one if not said.")] = None,
    offer: Annotated[
        str | None, typer.Option(help="In instalments: which offer; see `payment offers`.")
    ] = None,
    periods: Annotated[int | None, typer.Option(help="In how many instalments.")] = None,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Ask for a tap and wait for its result. Exit code 0 approved, 1 not."""
    place = Home(home)
    unit = currency(load_settings(place).terminal.currency)
    chosen = _new_id(payment_id)
    if (offer is None) != (periods is None):
        raise InvalidInput("an offer and its number of periods go together", where="--offer, --periods")
    order: dict[str, Any] = {"id": chosen, "amount_minor": unit.parse(amount), "currency": unit.code}
    if lane is not None:
        order["lane"] = lane
    if offer is not None:
        order["plan"] = {"offer": offer, "periods": periods}
    view = ask(place, "POST", "/v1/payments", order)
    if not view["final"]:
        view = _follow(place, chosen, quiet=as_json)
    _tell(view, as_json=as_json)


@app.command()
def offers(
    amount: Annotated[str, typer.Argument(help="Like 19.30, in the till's currency.")],
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """The instalments that this till may offer for an amount. Whether a card may have them, its tap tells."""
    place = Home(home)
    unit = currency(load_settings(place).terminal.currency)
    found = ask(place, "GET", f"/v1/offers?amount_minor={unit.parse(amount)}")["offers"]
    rows = found if as_json else [_offer_row(plan) for plan in found]
    emit_rows("offers", _OFFER_COLUMNS, rows, as_json=as_json, empty="No instalments for this amount.")


@app.command()
def show(payment_id: str, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """How a payment stands. Exit code 0 approved, 1 not."""
    _tell(ask(Home(home), "GET", f"/v1/payments/{_uuid(payment_id)}"), as_json=as_json)


@app.command()
def cancel(payment_id: str, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Ask for a payment's end. A card that has already answered may still approve it."""
    view = ask(Home(home), "POST", f"/v1/payments/{_uuid(payment_id)}/cancel", {})
    if not view["final"]:
        view = _follow(Home(home), view["id"], quiet=True)
    emit(view, _sentence(view), as_json=as_json)


@app.command()
def void(
    payment_id: str,
    reason: Annotated[str, typer.Option(help="For the books, at most 120 characters.")] = "",
    void_id: Annotated[
        str | None, typer.Option("--id", help="A UUID; the same again never voids twice.")
    ] = None,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Take a whole approved payment back, whether the ledger has it already or not."""
    order = {"id": _new_id(void_id), "reason": reason}
    view = ask(Home(home), "POST", f"/v1/payments/{_uuid(payment_id)}/reversal", order)
    emit(view, f"Void: {view['amount']}. Journal record {view['sequence']}.", as_json=as_json)


@app.command()
def refund(
    payment_id: str,
    amount: Annotated[str, typer.Argument(help="Like 5.00, at most what is left of the payment.")],
    reason: Annotated[str, typer.Option(help="For the books, at most 120 characters.")] = "",
    refund_id: Annotated[
        str | None, typer.Option("--id", help="A UUID; the same again never refunds twice.")
    ] = None,
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Give an approved payment's amount back, or a part of it."""
    place = Home(home)
    unit = currency(load_settings(place).terminal.currency)
    order = {"id": _new_id(refund_id), "amount_minor": unit.parse(amount), "reason": reason}
    view = ask(place, "POST", f"/v1/payments/{_uuid(payment_id)}/refunds", order)
    emit(view, f"Refunded: {view['amount']}. Journal record {view['sequence']}.", as_json=as_json)


def _offer_row(plan: dict[str, Any]) -> dict[str, Any]:
    first, last = plan["instalments"][0]["total"], plan["instalments"][-1]["total"]
    return {
        "offer": plan["offer"],
        "periods": plan["periods"],
        "each": first if first == last else f"{first}, last {last}",
        "fees": currency(plan["currency"]).format(plan["fee_minor"]),
        "annual_percentage_rate": percent(plan["annual_percentage_rate_ppm"]),
    }


def _new_id(given: str | None) -> str:
    return str(_uuid(given) if given else uuid7(time.time_ns() // 1_000_000, os.urandom(10)))


def _follow(home: Home, payment_id: str, *, quiet: bool) -> dict[str, Any]:
    last: dict[str, Any] = {}

    def on_event(view: dict[str, Any]) -> bool:
        if not quiet and view["state"] != last.get("state") and view["state"] in _SENTENCES:
            print(_SENTENCES[view["state"]], flush=True)
        last.update(view)
        return not view["final"]

    watch(home, f"/v1/payments/{payment_id}/events", on_event)
    return last if last.get("final") else ask(home, "GET", f"/v1/payments/{payment_id}")


def _tell(view: dict[str, Any], *, as_json: bool) -> None:
    emit(view, _sentence(view), as_json=as_json)
    if view["state"] != "approved":
        raise typer.Exit(EXIT_NO)


def _sentence(view: dict[str, Any]) -> str:
    card = f" from card •••• {view['token_last4']}" if view["token_last4"] else ""
    match view["state"]:
        case "approved":
            return (
                f"Approved: {view['amount']}{card}. Journal record {view['sequence']}, payment {view['id']}."
            )
        case "declined":
            detail = f" [{view['message']}]" if view["message"] else ""
            return f"Declined: {view['amount']}{card}. {view['english']}{detail}"
        case state:
            return f"{state.replace('_', ' ').capitalize()}: {view['amount']}. {view['message']}".rstrip()


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidInput("not a UUID", where="payment id") from None
