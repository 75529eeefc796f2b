"""What credit costs and how it is repaid, as data: an issuer's decision, versioned with its policy.

Rates are parts per million, spans days, amounts minor units. `order` says which part of what is due a
repayment reduces first; once something is more than `late_after_days` overdue, `late_order` does.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_PPM: Final = 1_000_000


class Part(Enum):
    """What a debt consists of. Principal alone counts against the limit."""

    OVERDUE_FEE = "overdue_fee"
    INTEREST = "interest"
    INSTALMENT_FEE = "instalment_fee"
    PRINCIPAL = "principal"


def _every_part(order: tuple[Part, ...]) -> tuple[Part, ...]:
    if sorted(part.value for part in order) != sorted(part.value for part in Part):
        raise ValueError("must name every part of a debt once")
    return order


Order = Annotated[tuple[Part, ...], AfterValidator(_every_part)]


class Scene(BaseModel):
    """What loans of one scene are for, which merchants are paid (ISO 18245), under which of the offers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    categories: tuple[str, ...] = Field(min_length=1)
    offers: tuple[str, ...] = Field(min_length=1)
    max_amount_minor: int = Field(gt=0)


class CreditTerms(BaseModel):
    """See the module. The defaults are a neutral example, nobody's law."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    closing_day: int = Field(default=5, ge=1, le=31)
    due_after_days: int = Field(default=20, ge=1, le=27)

    minimum_share_ppm: int = Field(default=100_000, ge=0, le=_PPM)
    """Of the revolving principal on a bill; instalments, interest, fees and arrears are due in whole."""
    minimum_floor_minor: int = Field(default=1_000, ge=0)

    interest_per_day_ppm: int = Field(default=350, ge=0, le=10_000)
    """On billed principal from the day after its due date."""
    overdue_fee_per_day_ppm: int = Field(default=500, ge=0, le=10_000)
    """On what was due at least and was not paid."""
    overdue_fee_cap_ppm: int = Field(default=50_000, ge=0, le=_PPM)
    """No bill's overdue fees go beyond this part of what was due at least on it."""

    order: Order = (Part.OVERDUE_FEE, Part.INTEREST, Part.INSTALMENT_FEE, Part.PRINCIPAL)
    late_after_days: int = Field(default=90, ge=1)
    late_order: Order = (Part.PRINCIPAL, Part.INTEREST, Part.INSTALMENT_FEE, Part.OVERDUE_FEE)

    time_zone: str = "Asia/Shanghai"
    """Of accounts that are opened without one."""
    annual_cost_cap_ppm: int = Field(default=360_000, ge=0)
    """No offer's annual percentage rate goes beyond it."""
    early_repayment_charges_current_period: bool = False
    vault_pays_after_days: int = Field(default=30, ge=1)
    """Funds in the vault pay principal that is so many days overdue."""
    exposure_cap_minor: int = Field(default=20_000_000, ge=0)
    """Limit and loans of one account together."""
    scenes: dict[Annotated[str, Field(pattern=r"^[a-z]{1,16}$")], Scene] = {}
