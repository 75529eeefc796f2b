"""`simulate`: months of cut-off shops in minutes, the reserve principle beside what others do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from pos_gateway.cli.terminal import Json, emit, telling
from pos_gateway.errors import InvalidConfiguration
from pos_gateway.lab.simulator.load import read_load
from pos_gateway.lab.simulator.report import render
from pos_gateway.lab.simulator.run import simulate as run
from pos_gateway.lab.simulator.town import Size

_ROWS: Final = (
    ("over the limit", "over_limit_minor"),
    ("accounts over it", "over_limit_accounts"),
    ("guaranteed, not paid", "guaranteed_unpaid"),
    ("price, % of taps", "price_taps_percent"),
    ("online, phone, %", "price_online_with_phone_percent"),
    ("online, others, %", "price_online_without_phone_percent"),
    ("clones used", "clones_used"),
    ("clones proven", "clones_proven"),
    ("loss per clone", "loss_per_clone_minor"),
)


def simulate(
    shops: Annotated[int, typer.Option(min=1, max=100_000, help="How many shops.")] = 200,
    tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many cards and phones.")] = 2000,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How many days.")] = 60,
    outage: Annotated[
        float, typer.Option(min=0, max=0.95, help="Share of the time that a shop has no line.")
    ] = 0.1,
    phones: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of customers with a phone; else the load's.")
    ] = None,
    clones: Annotated[int, typer.Option(min=0, help="How many cards are copied or rolled back.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same run.")] = 1,
    load: Annotated[
        Path | None, typer.Option(help="A load.toml of your own.", exists=True, dir_okay=False)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a page with the courses over time here.", dir_okay=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Simulate shops that are cut off for hours to weeks: who goes over a limit, which merchant is not paid,
    what is declined for safety. The reserve principle, store-and-forward and a snapshot of available credit
    on the same history. Amounts in minor units."""
    town = read_load(load)
    if phones is not None:
        customers = town.customers.model_copy(update={"phone_share": phones})
        town = town.model_copy(update={"customers": customers})
    if report is not None and not report.absolute().parent.is_dir():
        raise InvalidConfiguration("no such folder", where=str(report.absolute().parent))
    began = time.monotonic()
    with telling(f"seed {seed}: day") as progress:
        outcome = run(Size(shops, tokens, days, outage, clones, seed), town, progress=progress)
    data: dict[str, Any] = outcome.to_json()
    data["phones"] = town.customers.phone_share
    taps = outcome.systems["ours"].taps.tried
    data["taps_per_second"] = round(taps / max(time.monotonic() - began, 1e-9), 1)
    if report is not None:
        report.write_text(render(outcome), encoding="utf-8")
    emit(data, _text(data, list(outcome.systems)), as_json=as_json)


def _text(data: dict[str, Any], systems: list[str]) -> str:
    lines = [
        f"seed {data['seed']}: {data['shops']} shops, {data['tokens']} cards and phones, "
        f"{data['days']} days, without a line {round(100 * data['outage'])} % of the time; "
        f"{data['taps_per_second']} taps/s",
        f"{'':22}" + "".join(f"{name.replace('_', ' '):>20}" for name in systems),
    ]
    lines += [f"{label:22}" + "".join(f"{data[s][key]:>20}" for s in systems) for label, key in _ROWS]
    lines.append("what the price of taps is made of, ours, % of taps:")
    lines += [
        f"  {cause.replace('_', ' '):34}{share:>8}"
        for cause, share in data["ours"]["price_taps_causes_percent"].items()
    ]
    return "\n".join(lines)
