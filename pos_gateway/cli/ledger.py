"""`ledger …`: the issuer's side."""

from __future__ import annotations

import asyncio
import getpass
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from pos_gateway.carrying import SignedBatch
from pos_gateway.cli import ledger_credit
from pos_gateway.cli.ledger_carry import app as carry_app
from pos_gateway.cli.ledger_keys import app as keys_app
from pos_gateway.cli.ledger_reserve import conflict_app, repayment_app, review_app, vault_app
from pos_gateway.cli.places import LEDGER_HOME, LedgerHome
from pos_gateway.cli.terminal import Json, announce, emit, emit_rows
from pos_gateway.enrolment import Merchant
from pos_gateway.errors import Conflict, InvalidInput, Unavailable
from pos_gateway.gateway.old_journal import opened_copy
from pos_gateway.ledger.accounts import Account, Token, TokenStatus
from pos_gateway.ledger.api import MAX_BATCH_BYTES
from pos_gateway.ledger.api import serve as serve_ledger
from pos_gateway.ledger.gateways import Action, Gateway
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.ledger.publisher import PublishedSnapshot
from pos_gateway.money import Currency, Money, currency
from pos_gateway.records import MAX_BATCH_RECORDS

app = typer.Typer(no_args_is_help=True, help="Run the issuer's central ledger.")
account_app = typer.Typer(no_args_is_help=True, help="Accounts and their limits.")
token_app = typer.Typer(no_args_is_help=True, help="Cards and phones of an account.")
snapshot_app = typer.Typer(no_args_is_help=True, help="Signed limits for the shops.")
gateway_app = typer.Typer(no_args_is_help=True, help="The shops' gateways.")
certificate_app = typer.Typer(no_args_is_help=True, help="The ledger's own certificate.")
app.add_typer(account_app, name="account")
app.add_typer(token_app, name="token")
app.add_typer(snapshot_app, name="snapshot")
app.add_typer(gateway_app, name="gateway")
app.add_typer(certificate_app, name="certificate")
app.add_typer(carry_app, name="carry")
app.add_typer(keys_app, name="keys")
app.add_typer(repayment_app, name="repayment")
app.add_typer(vault_app, name="vault")
app.add_typer(review_app, name="review")
app.add_typer(conflict_app, name="conflict")
app.add_typer(ledger_credit.bill_app, name="bill")
app.add_typer(ledger_credit.plan_app, name="plan")
app.add_typer(ledger_credit.loan_app, name="loan")
app.add_typer(ledger_credit.scorecard_app, name="scorecard")
app.add_typer(ledger_credit.debt_app, name="debt")
app.command("audit")(ledger_credit.audit)
app.command("history")(ledger_credit.history)

Reason = Annotated[str, typer.Option(help="Kept with the decision, at most 200 characters.")]
By = Annotated[str, typer.Option(help="Who decides; the user of this computer if not said.")]

DEFAULT_PORT: Final = 8160
_SQLITE: Final = b"SQLite format 3\0"


@app.command()
def init(
    issuer: Annotated[str, typer.Option(help="The issuer's name, signed into every snapshot.")],
    currency_code: Annotated[str, typer.Option("--currency", help="ISO 4217.")] = "CNY",
    database: Annotated[
        str | None,
        typer.Option(
            envvar="POS_LEDGER_DATABASE",
            help="postgresql://user@host/name of an empty database; the password goes into ~/.pgpass or "
            "PGPASSWORD. A SQLite file in the home if not said.",
        ),
    ] = None,
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Make a ledger: its keys, its certificates, an empty book."""
    with Ledger.create(home, issuer=issuer, currency=currency_code, database=database) as ledger:
        key = ledger.ca_keys[0]
        data = {
            "home": str(home),
            "issuer": issuer,
            "currency": ledger.currency.code,
            "ca_key": {"rid": key.rid.hex().upper(), "index": f"{key.index:02X}"},
            "authority_fingerprint": ledger.keys.authority.fingerprint.hex(),
        }
    emit(data, f"Ledger of {issuer} made in {home}. Its keys are there too: guard them.", as_json=as_json)


@app.command()
def migrate(
    to: Annotated[str, typer.Option(help="A version, `head` or `base`; lower ones lose data.")] = "head",
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Bring the ledger's tables to this program's version. Stop every replica first."""
    before, after = Ledger.migrate(home, to)
    data = {"before": before, "after": after}
    emit(data, f"Tables: version {before or 'none'} → {after or 'none'}.", as_json=as_json)


@app.command()
def restored(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Say that the database was restored from a backup. The publications it forgot are replayed from the
    signer's log, and every gateway presents again what it still keeps. Stop every replica first."""
    replayed = Ledger.restored(home)
    data = {
        "snapshots": replayed.snapshots,
        "publications": replayed.publications,
        "unknown_tokens": replayed.unknown_tokens,
    }
    text = f"A new epoch; {replayed.publications} publications of {replayed.snapshots} snapshots replayed."
    emit(data, text, as_json=as_json)


@app.command()
def receive(file: Path, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Take a shop's signed queue from a file (`pos-gateway journal carry`), or a dead till's journal (its
    disk, or a `journal backup`), as if presented over the line. Taking it twice is harmless."""
    counts: Counter[str] = Counter()
    with Ledger.open(home) as ledger:
        if _is_journal(file):
            with opened_copy(file) as journal:
                for records in journal.open_records(MAX_BATCH_RECORDS):
                    verdicts = ledger.present_records(journal.gateway_id, records)
                    counts.update(verdict.verdict.value for verdict in verdicts)
        else:
            with _lines(file) as lines:
                for number, line in enumerate(lines, start=1):
                    batch = SignedBatch.parse(line, where=f"{file} line {number}")
                    verdicts = ledger.present(batch.gateway_id, batch.body, batch.signature)
                    counts.update(verdict.verdict.value for verdict in verdicts)
    told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) or "nothing in it"
    emit({"file": str(file), "verdicts": dict(sorted(counts.items()))}, f"{file}: {told}.", as_json=as_json)


def _is_journal(file: Path) -> bool:
    if file.is_dir():
        return True
    with _lines(file) as lines:
        return next(lines, b"").startswith(_SQLITE)


@contextmanager
def _lines(file: Path) -> Iterator[Iterator[bytes]]:
    try:
        with file.open("rb") as lines:
            yield iter(lambda: lines.readline(MAX_BATCH_BYTES), b"")
    except OSError as error:
        raise Unavailable(f"{file} cannot be read: {error.strerror}") from None


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any free one.")] = DEFAULT_PORT,
    verifiers: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=64,
            help="In how many processes presentments are verified; 0 for none beside this one. One for "
            "each core if not said, none on a single core.",
        ),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Serve /metrics for Prometheus there, plain HTTP; off if not said."
        ),
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Where to serve them.")] = "127.0.0.1",
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Serve gateways until Ctrl-C."""
    if verifiers is None:
        cores = len(os.sched_getaffinity(0))
        verifiers = cores if cores > 1 else 0
    metrics_at = (metrics_host, metrics_port) if metrics_port is not None else None
    with Ledger.open(home, verifiers=verifiers) as ledger:

        def on_ready(bound_port: int) -> None:
            address = f"https://{host}:{bound_port}"
            announce({"address": address}, f"Ledger at {address}. Ctrl-C ends it.", as_json=as_json)

        asyncio.run(serve_ledger(ledger, host, port, on_ready=on_ready, metrics_at=metrics_at))


@app.command()
def show(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """What was presented, what was posted, and whether the books balance."""
    with Ledger.open(home) as ledger:
        ledger.check_books()
        unit, books, alarms = ledger.currency, ledger.trial_balance(), ledger.alarms()
        verdicts = {verdict.value: count for verdict, count in ledger.verdicts().items()}
        accounts, gateways = len(ledger.accounts()), len(ledger.gateways())
        issuer = ledger.identity.issuer
    out_of_balance_minor = sum(books.values())
    data = {
        "issuer": issuer,
        "currency": unit.code,
        "verdicts": verdicts,
        "books_minor": books,
        "out_of_balance_minor": out_of_balance_minor,
        "alarms": [{"kind": a.kind.value, "record_id": a.record_id, "detail": a.detail} for a in alarms],
        "gateways": gateways,
        "accounts": accounts,
    }
    lines = [f"{issuer}: {accounts} accounts, {gateways} gateways."]
    lines += [f"  presented and {verdict}: {count}" for verdict, count in verdicts.items()]
    lines += [f"  {book}: {Money(amount_minor, unit)}" for book, amount_minor in books.items()]
    lines.append(f"  out of balance: {Money(out_of_balance_minor, unit)}; alarms: {len(alarms)}")
    emit(data, "\n".join(lines), as_json=as_json)


@account_app.command("open")
def open_account(
    holder: Annotated[str, typer.Option(help="Who owes what is spent.")],
    limit: Annotated[str, typer.Option(help="Like 3000.00.")],
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Open an account with a credit limit."""
    with Ledger.open(home) as ledger:
        account = ledger.open_account(holder=holder, limit_minor=ledger.currency.parse(limit))
    emit(_account(account), _account_text(account), as_json=as_json)


@account_app.command("show")
def show_account(account_id: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Limit, debt, reserve and tokens of an account."""
    with Ledger.open(home) as ledger:
        account = ledger.account(account_id)
    emit(_account(account), _account_text(account), as_json=as_json)


@account_app.command("list")
def list_accounts(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Every account."""
    with Ledger.open(home) as ledger:
        rows = [_account(account) for account in ledger.accounts()]
    columns = ("id", "holder", "currency", "limit_minor", "outstanding_minor", "reserve_minor", "free_minor")
    emit_rows("accounts", columns, rows, as_json=as_json, empty="No account yet.")


@account_app.command("limit")
def limit_account(
    account_id: str,
    limit: Annotated[str, typer.Argument(help="Like 3000.00; funds in the vault come on top.")],
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Another limit. A cut takes effect as far as nothing owed or reserved needs more, and completes by
    itself."""
    with Ledger.open(home) as ledger:
        account = ledger.set_line(account_id, ledger.currency.parse(limit))
    emit(_account(account), _account_text(account), as_json=as_json)


@token_app.command("issue")
def issue_token(
    account_id: str,
    out: Annotated[
        Path, typer.Option(help="Where the card's personalisation is written: secret, mode 0600.")
    ],
    per_tap_cap: Annotated[str | None, typer.Option(help="Like 500.00; the policy's if not said.")] = None,
    phone: Annotated[bool, typer.Option("--phone", help="A device that verifies its holder.")] = False,
    instalment_class: Annotated[
        int, typer.Option(min=0, max=255, help="It may take offers of up to this class.")
    ] = 0,
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Issue a token: a card's data, keys and certificates. It can pay once the next snapshot is out."""
    if out.exists():
        raise Conflict(f"{out} exists already", advice="a card's keys are never written over another's")
    with Ledger.open(home) as ledger:
        cap_minor = ledger.currency.parse(per_tap_cap) if per_tap_cap else None
        issued = ledger.issue_token(
            account_id,
            per_tap_cap_minor=cap_minor,
            holder_verified_on_device=phone,
            instalment_class=instalment_class,
        )
    _write_secret(out, issued.personalisation.to_json())
    token = issued.token
    data = _token(token) | {"personalisation": str(out)}
    emit(data, f"Token {token.id} (•••• {token.last4}) issued; its card data is in {out}.", as_json=as_json)


@token_app.command("block")
def block_token(token_id: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Block a token. Shops learn of it with the next snapshot."""
    _set_status(token_id, TokenStatus.BLOCKED, home, as_json=as_json)


@token_app.command("unblock")
def unblock_token(token_id: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Lift a block."""
    _set_status(token_id, TokenStatus.ACTIVE, home, as_json=as_json)


@token_app.command("close")
def close_token(token_id: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Close a token for ever. Shops learn of it with the next snapshot, or at once with `snapshot urgent`."""
    _set_status(token_id, TokenStatus.CLOSED, home, as_json=as_json)


@token_app.command("replace")
def replace_token(
    token_id: str,
    out: Annotated[
        Path, typer.Option(help="Where the new card's personalisation is written: secret, mode 0600.")
    ],
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Close a token for ever and issue another one to the same account."""
    if out.exists():
        raise Conflict(f"{out} exists already", advice="a card's keys are never written over another's")
    with Ledger.open(home) as ledger:
        issued = ledger.replace_token(token_id)
    _write_secret(out, issued.personalisation.to_json())
    token = issued.token
    data = _token(token) | {"personalisation": str(out), "replaces": token_id}
    emit(data, f"Token {token.id} (•••• {token.last4}) replaces {token_id}; see {out}.", as_json=as_json)


@snapshot_app.command("urgent")
def publish_urgent(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Take back at once what tokens may not use any more that were blocked or closed since the last
    snapshot. Nothing else changes: no new ceilings, no longer validity. `ledger serve` does it by itself
    when a clone is proven."""
    with Ledger.open(home) as ledger:
        published = ledger.publish_urgent()
    if published is None:
        emit({"version": None}, "There is nothing to take back.", as_json=as_json)
    else:
        _emit_published(published, as_json=as_json)


@snapshot_app.command("prepare")
def prepare_snapshot(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Decide the next limits and build their files, to be signed on other machines."""
    with Ledger.open(home) as ledger:
        prepared = ledger.prepare_snapshot()
    data = {"version": prepared.version, "count": prepared.record_count, "request": str(prepared.request)}
    emit(
        data,
        f"Limits {prepared.version} of {prepared.record_count} tokens are on record and wait to be signed:\n"
        f"  pos-gateway ledger keys sign {prepared.request} --key …\n  pos-gateway ledger snapshot release",
        as_json=as_json,
    )


@snapshot_app.command("release")
def release_snapshot(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Let prepared limits out once enough keys have signed. Says what is still to be signed."""
    with Ledger.open(home) as ledger:
        published = ledger.release_snapshot()
    _emit_published(published, as_json=as_json)


@snapshot_app.command("publish")
def publish_snapshot(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Publish limits for every token, signed: prepare, sign and release in one, if all keys are here."""
    with Ledger.open(home) as ledger:
        published = ledger.publish()
    _emit_published(published, as_json=as_json)


@snapshot_app.command("renew")
def renew_metadata(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Sign anew that the newest limits are the newest. `ledger serve` does it every hour; this is for a
    repository that something else serves."""
    with Ledger.open(home) as ledger:
        ledger.ceremony.renew()
        folder = ledger.repository.folder
    emit({"repository": str(folder)}, f"The metadata in {folder} is signed anew.", as_json=as_json)


def _emit_published(published: PublishedSnapshot, *, as_json: bool) -> None:
    data = {
        "version": published.version,
        "count": published.record_count,
        "size": published.size,
        "path": str(published.path),
        "valid_until_unix_s": published.valid_until_unix_s,
    }
    emit(data, f"Snapshot {published.version} published: {published.record_count} tokens.", as_json=as_json)


@gateway_app.command("invite")
def invite_gateway(
    merchant_id: Annotated[str, typer.Option(help="At most 15 characters.")],
    merchant_name: Annotated[str, typer.Option()],
    category: Annotated[str, typer.Option(help="Merchant category code, ISO 18245.")],
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """A one-time code by which a shop's gateway enrols. It is shown once."""
    try:
        merchant = Merchant(id=merchant_id, name=merchant_name, category=category)
    except ValueError:
        raise InvalidInput(
            "id of at most 15 characters and a category of four digits are needed", where="merchant"
        ) from None
    with Ledger.open(home) as ledger:
        code = ledger.invite(merchant)
    emit({"code": code}, f"Type this at the shop: pos-gateway gateway enroll --code {code}", as_json=as_json)


@gateway_app.command("list")
def list_gateways(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Every enrolled gateway, whether it is let in, and until when its certificate counts."""
    with Ledger.open(home) as ledger:
        rows = [_gateway(gateway) for gateway in ledger.gateways()]
    columns = ("id", "terminal_id", "merchant", "status", "certificate_until")
    emit_rows("gateways", columns, rows, as_json=as_json, empty="No gateway enrolled yet.")


@gateway_app.command("show")
def show_gateway(gateway_id: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """A gateway, and who decided what about it and why."""
    with Ledger.open(home) as ledger:
        _emit_gateway(ledger, ledger.gateway(gateway_id), as_json=as_json)


@gateway_app.command("suspend")
def suspend_gateway(
    gateway_id: str, reason: Reason, by: By = "", home: LedgerHome = LEDGER_HOME, as_json: Json = False
) -> None:
    """Hold all that a gateway presents from now on for review: `ledger review`. It keeps its certificate."""
    _act(gateway_id, Action.SUSPEND, by, reason, home, as_json=as_json)


@gateway_app.command("revoke")
def revoke_gateway(
    gateway_id: str, reason: Reason, by: By = "", home: LedgerHome = LEDGER_HOME, as_json: Json = False
) -> None:
    """Shut a gateway out for good: stolen, copied, given up. In force at once, at every replica."""
    _act(gateway_id, Action.REVOKE, by, reason, home, as_json=as_json)


@gateway_app.command("reinstate")
def reinstate_gateway(
    gateway_id: str, reason: Reason, by: By = "", home: LedgerHome = LEDGER_HOME, as_json: Json = False
) -> None:
    """End a suspension, or let a gateway come back whose certificate expired too long ago."""
    _act(gateway_id, Action.REINSTATE, by, reason, home, as_json=as_json)


@certificate_app.command("show")
def show_certificate(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """The authority that enrolment codes pin, and the server's own certificate under it."""
    with Ledger.open(home) as ledger:
        _emit_certificate(ledger, as_json=as_json)


@certificate_app.command("renew")
def renew_certificate(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Give the server a new key and certificate now. `ledger serve` does it in time by itself, and takes up
    what is renewed here within a minute; no gateway needs to enrol again."""
    with Ledger.open(home) as ledger:
        ledger.renew_tls(now=True)
        _emit_certificate(ledger, as_json=as_json)


def _act(gateway_id: str, action: Action, by: str, reason: str, home: Path, *, as_json: bool) -> None:
    with Ledger.open(home) as ledger:
        gateway = ledger.act_on_gateway(gateway_id, action, by=by or getpass.getuser(), reason=reason)
        _emit_gateway(ledger, gateway, as_json=as_json)


def _gateway(gateway: Gateway) -> dict[str, Any]:
    return {
        "id": gateway.id,
        "terminal_id": gateway.terminal_id,
        "merchant": gateway.merchant.name,
        "status": gateway.status.value,
        "certificate_until": _moment(gateway.certificate_until_unix_ms),
        "last_presented": _moment(gateway.last_presented_unix_ms),
    }


def _emit_gateway(ledger: Ledger, gateway: Gateway, *, as_json: bool) -> None:
    history = [
        {"action": a.action.value, "by": a.by, "reason": a.reason, "at": _moment(a.at_unix_ms)}
        for a in ledger.gateway_actions(gateway.id)
    ]
    data = _gateway(gateway)
    lines = [
        f"Gateway {gateway.id}, terminal {gateway.terminal_id} of {gateway.merchant.name}: {data['status']}",
        f"  certificate until {data['certificate_until'] or 'none that counts'}, "
        f"last presented {data['last_presented'] or 'never'}",
    ]
    lines += [f"  {h['at']} {h['action']} by {h['by']}: {h['reason']}" for h in history]
    emit(data | {"history": history}, "\n".join(lines), as_json=as_json)


def _emit_certificate(ledger: Ledger, *, as_json: bool) -> None:
    authority, server = ledger.keys.authority, ledger.keys.tls_certificate
    data = {
        "authority_fingerprint": authority.fingerprint.hex(),
        "authority_until": authority.certificate.not_valid_after_utc.isoformat(),
        "server_until": server.not_valid_after_utc.isoformat(),
    }
    emit(
        data,
        f"Authority {data['authority_fingerprint']}\n  valid until {data['authority_until']}; "
        f"the server's certificate under it until {data['server_until']}",
        as_json=as_json,
    )


def _moment(unix_ms: int | None) -> str | None:
    return datetime.fromtimestamp(unix_ms // 1000, UTC).isoformat() if unix_ms else None


def _set_status(token_id: str, status: TokenStatus, home: Path, *, as_json: bool) -> None:
    with Ledger.open(home) as ledger:
        token = ledger.set_token_status(token_id, status)
    emit(_token(token), f"Token {token.id} is {token.status.value}.", as_json=as_json)


def _token(token: Token) -> dict[str, Any]:
    return {
        "id": token.id,
        "account_id": token.account_id,
        "last4": token.last4,
        "expires": token.expires.isoformat(),
        "status": token.status.value,
        "per_tap_cap_minor": token.per_tap_cap_minor,
        "highest_counter": token.highest_counter,
        "ceiling": token.ceiling,
        "reserve_minor": token.reserve_minor,
    }


def _account(account: Account) -> dict[str, Any]:
    return {
        "id": account.id,
        "holder": account.holder,
        "currency": account.currency,
        "limit_minor": account.limit_minor,
        "target_limit_minor": account.target_limit_minor,
        "outstanding_minor": account.outstanding_minor,
        "uncleared_minor": account.uncleared_minor,
        "vault_minor": account.vault_minor,
        "vault_leaving_minor": account.vault_leaving_minor,
        "reserve_minor": account.reserve_minor,
        "free_minor": account.free_minor,
        "tokens": [_token(token) for token in account.tokens],
    }


def _account_text(account: Account) -> str:
    unit: Currency = currency(account.currency)
    lines = [
        f"Account {account.id} of {account.holder}",
        f"  limit {Money(account.limit_minor, unit)}, owed {Money(account.outstanding_minor, unit)}, "
        f"reserved for shops off the network {Money(account.reserve_minor, unit)}, "
        f"free {Money(account.free_minor, unit)}",
    ]
    if account.limit_minor != account.target_limit_minor:
        lines.append(f"  the limit is on its way down to {Money(account.target_limit_minor, unit)}")
    if account.uncleared_minor:
        lines.append(f"  paid, and may still be taken back: {Money(account.uncleared_minor, unit)}")
    if account.vault_minor:
        lines.append(
            f"  in the vault {Money(account.vault_minor, unit)}, of which "
            f"{Money(account.vault_leaving_minor, unit)} wait to leave"
        )
    lines += [f"  token {t.id} •••• {t.last4}, {t.status.value}" for t in account.tokens]
    return "\n".join(lines)


def _write_secret(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
