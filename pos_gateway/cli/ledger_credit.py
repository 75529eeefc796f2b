"""`ledger bill|plan|loan|scorecard|debt …`, `ledger audit`, `ledger history`: the credit product."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from pydantic import ValidationError

from pos_gateway.cli.places import LEDGER_HOME, LedgerHome
from pos_gateway.cli.terminal import EXIT_NO, Json, emit, emit_rows
from pos_gateway.errors import InvalidConfiguration, InvalidInput
from pos_gateway.lab.credit_history import History
from pos_gateway.ledger.credit.scorecard import Evaluation, Scorecard
from pos_gateway.ledger.ledger import Ledger

bill_app = typer.Typer(no_args_is_help=True, help="Bills: close them, show them.")
plan_app = typer.Typer(no_args_is_help=True, help="Instalment plans of an account.")
loan_app = typer.Typer(no_args_is_help=True, help="Loans for one purpose, paid out to the merchant.")
scorecard_app = typer.Typer(no_args_is_help=True, help="How customers are evaluated, and upgraded.")
debt_app = typer.Typer(no_args_is_help=True, help="Debts that are late: relief and losses.")

_Offer = Annotated[str, typer.Option("--offer", help="Of the policy in force, by its id.")]
_Periods = Annotated[int, typer.Option(min=1, max=24, help="How many months.")]
_Features = Annotated[
    Path | None, typer.Option("--features", help="JSON: {account id: {feature: integer}}.", dir_okay=False)
]


@bill_app.command("run")
def run_bills(
    batch: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many accounts at once.")] = 20_000,
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Close every cycle that is over. It can be stopped anywhere and run again: nothing is billed twice."""
    with Ledger.open(home) as ledger:
        closed = 0

        def told(progress: Any) -> None:
            nonlocal closed
            closed += progress.accounts
            print(f"{closed} closed, now {progress.closing.closing}", file=sys.stderr, flush=True)

        total = ledger.credit.close_bills(batch_accounts=batch, progress=told)
    emit({"closed": total}, f"{total} cycles closed.", as_json=as_json)


@bill_app.command("list")
def list_bills(account_id: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Every bill of an account, oldest first."""
    with Ledger.open(home) as ledger:
        rows = [_plain(asdict(bill)) for bill in ledger.credit.bills(account_id)]
    columns = ("closing", "due_on", "total_minor", "minimum_minor", "open_minor")
    emit_rows("bills", columns, rows, as_json=as_json, empty="No bill yet.")


@bill_app.command("show")
def show_bill(
    account_id: str,
    closing: Annotated[str | None, typer.Option(help="Like 2027-02-05; the last if not said.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the statement there as a page of its own.", dir_okay=False)
    ] = None,
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """The statement of one bill."""
    with Ledger.open(home) as ledger:
        told = ledger.credit.statement(account_id, _day(closing) if closing else None)
    if html is not None:
        html.write_text(told.to_html(), encoding="utf-8")
    lines = [
        {"at": line.at.isoformat(), "title": line.title, "amount_minor": line.amount_minor}
        for line in told.lines
    ]
    data = {"account_id": account_id, **_plain(asdict(told.bill)), "lines": lines}
    emit(data, told.to_text() if html is None else f"Statement in {html}.", as_json=as_json)


@plan_app.command("list")
def list_plans(account_id: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Every plan of an account, oldest first."""
    with Ledger.open(home) as ledger:
        rows = [
            {**asdict(plan), "id": str(plan.id), "kind": plan.kind.value}
            for plan in ledger.credit.plans(account_id)
        ]
    columns = ("id", "kind", "offer_id", "periods", "left_minor", "ahead_minor", "next_number")
    emit_rows("plans", columns, rows, as_json=as_json, empty="No plan yet.")


@plan_app.command("settle")
def settle_plan(
    account_id: str,
    plan_id: str,
    reference: Annotated[str, typer.Option(help="What the bank calls the repayment.")],
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """End a plan early, with a repayment of just what that takes."""
    with Ledger.open(home) as ledger:
        settlement, _ = ledger.credit.settle_plan(account_id, _uuid(plan_id), reference=reference)
    data = {**asdict(settlement), "total_minor": settlement.total_minor, "reference": reference}
    text = f"Settled for {settlement.total_minor} minor units; {settlement.spared_minor} of fees are spared."
    emit(data, text, as_json=as_json)


@plan_app.command("spread")
def spread_bill(
    account_id: str,
    amount: Annotated[str, typer.Argument(help="Of the last bill's purchases, like 120.00.")],
    offer: _Offer,
    periods: _Periods,
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Repay purchases of the last bill in instalments; before it is due."""
    with Ledger.open(home) as ledger:
        amount_minor = ledger.currency.parse(amount)
        plan_id = ledger.credit.spread_bill(account_id, offer, amount_minor, periods)
    emit({"plan_id": str(plan_id)}, f"Plan {plan_id}.", as_json=as_json)


@loan_app.command("approve")
def approve_loans(
    account_id: str, features: _Features = None, home: LedgerHome = LEDGER_HOME, as_json: Json = False
) -> None:
    """Let an evaluation say what loans of this account may come to."""
    with Ledger.open(home) as ledger:
        found = ledger.credit.approve_loans(account_id, _imported(features, account_id))
    _emit_evaluation(account_id, found, as_json=as_json)


@loan_app.command("pay-out")
def pay_out(
    account_id: str,
    amount: Annotated[str, typer.Argument(help="Like 120.00.")],
    scene: Annotated[str, typer.Option(help="Like rent, travel, decoration, education, wedding.")],
    purpose: Annotated[str, typer.Option(help="In words; it is kept.")],
    merchant: Annotated[str, typer.Option(help="Whom it is paid to, by id.")],
    offer: _Offer,
    periods: _Periods,
    reference: Annotated[str, typer.Option(help="The same again is the same loan.")],
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Lend for one purpose, and owe the money to the merchant."""
    with Ledger.open(home) as ledger:
        loan_id = ledger.credit.lend(
            account_id,
            scene=scene,
            purpose=purpose,
            merchant_id=merchant,
            amount_minor=ledger.currency.parse(amount),
            offer_id=offer,
            periods=periods,
            reference=reference,
        )
    emit({"loan_id": str(loan_id)}, f"Loan {loan_id}.", as_json=as_json)


@scorecard_app.command("add")
def add_scorecard(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Take a scorecard into use, from JSON; the version says which it is, for ever."""
    try:
        card = Scorecard.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidConfiguration(first["msg"], where=f"{file}, field {place or 'root'}") from None
    with Ledger.open(home) as ledger:
        ledger.credit.add_scorecard(card)
    emit({"version": card.version}, f"Scorecard {card.version} is in use.", as_json=as_json)


@scorecard_app.command("evaluate")
def evaluate(
    account_id: str, features: _Features = None, home: LedgerHome = LEDGER_HOME, as_json: Json = False
) -> None:
    """Evaluate a customer; it is kept, with its features and reasons."""
    with Ledger.open(home) as ledger:
        found = ledger.credit.evaluate(account_id, _imported(features, account_id))
    _emit_evaluation(account_id, found, as_json=as_json)


@scorecard_app.command("upgrade")
def upgrade(
    account_id: str, features: _Features = None, home: LedgerHome = LEDGER_HOME, as_json: Json = False
) -> None:
    """From the vault to a general line, if the evaluation allows it: funds leave, the limit stays."""
    with Ledger.open(home) as ledger:
        found = ledger.credit.upgrade(account_id, _imported(features, account_id))
    _emit_evaluation(account_id, found, as_json=as_json)


@scorecard_app.command("downgrade")
def downgrade(account_id: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Back to the vault alone, as far as nothing owed or reserved needs the line."""
    with Ledger.open(home) as ledger:
        ledger.credit.downgrade(account_id)
        account = ledger.account(account_id)
    data = {"limit_minor": account.limit_minor, "target_limit_minor": account.target_limit_minor}
    emit(data, f"The limit goes to {account.target_limit_minor} minor units.", as_json=as_json)


@debt_app.command("show")
def show_debt(account_id: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """How late an account is, by its own day."""
    with Ledger.open(home) as ledger:
        found = ledger.credit.arrears(account_id)
    text = f"{found.days} days overdue ({found.bucket}): {found.overdue_minor} minor units."
    emit(asdict(found), text, as_json=as_json)


@debt_app.command("relieve")
def relieve(
    account_id: str,
    offer: _Offer,
    periods: _Periods,
    waive: Annotated[bool, typer.Option("--waive", help="Give up the charges owed so far.")] = False,
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """A hardship plan out of all that stands on bills."""
    with Ledger.open(home) as ledger:
        plan_id = ledger.credit.relieve(account_id, offer, periods, waive=waive)
    emit({"plan_id": str(plan_id)}, f"Plan {plan_id}.", as_json=as_json)


@debt_app.command("waive")
def waive_charges(account_id: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Give up all charges that are owed."""
    with Ledger.open(home) as ledger:
        given_up_minor = ledger.credit.waive(account_id)
    emit({"waived_minor": given_up_minor}, f"{given_up_minor} minor units given up.", as_json=as_json)


@debt_app.command("write-off")
def write_off(account_id: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Give up everything that is owed, and lend no more. What is repaid later is a recovery."""
    with Ledger.open(home) as ledger:
        lost_minor = ledger.credit.write_off(account_id)
    emit({"written_off_minor": lost_minor}, f"{lost_minor} minor units written off.", as_json=as_json)


def audit(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Derive every balance from the transfers and every bill from the rules a second time."""
    with Ledger.open(home) as ledger:
        found = ledger.credit.audit()
    data = {
        "accounts": found.accounts,
        "derived": found.derived,
        "differences": [asdict(difference) for difference in found.differences],
        "trial_balance": found.trial_balance,
        "trial_balance_sum": sum(found.trial_balance.values()),
    }
    facts = sum(found.derived.values())
    text = f"{found.accounts} accounts, {facts} facts, {len(found.differences)} differences"
    emit(data, text, as_json=as_json)
    if not found.holds:
        raise typer.Exit(EXIT_NO)


def history(
    accounts: Annotated[int, typer.Option(min=1, max=1_000_000)] = 100,
    days: Annotated[int, typer.Option(min=1, max=3_660)] = 365,
    seed: Annotated[int, typer.Option(help="The same seed, the same lives.")] = 1,
    start: Annotated[str, typer.Option(help="The first day.")] = "2027-01-01",
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Let simulated customers live in this ledger's books, to try bills and audits on. Never in a ledger in
    earnest: their purchases come from no card."""
    with Ledger.open(home) as ledger:
        if ledger.accounts():
            raise InvalidInput("there are accounts already", where="ledger", advice="a ledger of its own")
        lives = History(ledger.database, accounts, seed, _day(start), ledger.policy)
        lives.run(days, lambda day: announce_day(day, as_json=as_json))
    data = {"accounts": accounts, "days": days, "seed": seed}
    emit(data, f"{accounts} accounts lived {days} days (seed {seed}).", as_json=as_json)


def announce_day(day: date, *, as_json: bool) -> None:
    if day.day == 1 and not as_json:
        print(day.isoformat(), file=sys.stderr, flush=True)


def _emit_evaluation(account_id: str, found: Evaluation, *, as_json: bool) -> None:
    data = {
        "account_id": account_id,
        "scorecard": found.version,
        "points": found.points,
        "limit_minor": found.limit_minor,
        "upgrades": found.upgrades,
        "reasons": [
            {"feature": reason.feature, "english": reason.english, "chinese": reason.chinese}
            for reason in found.reasons
        ],
    }
    why = "".join(f"\n  {reason.english} {reason.chinese}" for reason in found.reasons)
    emit(data, f"{found.points} points: a line of {found.limit_minor} minor units.{why}", as_json=as_json)


def _imported(file: Path | None, account_id: str) -> Mapping[str, int]:
    if file is None:
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot be read: {error}", where=str(file)) from None
    found = document.get(account_id, {}) if isinstance(document, dict) else None
    if not isinstance(found, dict) or any(type(value) is not int for value in found.values()):
        raise InvalidInput("must be {account id: {feature: integer}}", where=str(file))
    return found


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise InvalidInput("must be a day like 2027-02-05", where="day") from None


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidInput("not a UUID", where="plan id") from None


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.isoformat() if isinstance(value, date) else value for name, value in row.items()}
