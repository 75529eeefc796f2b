"""An account's money as the reserve principle sees it, pure: what is owed, what may come back, and the limit
in force with what it is to come down to.

    limit in force = line + vault        outstanding + uncleared + reserve ≤ limit in force

A line goes up at once. It comes down, and funds leave the vault, as far as nothing owed or reserved needs
them; the rest waits and completes by itself. Amounts in minor units, none negative, unless said.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pos_gateway.errors import Conflict, InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """`outstanding_minor` is below zero when more was paid back than was owed."""

    limit_minor: int
    target_line_minor: int
    vault_minor: int = 0
    vault_leaving_minor: int = 0
    outstanding_minor: int = 0
    uncleared_minor: int = 0

    @property
    def line_minor(self) -> int:
        """What is lent without funds behind it, in force."""
        return self.limit_minor - self.vault_minor

    @property
    def target_limit_minor(self) -> int:
        """What the limit comes down to once nothing needs more."""
        return self.target_line_minor + self.vault_minor - self.vault_leaving_minor

    def committed_minor(self, reserve_minor: int) -> int:
        """The left side of the invariant."""
        return self.outstanding_minor + self.uncleared_minor + reserve_minor

    def free_minor(self, reserve_minor: int) -> int:
        """What may be given out anew: within the target already, though more may be in force; below zero
        while a cut is not complete."""
        return min(self.limit_minor, self.target_limit_minor) - self.committed_minor(reserve_minor)

    def owe(self, amount_minor: int) -> Balance:
        """A payment was posted; below zero what a void or refund gives back."""
        return replace(self, outstanding_minor=self.outstanding_minor + amount_minor)

    def repaid(self, amount_minor: int) -> Balance:
        """Money came in that its payer's bank may still take back: it pays, and frees nothing yet."""
        return replace(
            self,
            outstanding_minor=self.outstanding_minor - amount_minor,
            uncleared_minor=self.uncleared_minor + amount_minor,
        )

    def cleared(self, amount_minor: int) -> Balance:
        """Money that came in is here to stay."""
        return replace(self, uncleared_minor=self.uncleared_minor - amount_minor)

    def bounced(self, amount_minor: int) -> Balance:
        """A repayment was taken back: it is owed again. What was committed stays the same."""
        return replace(
            self,
            outstanding_minor=self.outstanding_minor + amount_minor,
            uncleared_minor=self.uncleared_minor - amount_minor,
        )

    def locked(self, amount_minor: int) -> Balance:
        """Funds went into the vault: they raise the limit, and buy nothing before they are here to stay."""
        return replace(
            self,
            limit_minor=self.limit_minor + amount_minor,
            vault_minor=self.vault_minor + amount_minor,
            uncleared_minor=self.uncleared_minor + amount_minor,
        )

    def lock_bounced(self, amount_minor: int) -> Balance:
        """Funds for the vault were taken back, and the limit they gave with them."""
        vault_minor = self.vault_minor - amount_minor
        return replace(
            self,
            limit_minor=self.limit_minor - amount_minor,
            vault_minor=vault_minor,
            vault_leaving_minor=min(self.vault_leaving_minor, vault_minor),
            uncleared_minor=self.uncleared_minor - amount_minor,
        )

    def vault_pays(self, amount_minor: int) -> Balance:
        """Funds in the vault paid what was owed: debt and limit fall together."""
        vault_minor = self.vault_minor - amount_minor
        return replace(
            self,
            limit_minor=self.limit_minor - amount_minor,
            vault_minor=vault_minor,
            vault_leaving_minor=min(self.vault_leaving_minor, vault_minor),
            outstanding_minor=self.outstanding_minor - amount_minor,
        )

    def with_line(self, line_minor: int) -> Balance:
        """Another line: more at once, less as far as `complete` may go.

        Raises:
            InvalidInput: below zero.
        """
        if line_minor < 0:
            raise InvalidInput("a limit cannot be negative", where="limit")
        raised_minor = max(line_minor - self.line_minor, 0)
        return replace(self, target_line_minor=line_minor, limit_minor=self.limit_minor + raised_minor)

    def unlock(self, amount_minor: int) -> Balance:
        """Funds are asked back from the vault; `complete` pays them out.

        Raises:
            Conflict: more than lies there and is not asked back already.
        """
        if amount_minor > self.vault_minor - self.vault_leaving_minor:
            raise Conflict("the vault does not hold that much", advice="ask for less")
        return replace(self, vault_leaving_minor=self.vault_leaving_minor + amount_minor)

    def complete(self, *, reserve_minor: int, vault_uncleared_minor: int = 0) -> tuple[Balance, int]:
        """Take the limit down as far as nothing owed or reserved needs it: the line first, then the vault.
        Funds that may still be taken back do not leave.

        Returns the balance, and how much is paid out of the vault now.
        """
        room_minor = max(self.limit_minor - self.committed_minor(reserve_minor), 0)
        cut_minor = min(max(self.line_minor - self.target_line_minor, 0), room_minor)
        paid_minor = min(
            self.vault_leaving_minor,
            room_minor - cut_minor,
            max(self.vault_minor - vault_uncleared_minor, 0),
        )
        return (
            replace(
                self,
                limit_minor=self.limit_minor - cut_minor - paid_minor,
                vault_minor=self.vault_minor - paid_minor,
                vault_leaving_minor=self.vault_leaving_minor - paid_minor,
            ),
            paid_minor,
        )
