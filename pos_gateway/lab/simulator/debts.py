"""The omniscient onlooker: what each customer really owes at every moment, and what each shop is owed.

It never asks a ledger what is owed. A purchase counts from the moment the goods are handed over, whether
or not anybody but the shop knows of it yet.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class Debt:
    """One account. `allowed_minor`: the limit; after a cut, what was owed then, until less is owed."""

    limit_minor: int
    owed_minor: int
    allowed_minor: int
    uncleared_minor: int = 0
    worst_over_minor: int = 0

    @property
    def over_minor(self) -> int:
        return max(self.owed_minor - self.allowed_minor, 0)

    def room_minor(self) -> int:
        """What an issuer who knows everything at once would still let through."""
        return self.limit_minor - self.owed_minor - self.uncleared_minor


class Debts:
    """All accounts of one system. Amounts in minor units."""

    def __init__(self, *, cuts_by_themselves: bool = True) -> None:
        """After a cut nobody is blamed for what was owed then; with `cuts_by_themselves` the rest follows
        what is owed, else whoever calls `limit_is` says how far the cut has come."""
        self._cuts_by_themselves = cuts_by_themselves
        self._accounts: dict[int, Debt] = {}
        self._open: dict[Hashable, tuple[int, int]] = {}
        self._repayments: dict[int, int] = {}
        self.over_now_minor = 0

    def open(self, account: int, limit_minor: int, owed_minor: int) -> None:
        self._accounts[account] = Debt(limit_minor, owed_minor, limit_minor)

    def of(self, account: int) -> Debt:
        return self._accounts[account]

    def room_minor(self, account: int) -> int:
        return self._accounts[account].room_minor()

    def buys(self, account: int, amount_minor: int, key: Hashable = None) -> None:
        """Goods for it are handed over. `key`: to take it back by."""
        if key is not None:
            self._open[key] = (account, amount_minor)
        self._owe(account, amount_minor)

    def knows(self, key: Hashable) -> bool:
        return key in self._open

    def released(self, key: Hashable) -> None:
        """Nobody can ask the customer for it any more."""
        account, amount_minor = self._open.pop(key)
        self._owe(account, -amount_minor)

    def repays(self, account: int, reference: int, amount_minor: int, *, final: bool) -> None:
        if not final:
            self._repayments[reference] = amount_minor
            self._accounts[account].uncleared_minor += amount_minor
        self._owe(account, -amount_minor)

    def repayment_final(self, account: int, reference: int, *, bounces: bool) -> int:
        """How much it was; 0 if there was none."""
        amount_minor = self._repayments.pop(reference, 0)
        self._accounts[account].uncleared_minor -= amount_minor
        if bounces:
            self._owe(account, amount_minor)
        return amount_minor

    def limit_is(self, account: int, limit_minor: int, allowed_minor: int | None = None) -> None:
        """`allowed_minor`: where a cut is known to take effect step by step."""
        debt = self._accounts[account]
        debt.limit_minor = limit_minor
        debt.allowed_minor = max(limit_minor, debt.owed_minor) if allowed_minor is None else allowed_minor
        self._owe(account, 0)

    def totals(self) -> tuple[int, int]:
        """(worst overshoots of all accounts together, how many accounts had one)."""
        worst = [debt.worst_over_minor for debt in self._accounts.values()]
        return sum(worst), sum(1 for over_minor in worst if over_minor)

    def _owe(self, account: int, amount_minor: int) -> None:
        debt = self._accounts[account]
        self.over_now_minor -= debt.over_minor
        debt.owed_minor += amount_minor
        if self._cuts_by_themselves and debt.allowed_minor > debt.limit_minor:
            debt.allowed_minor = max(debt.limit_minor, min(debt.allowed_minor, debt.owed_minor))
        self.over_now_minor += debt.over_minor
        debt.worst_over_minor = max(debt.worst_over_minor, debt.over_minor)
