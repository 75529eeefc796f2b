"""What the issuer's people do about credit: close and look at bills, spread and end plans, lend, evaluate,
give up. Each is one durable transaction that holds the account.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Final, TypeVar

import sqlalchemy as sa

from pos_gateway.errors import Conflict, InvalidInput, NotFound
from pos_gateway.instalments import Offer, Quote, quote
from pos_gateway.ledger import movements, store
from pos_gateway.ledger.accounts import LockedAccount, lock_account
from pos_gateway.ledger.audit import Audit, audit
from pos_gateway.ledger.billing import BATCH_ACCOUNTS, newest_policy
from pos_gateway.ledger.billing_run import Progress, close_everything
from pos_gateway.ledger.books import ISSUER, LOANS, MERCHANT_FEES, PAYABLE, book
from pos_gateway.ledger.credit.plans import Settlement
from pos_gateway.ledger.credit.scorecard import Evaluation, Scorecard, evaluate
from pos_gateway.ledger.credit.terms import CreditTerms
from pos_gateway.ledger.credit_books import Desk
from pos_gateway.ledger.features import features_of
from pos_gateway.ledger.movements import Movement
from pos_gateway.ledger.plans import PlanKind, plan_rows
from pos_gateway.ledger.purposes import Purpose
from pos_gateway.ledger.statements import Bill, Statement, bills_of, statement
from pos_gateway.ledger.store import Store
from pos_gateway.records import canonical_json

_T = TypeVar("_T")

BUCKETS: Final = (0, 30, 60, 90)
"""More than so many days overdue: the arrears bucket has the last bound that holds."""


@dataclass(frozen=True, slots=True)
class PlanShown:
    """One plan. `left_minor`: what it was made for, less refunds; `ahead_minor`: what no bill has taken."""

    id: uuid.UUID
    kind: PlanKind
    offer_id: str
    periods: int
    principal_minor: int
    left_minor: int
    ahead_minor: int
    next_number: int


@dataclass(frozen=True, slots=True)
class Arrears:
    """How late an account is: the days of what is due the longest, and what is overdue in all."""

    days: int
    bucket: str
    overdue_minor: int


class CreditDesk:
    """`now_unix_ms` is the ledger's clock."""

    def __init__(self, database: Store, now_unix_ms: Callable[[], int]) -> None:
        self._database = database
        self._now_unix_ms = now_unix_ms

    def close_bills(
        self,
        *,
        batch_accounts: int = BATCH_ACCOUNTS,
        progress: Callable[[Progress], object] = lambda batch: None,
    ) -> int:
        """Close every cycle that is over; see `billing_run`."""
        return close_everything(
            self._database, self._now_unix_ms(), batch_accounts=batch_accounts, progress=progress
        )

    def audit(self, progress: Callable[[int], object] = lambda accounts: None) -> Audit:
        """Derive every balance and bill a second time; see `audit`."""
        return audit(self._database, progress)

    def bills(self, account_id: str) -> tuple[Bill, ...]:
        """Oldest first."""
        with self._database.read() as connection:
            return bills_of(connection, account_id)

    def statement(self, account_id: str, closing: date | None = None) -> Statement:
        """The bill that closed that day, by default the last, with all that happened in its cycle.

        Raises:
            NotFound: there is none.
        """
        with self._database.read() as connection:
            return statement(connection, account_id, closing)

    def plans(self, account_id: str) -> tuple[PlanShown, ...]:
        """Oldest first."""
        query = sa.select(store.plans).filter_by(account_id=account_id)
        with self._database.read() as connection:
            return tuple(
                PlanShown(
                    id=row.id,
                    kind=PlanKind(row.kind),
                    offer_id=json.loads(row.offer)["id"],
                    periods=row.periods,
                    principal_minor=row.principal_minor,
                    left_minor=row.left_minor,
                    ahead_minor=row.ahead_minor,
                    next_number=row.next_number,
                )
                for row in connection.execute(query.order_by(store.plans.c.made_unix_ms, store.plans.c.id))
            )

    def settle_plan(
        self, account_id: str, plan_id: uuid.UUID, *, reference: str
    ) -> tuple[Settlement, Movement]:
        """End a plan early with a repayment of just what that takes; it goes to the plan before all else.

        Raises:
            NotFound: no such account or plan.
            InvalidInput: every instalment has been billed.
            Conflict: the reference stands for something else.
        """

        def work(desk: Desk) -> tuple[Settlement, Movement]:
            if any(m.reference == reference for m in movements.movements_of(desk.connection, account_id)):
                raise Conflict(f"reference {reference} stands for another movement of this account")
            settlement, items = desk.settle_plan(plan_id)
            movement = movements.receive(
                desk.connection,
                desk.account,
                purpose=Purpose.REPAYMENT,
                reference=reference,
                amount_minor=settlement.total_minor,
                now_unix_ms=desk.now_unix_ms,
                first=items,
            )
            return settlement, movement

        return self._at(account_id, work)

    def spread_bill(self, account_id: str, offer_id: str, amount_minor: int, periods: int) -> uuid.UUID:
        """Purchases on the last bill that are not due yet are repaid by a plan from now on.

        Raises:
            NotFound: no such account or offer.
            InvalidInput: the offer does not hold for it.
            Conflict: the bill holds less of purchases.
        """

        def work(desk: Desk) -> uuid.UUID:
            items, _ = desk.spreadable(overdue=False)
            quoted = quote(_offer(desk.connection, offer_id), amount_minor, periods)
            return desk.spread(PlanKind.BILL, quoted, items)

        return self._at(account_id, work)

    def relieve(self, account_id: str, offer_id: str, periods: int, *, waive: bool) -> uuid.UUID:
        """A hardship plan: all billed principal is repaid by it, and bears neither interest nor overdue fees
        beyond the offer's; with `waive`, the charges owed so far are given up.

        Raises:
            NotFound: no such account or offer.
            InvalidInput: the offer does not hold for it.
            Conflict: nothing is owed on bills.
        """

        def work(desk: Desk) -> uuid.UUID:
            items, amount_minor = desk.spreadable(overdue=True)
            if not amount_minor:
                raise Conflict("no principal stands on its bills")
            if waive:
                desk.waive()
            return desk.spread(
                PlanKind.HARDSHIP, quote(_offer(desk.connection, offer_id), amount_minor, periods), items
            )

        return self._at(account_id, work)

    def waive(self, account_id: str) -> int:
        """Give up all charges that are owed; how much."""
        return self._at(account_id, lambda desk: desk.waive())

    def write_off(self, account_id: str) -> int:
        """Give up everything that is owed, and lend no more; how much. What is repaid later is a recovery."""

        def work(desk: Desk) -> int:
            lost_minor = desk.write_off()
            movements.complete(desk.connection, desk.account, desk.now_unix_ms)
            return lost_minor

        return self._at(account_id, work)

    def arrears(self, account_id: str) -> Arrears:
        """How late the account is, by its own day."""

        def work(desk: Desk) -> Arrears:
            days = desk.days_overdue()
            bound = max((b for b in BUCKETS if days > b), default=None)
            overdue_minor = sum(i.owed_minor for i in desk.items() if i.is_overdue(desk.day))
            bucket = "current" if bound is None else f"{bound + 1}+"
            return Arrears(days, bucket, overdue_minor if days else 0)

        return self._at(account_id, work)

    def add_scorecard(self, card: Scorecard) -> None:
        """
        Raises:
            Conflict: this version stands for another card.
        """
        with self._database.write() as connection:
            columns = store.scorecards.c
            body = connection.scalar(sa.select(columns.body).where(columns.version == card.version))
            if body is None:
                connection.execute(
                    store.scorecards.insert().values(
                        version=card.version, body=card.model_dump_json(), since_unix_ms=self._now_unix_ms()
                    )
                )
            elif Scorecard.model_validate_json(body) != card:
                raise Conflict(f"scorecard {card.version} is another one", advice="give it a new version")

    def evaluate(self, account_id: str, imported: Mapping[str, int] = {}) -> Evaluation:
        """By the newest scorecard, the ledger's own history and what is imported; kept with its features.

        Raises:
            NotFound: no such account, or no scorecard.
            InvalidInput: an imported feature that the scorecard does not name.
        """
        return self._at(account_id, lambda desk: _evaluate(desk, imported))

    def upgrade(self, account_id: str, imported: Mapping[str, int] = {}) -> Evaluation:
        """If the evaluation allows it: a general line, and the vault's funds are asked back; they leave as
        soon as nothing owed or reserved needs them, and the limit stays.

        Raises:
            NotFound, InvalidInput: see `evaluate`.
            Conflict: the evaluation does not allow it; says why, in the customer's words.
        """

        def work(desk: Desk) -> Evaluation:
            found = _evaluate(desk, imported)
            if not found.upgrades:
                return found
            cap_minor = desk.terms.exposure_cap_minor - _lent_minor(desk)
            line_minor = max(min(found.limit_minor, cap_minor), 0)
            movements.set_line(desk.connection, desk.account, line_minor, desk.now_unix_ms)
            balance = desk.account.balance
            asked_minor = balance.vault_minor - balance.vault_leaving_minor
            if asked_minor:
                movements.receive(
                    desk.connection,
                    desk.account,
                    purpose=Purpose.VAULT_UNLOCK,
                    reference=f"upgrade {uuid.uuid4()}",
                    amount_minor=asked_minor,
                    now_unix_ms=desk.now_unix_ms,
                )
            return found

        found = self._at(account_id, work)
        if not found.upgrades:
            why = " ".join(reason.english for reason in found.reasons)
            raise Conflict(f"the evaluation does not allow it: {found.points} points. {why}".strip())
        return found

    def downgrade(self, account_id: str) -> None:
        """No line any more, as far as nothing owed or reserved needs it: the vault alone gives the limit."""
        self._at(
            account_id, lambda desk: movements.set_line(desk.connection, desk.account, 0, desk.now_unix_ms)
        )

    def approve_loans(self, account_id: str, imported: Mapping[str, int] = {}) -> Evaluation:
        """What loans of this account may come to together is what the evaluation gives."""

        def work(desk: Desk) -> Evaluation:
            found = _evaluate(desk, imported)
            desk.connection.execute(
                store.accounts.update().filter_by(id=account_id).values(loan_limit_minor=found.limit_minor)
            )
            return found

        return self._at(account_id, work)

    def lend(
        self,
        account_id: str,
        *,
        scene: str,
        purpose: str,
        merchant_id: str,
        amount_minor: int,
        offer_id: str,
        periods: int,
        reference: str,
    ) -> uuid.UUID:
        """A loan for one purpose, paid out to the merchant. The same reference again is the same loan.

        Raises:
            NotFound: no such account, scene, merchant or offer.
            InvalidInput: the scene or offer does not take that much, or not of this merchant.
            Conflict: it would go beyond the account's loan limit or exposure, or the reference stands for
                another loan.
        """

        def work(desk: Desk) -> uuid.UUID:
            known = desk.connection.execute(
                sa.select(store.loans, store.plans.c.principal_minor)
                .join(
                    store.plans,
                    sa.and_(
                        store.plans.c.account_id == store.loans.c.account_id,
                        store.plans.c.id == store.loans.c.id,
                    ),
                )
                .where(store.loans.c.account_id == account_id, store.loans.c.reference == reference)
            ).first()
            if known is not None:
                told = (scene, merchant_id, amount_minor)
                if (known.scene, known.merchant_id, known.principal_minor) != told:
                    raise Conflict(f"reference {reference} stands for another loan of this account")
                found: uuid.UUID = known.id
                return found
            quoted = _loan_quote(desk, scene, merchant_id, amount_minor, offer_id, periods)
            return _pay_out(desk, quoted, scene, purpose, merchant_id, reference)

        return self._at(account_id, work)

    def funds_leave_on(self, account_id: str) -> date | None:
        """By when funds that are asked back have left the vault at the latest if nothing is bought meanwhile;
        None while what is owed needs them."""

        def work(desk: Desk) -> date | None:
            balance = desk.account.balance
            if balance.outstanding_minor + balance.uncleared_minor > balance.target_limit_minor:
                return None
            stands = [p.stands_until_unix_s for line in desk.account.lines for p in line.publications]
            latest_s = max([desk.now_unix_ms // 1000, *stands])
            return datetime.fromtimestamp(latest_s, UTC).date()

        return self._at(account_id, work)

    def _at(self, account_id: str, work: Callable[[Desk], _T]) -> _T:
        def locked(connection: sa.Connection) -> _T:
            now_unix_ms = self._now_unix_ms()
            account: LockedAccount = lock_account(connection, account_id, now_unix_ms // 1000)
            return work(Desk.open(connection, account, now_unix_ms))

        return self._database.transact(locked)


def _evaluate(desk: Desk, imported: Mapping[str, int]) -> Evaluation:
    columns = store.scorecards.c
    body = desk.connection.scalar(sa.select(columns.body).order_by(columns.version.desc()).limit(1))
    if body is None:
        raise NotFound("there is no scorecard", advice="`pos-gateway ledger scorecard add FILE`")
    card = Scorecard.model_validate_json(body)
    wanted = {characteristic.feature for characteristic in card.characteristics}
    own = features_of(desk.connection, desk.account, desk.day)
    features: dict[str, int | None] = {name: value for name, value in own.items() if name in wanted}
    found = evaluate(card, features | dict(imported))
    desk.connection.execute(
        store.evaluations.insert().values(
            account_id=desk.account.id,
            id=uuid.uuid4(),
            scorecard_version=found.version,
            features=canonical_json(features | dict(imported)),
            points=found.points,
            limit_minor=found.limit_minor,
            upgrades=found.upgrades,
            reasons=canonical_json({"features": [reason.feature for reason in found.reasons]}),
            evaluated_unix_ms=desk.now_unix_ms,
        )
    )
    return found


def _lent_minor(desk: Desk) -> int:
    entries = store.entries.c
    query = sa.select(sa.func.coalesce(sa.func.sum(entries.amount_minor), 0)).where(
        entries.book == LOANS, entries.owner_id == desk.account.id, entries.account_id == desk.account.id
    )
    return int(desk.connection.execute(query).scalar_one())


def _loan_quote(
    desk: Desk, scene: str, merchant_id: str, amount_minor: int, offer_id: str, periods: int
) -> Quote:
    rules = desk.terms.scenes.get(scene)
    if rules is None:
        raise NotFound(f"there are no loans for {scene[:16]!r}")
    category = desk.connection.scalar(sa.select(store.merchants.c.category).filter_by(id=merchant_id))
    if category is None:
        raise NotFound(f"there is no merchant {merchant_id}")
    if category not in rules.categories:
        raise InvalidInput(f"no loans for {scene} are paid out to category {category}", where="merchant")
    if offer_id not in rules.offers:
        raise InvalidInput(f"not one for {scene}", where="offer", advice=f"one of {', '.join(rules.offers)}")
    if amount_minor > rules.max_amount_minor:
        raise InvalidInput(
            f"loans for {scene} are up to {rules.max_amount_minor} minor units", where="amount"
        )
    _check_exposure(desk, amount_minor, desk.terms)
    return quote(_offer(desk.connection, offer_id), amount_minor, periods)


def _check_exposure(desk: Desk, amount_minor: int, terms: CreditTerms) -> None:
    lent_minor = _lent_minor(desk)
    limit_minor = desk.connection.scalar(
        sa.select(store.accounts.c.loan_limit_minor).filter_by(id=desk.account.id)
    )
    if lent_minor + amount_minor > int(limit_minor or 0):
        raise Conflict("beyond what loans of this account may come to", advice="`ledger loan approve`")
    if desk.account.balance.limit_minor + lent_minor + amount_minor > terms.exposure_cap_minor:
        raise Conflict("limit and loans together would be beyond the exposure cap")


def _pay_out(
    desk: Desk, quoted: Quote, scene: str, purpose: str, merchant_id: str, reference: str
) -> uuid.UUID:
    loan_id = uuid.uuid4()
    plan, instalments = plan_rows(
        desk.account.id, loan_id, PlanKind.LOAN, quoted, desk.now_unix_ms, merchant_id=merchant_id
    )
    desk.connection.execute(store.plans.insert().values(plan))
    desk.connection.execute(store.plan_instalments.insert(), instalments)
    desk.connection.execute(
        store.loans.insert().values(
            account_id=desk.account.id,
            id=loan_id,
            scene=scene,
            purpose=purpose,
            merchant_id=merchant_id,
            reference=reference,
        )
    )
    for kind, debit, credit, amount_minor in (
        ("loan", (LOANS, desk.account.id), (PAYABLE, merchant_id), quoted.principal_minor),
        ("merchant_fee", (PAYABLE, merchant_id), (MERCHANT_FEES, ISSUER), quoted.merchant_fee_minor),
    ):
        if amount_minor:
            book(
                desk.connection,
                desk.account,
                kind=kind,
                debit=debit,
                credit=credit,
                amount_minor=amount_minor,
                now_unix_ms=desk.now_unix_ms,
                reference=reference,
            )
    return loan_id


def _offer(connection: sa.Connection, offer_id: str) -> Offer:
    _, policy = newest_policy(connection)
    for offer in policy.offers:
        if offer.id == offer_id:
            return offer
    raise NotFound(f"there is no offer {offer_id} in the policy in force")
