"""What money comes in for, and how far it has come."""

from __future__ import annotations

from enum import Enum

import sqlalchemy as sa

from pos_gateway.ledger import store


class Purpose(Enum):
    """What money came in for, or was asked back from."""

    REPAYMENT = "repayment"
    VAULT_LOCK = "vault_lock"
    VAULT_UNLOCK = "vault_unlock"


class State(Enum):
    """How far a movement has come."""

    UNCLEARED = "uncleared"
    """It may still be taken back."""
    FINAL = "final"
    BOUNCED = "bounced"
    """It was taken back."""
    ASKED = "asked"
    """Out of the vault: paid out as far as nothing owed or reserved needs it, the rest by itself later."""


def vault_uncleared_minor(connection: sa.Connection, account_id: str) -> int:
    """What of the vault may still be taken back."""
    query = sa.select(sa.func.coalesce(sa.func.sum(store.movements.c.amount_minor), 0)).filter_by(
        account_id=account_id, purpose=Purpose.VAULT_LOCK.value, state=State.UNCLEARED.value
    )
    return int(connection.execute(query).scalar_one())
