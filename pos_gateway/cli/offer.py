"""`pos-gateway offer`: what a purchase in instalments costs."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pos_gateway.cli.terminal import Json, emit, percent
from pos_gateway.errors import InvalidInput
from pos_gateway.instalments import Charge, Offer, Quote, quote
from pos_gateway.money import currency as currency_of

app = typer.Typer(no_args_is_help=True, help="Instalment offers: what a purchase in so many periods costs.")


@app.callback()
def _noun() -> None:
    """Keeps `quote` a verb of its own while it is the only one."""


@app.command("quote")
def quote_(
    amount: Annotated[str, typer.Option("--amount", help="Like 19.30, in the currency.")],
    currency: Annotated[str, typer.Option("--currency", help="ISO 4217, like CNY.")],
    periods: Annotated[int, typer.Option("--periods", help="1 to 24.")],
    fee_per_period_bps: Annotated[
        int | None,
        typer.Option(
            "--fee-per-period-bps", help="Flat fee: of the whole principal, each period. 50 is 0.5 %."
        ),
    ] = None,
    rate_per_period_bps: Annotated[
        int | None, typer.Option("--rate-per-period-bps", help="Annuity: interest on what is still owed.")
    ] = None,
    merchant_fee_bps: Annotated[
        int | None, typer.Option("--merchant-fee-bps", help="Merchant-funded: of the principal, once.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quote a plan: each period's amount, the whole cost, and its rates.

    The annual percentage rate is the actuarial one: the period's internal rate of return times twelve.
    """
    charges = {
        Charge.FLAT_FEE: fee_per_period_bps,
        Charge.ANNUITY: rate_per_period_bps,
        Charge.MERCHANT_FUNDED: merchant_fee_bps,
    }
    given = [(charge, bps) for charge, bps in charges.items() if bps is not None]
    if len(given) != 1:
        raise InvalidInput(
            "how it is charged must be said once",
            where="offer quote",
            advice="one of --fee-per-period-bps, --rate-per-period-bps, --merchant-fee-bps",
        )
    charge, bps = given[0]
    unit = currency_of(currency)
    offer = Offer(id="quoted", currency=unit, charge=charge, periods=(periods,), rate_per_period_bps=bps)
    found = quote(offer, unit.parse(amount), periods)
    emit(found.to_json(), "" if as_json else _text(found), as_json=as_json)


def _text(found: Quote) -> str:
    money = found.offer.currency.format
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("period", "principal", "fee", "to pay", "still owed"):
        table.add_column(column, justify="right")
    for part in found.instalments:
        amounts = (part.principal_minor, part.fee_minor, part.total_minor, part.remaining_minor)
        table.add_row(str(part.number), *map(money, amounts))
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    code = found.offer.currency.code
    lines = [
        capture.get().rstrip(),
        "",
        f"Purchase {money(found.principal_minor)} + fees {money(found.fee_minor)}"
        f" = {money(found.total_minor)} {code} in {found.periods} periods",
        f"Annual percentage rate {percent(found.annual_percentage_rate_ppm)}"
        f" (effective {percent(found.effective_annual_rate_ppm)};"
        f" simple rate {percent(found.simple_annual_rate_ppm)}, of the whole principal)",
    ]
    if found.merchant_fee_minor:
        lines.append(f"The merchant pays {money(found.merchant_fee_minor)} {code}.")
    return "\n".join(lines)
