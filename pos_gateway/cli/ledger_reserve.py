"""`ledger repayment|vault|review|conflict …`: money that comes in, payments that wait, clones."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from pos_gateway.cli.places import LEDGER_HOME, LedgerHome
from pos_gateway.cli.terminal import Json, emit, emit_rows
from pos_gateway.errors import Conflict, InvalidInput, Unavailable
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.ledger.movements import Movement, Purpose
from pos_gateway.money import Money

repayment_app = typer.Typer(no_args_is_help=True, help="Repayments: they may bounce until they are final.")
vault_app = typer.Typer(no_args_is_help=True, help="Funds that customers lock for an equal limit.")
review_app = typer.Typer(no_args_is_help=True, help="Genuine payments that wait for a decision.")
conflict_app = typer.Typer(no_args_is_help=True, help="Clones that were proven.")

_Amount = Annotated[str, typer.Argument(help="Like 120.00.")]
_Reference = Annotated[str, typer.Option(help="What the bank calls it; the same again is the same.")]


@repayment_app.command("receive")
def receive_repayment(
    account_id: str,
    amount: _Amount,
    reference: _Reference,
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Book a repayment. It lowers the debt at once and frees credit only when it is final."""
    _receive(account_id, Purpose.REPAYMENT, amount, reference, home, as_json=as_json)


@repayment_app.command("final")
def final_repayment(
    account_id: str, reference: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False
) -> None:
    """Say that a repayment is here to stay."""
    _settle(account_id, reference, home, final=True, as_json=as_json)


@repayment_app.command("bounced")
def bounced_repayment(
    account_id: str, reference: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False
) -> None:
    """Say that a repayment was taken back: it is owed again."""
    _settle(account_id, reference, home, final=False, as_json=as_json)


@vault_app.command("lock")
def lock(
    account_id: str,
    amount: _Amount,
    reference: _Reference,
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Take funds into the vault. They raise the limit, and buy nothing before they are final."""
    _receive(account_id, Purpose.VAULT_LOCK, amount, reference, home, as_json=as_json)


@vault_app.command("final")
def final_lock(
    account_id: str, reference: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False
) -> None:
    """Say that funds in the vault are here to stay."""
    _settle(account_id, reference, home, final=True, as_json=as_json)


@vault_app.command("bounced")
def bounced_lock(
    account_id: str, reference: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False
) -> None:
    """Say that funds for the vault were taken back, and the limit they gave with them."""
    _settle(account_id, reference, home, final=False, as_json=as_json)


@vault_app.command("unlock")
def unlock(
    account_id: str,
    amount: _Amount,
    reference: _Reference,
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Ask funds back from the vault. What no reserve or debt needs is paid out, the rest by itself later."""
    _receive(account_id, Purpose.VAULT_UNLOCK, amount, reference, home, as_json=as_json)


@repayment_app.command("list")
@vault_app.command("list")
def list_movements(account_id: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """All money that came in for an account or was asked back from it."""
    with Ledger.open(home) as ledger:
        rows = [_movement(movement) for movement in ledger.movements(account_id)]
    columns = ("reference", "purpose", "amount_minor", "state")
    emit_rows("movements", columns, rows, as_json=as_json, empty="Nothing came in yet.")


@review_app.command("list")
def list_reviews(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Payments that wait for a decision, the longest first."""
    with Ledger.open(home) as ledger:
        rows: list[dict[str, Any]] = [
            {
                "gateway_id": review.gateway_id,
                "record_id": str(review.record_id),
                "account_id": review.account_id,
                "amount_minor": review.amount_minor,
                "why": review.why.value,
                "held": _utc(review.held_unix_ms),
            }
            for review in ledger.reviews()
        ]
    columns = ("gateway_id", "record_id", "account_id", "amount_minor", "why", "held")
    emit_rows("reviews", columns, rows, as_json=as_json, empty="Nothing waits for a decision.")


@review_app.command("release")
def release(
    gateway_id: str,
    record_id: str,
    note: Annotated[str, typer.Option(help="Why; it is kept.")],
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Pay the merchant: by the customer if the points or free credit allow it, else by the issuer."""
    _decide(gateway_id, record_id, note, home, release=True, as_json=as_json)


@review_app.command("reject")
def reject(
    gateway_id: str,
    record_id: str,
    note: Annotated[str, typer.Option(help="Why; it is kept.")],
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Pay nobody."""
    _decide(gateway_id, record_id, note, home, release=False, as_json=as_json)


@conflict_app.command("list")
def list_conflicts(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Clones that were proven, oldest first."""
    with Ledger.open(home) as ledger:
        rows: list[dict[str, Any]] = [
            {
                "id": str(found.id),
                "account_id": found.account_id,
                "token_id": found.token_id,
                "records": [str(found.record_id), str(found.other_record_id)],
                "proven": _utc(found.proven_unix_ms),
            }
            for found in ledger.conflicts()
        ]
    columns = ("id", "account_id", "token_id", "proven")
    emit_rows("conflicts", columns, rows, as_json=as_json, empty="No clone was proven yet.")


@conflict_app.command("export")
def export(
    conflict_id: str,
    out: Annotated[Path | None, typer.Option(help="Its file; CONFLICT_ID.conflict if not said.")] = None,
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Write the evidence of a clone to a file of mode 0600, which `conflict verify` checks with public keys
    alone. It holds the full token number, which the card's signature covers: guard it like the card."""
    place = out or Path(f"{conflict_id}.conflict")
    with Ledger.open(home) as ledger:
        text = ledger.conflict_bundle(_uuid(conflict_id, "conflict id")).to_json()
    try:
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Conflict(f"{place} exists already", advice="choose another --out") from None
    except OSError as error:
        raise Unavailable(f"cannot be written: {error.strerror}", advice="choose another --out") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    text = f"Evidence in {place}. It holds the full token number: guard it like the card."
    emit({"file": str(place), "sensitive": True}, text, as_json=as_json)


def _receive(
    account_id: str, purpose: Purpose, amount: str, reference: str, home: Path, *, as_json: bool
) -> None:
    with Ledger.open(home) as ledger:
        amount_minor = ledger.currency.parse(amount)
        movement = ledger.receive(account_id, purpose, reference=reference, amount_minor=amount_minor)
        _emit(ledger, movement, as_json=as_json)


def _settle(account_id: str, reference: str, home: Path, *, final: bool, as_json: bool) -> None:
    with Ledger.open(home) as ledger:
        _emit(ledger, ledger.settle_movement(account_id, reference, final=final), as_json=as_json)


def _decide(gateway_id: str, record_id: str, note: str, home: Path, *, release: bool, as_json: bool) -> None:
    with Ledger.open(home) as ledger:
        verdict = ledger.review(gateway_id, _uuid(record_id, "record id"), release=release, note=note)
    data = {"gateway_id": gateway_id, "record_id": record_id, "verdict": verdict.value}
    emit(data, "The merchant is paid." if release else "Nobody pays.", as_json=as_json)


def _emit(ledger: Ledger, movement: Movement, *, as_json: bool) -> None:
    account = ledger.account(movement.account_id)
    data = _movement(movement) | {
        "limit_minor": account.limit_minor,
        "outstanding_minor": account.outstanding_minor,
        "uncleared_minor": account.uncleared_minor,
        "vault_minor": account.vault_minor,
        "vault_leaving_minor": account.vault_leaving_minor,
        "free_minor": account.free_minor,
    }
    leaves = ledger.credit.funds_leave_on(movement.account_id) if account.vault_leaving_minor else None
    data["leaves_on"] = None if leaves is None else leaves.isoformat()
    unit = ledger.currency
    text = (
        f"{movement.purpose.value} {movement.reference}: {Money(movement.amount_minor, unit)}, "
        f"{movement.state.value}. Owed {Money(account.outstanding_minor, unit)}, uncleared "
        f"{Money(account.uncleared_minor, unit)}, in the vault {Money(account.vault_minor, unit)} of which "
        f"{Money(account.vault_leaving_minor, unit)} wait to leave, free {Money(account.free_minor, unit)}."
    )
    if account.vault_leaving_minor:
        text += f" They leave by {leaves}." if leaves else " They leave once what is owed needs them no more."
    emit(data, text, as_json=as_json)


def _movement(movement: Movement) -> dict[str, Any]:
    return {
        "account_id": movement.account_id,
        "reference": movement.reference,
        "purpose": movement.purpose.value,
        "amount_minor": movement.amount_minor,
        "state": movement.state.value,
    }


def _uuid(text: str, where: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidInput("not a UUID", where=where) from None


def _utc(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="seconds")
