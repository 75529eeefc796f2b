"""What a ledger is (fixed at its creation) and what its issuer decides (policy, may change)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Final, Literal

import sqlalchemy as sa
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from pos_gateway.errors import InvalidConfiguration, InvalidInput
from pos_gateway.instalments import PERIODS_A_YEAR, Offer, rate_per_period, schedule
from pos_gateway.ledger import store
from pos_gateway.ledger.allowance import AllowancePolicy
from pos_gateway.ledger.certificates import SignedKey
from pos_gateway.ledger.credit.calendar import zone
from pos_gateway.ledger.credit.terms import CreditTerms
from pos_gateway.ledger.reserve import Guarantee
from pos_gateway.ledger.use import UsePolicy
from pos_gateway.limits.header import OnlineTerms, RiskPolicy

_DAY_S: Final = 24 * 3600
_SAMPLE_MINOR: Final = 1_000_000_000


class Identity(BaseModel):
    """`ledger.json`: who issues, in which currency, and the issuer's public certificate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    issuer: str = Field(min_length=1, max_length=64)
    currency: str = Field(pattern=r"^[A-Z]{3}$")
    country_numeric: int = Field(ge=1, le=999)
    ca_expires: date
    issuer_expires: date
    issuer_certificate_hex: str = Field(pattern=r"^([0-9a-f]{2})+$")
    issuer_remainder_hex: str = Field(pattern=r"^([0-9a-f]{2})*$")
    database: str | None = None
    """PostgreSQL URL without a password; the file in the home if there is none."""

    @property
    def issuer_certificate(self) -> SignedKey:
        return SignedKey(bytes.fromhex(self.issuer_certificate_hex), bytes.fromhex(self.issuer_remainder_hex))

    @classmethod
    def load(cls, path: Path) -> Identity:
        """
        Raises:
            InvalidConfiguration: no such file, or a field in it is wrong.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InvalidConfiguration(
                f"no ledger here ({error.strerror})",
                where=str(path.parent),
                advice="create one with `pos-gateway ledger init`",
            ) from None
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InvalidConfiguration(first["msg"], where=f"{path}, field {place or 'root'}") from None


class MetadataLives(BaseModel):
    """How long each kind of TUF metadata is valid, in seconds.

    `timestamp_s` is also how old a stick may be that brings limits to a shop, and how long somebody who
    answers for the server can keep newer limits back unnoticed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    root_s: int = Field(default=2 * 366 * _DAY_S, gt=0)
    targets_s: int = Field(default=90 * _DAY_S, gt=0)
    snapshot_s: int = Field(default=14 * _DAY_S, gt=0)
    timestamp_s: int = Field(default=2 * _DAY_S, gt=0)


class OnlinePolicy(BaseModel):
    """What grants and notes may do. The first four stand in the limits' headers, signed by limit keys.

    `note_room_percent`: how much of an account's free credit one note may bring within reach.
    `grant_room_percent`: the same for a grant, beside the amount that it was asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_tap_cap_minor: int = Field(default=100_000, ge=0, lt=1 << 32)
    grant_life_s: int = Field(default=300, ge=0, lt=1 << 32)
    note_life_s: int = Field(default=3 * _DAY_S, ge=0, lt=1 << 32)
    unsynchronised_amount_cap_minor: int = Field(default=5_000_000, ge=0, lt=1 << 53)
    note_room_percent: int = Field(default=50, ge=0, le=100)
    grant_room_percent: int = Field(default=0, ge=0, le=100)

    def terms(self, keys: Sequence[bytes]) -> OnlineTerms:
        """What a header tells every gateway of it."""
        return OnlineTerms(
            keys=tuple(keys),
            per_tap_cap_minor=self.per_tap_cap_minor,
            grant_life_s=self.grant_life_s,
            note_life_s=self.note_life_s,
            unsynchronised_amount_cap_minor=self.unsynchronised_amount_cap_minor,
        )


def _offer(value: object) -> Offer:
    if isinstance(value, Offer):
        return value
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    try:
        return Offer.from_json(value)
    except InvalidInput as error:
        raise ValueError(str(error)) from None


SignedOffer = Annotated[Offer, PlainValidator(_offer), PlainSerializer(Offer.to_json)]


class Policy(BaseModel):
    """The issuer's decisions. Spans in seconds, caps in minor units.

    `presentment_deadline_s` is D and `clock_tolerance_s` is δ: so long after its expiry a ceiling still
    reserves credit, because payments made under it may still be presented. `token_share_percent`: how much
    of an account's limit, less what is owed, all its active tokens' reserves may come to; `allowance` says
    how they share it.
    `offers`: the instalment plans that shops may offer. `credit`: what credit costs and how it is repaid.
    `use`: allowances go by use instead, see `ledger.use`; `policies/by-use.json` is such a policy.
    `delta_bases`: over how many versions back a shop may be updated by a delta alone.
    `certificate_life_s`: of a gateway's certificate. `certificate_grace_s`: how long after it a gateway may
    still ask for the next one, by its device key alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    refresh_after_s: int = Field(default=_DAY_S, gt=0)
    valid_s: int = Field(default=7 * _DAY_S, gt=0)
    presentment_deadline_s: int = Field(default=14 * _DAY_S, gt=0)
    clock_tolerance_s: int = Field(default=300, ge=0)
    per_tap_cap_minor: int = Field(default=100_000, gt=0, lt=1 << 32)
    stale_per_tap_cap_minor: int = Field(default=20_000, ge=0, lt=1 << 32)
    card_cumulative_cap_minor: int = Field(default=1_000_000_000, gt=0)
    card_tc_rate_limit: int = Field(default=50, gt=0)
    token_share_percent: int = Field(default=100, ge=0, le=100)
    allowance: AllowancePolicy = AllowancePolicy()
    delta_bases: int = Field(default=7, ge=0, le=100)
    offers: tuple[SignedOffer, ...] = ()
    certificate_life_s: int = Field(default=30 * _DAY_S, ge=60)
    certificate_grace_s: int = Field(default=90 * _DAY_S, ge=0)
    metadata_lives: MetadataLives = MetadataLives()
    use: UsePolicy | None = None
    online: OnlinePolicy = OnlinePolicy()
    credit: CreditTerms = CreditTerms()

    @model_validator(mode="after")
    def _credit_within_its_caps(self) -> Policy:
        zone(self.credit.time_zone)
        known = {offer.id for offer in self.offers}
        for name, scene in self.credit.scenes.items():
            if odd := sorted(set(scene.offers) - known):
                raise ValueError(f"scene {name} names offers that are not there: {', '.join(odd)}")
        return self

    @property
    def guarantee(self) -> Guarantee:
        """What an honest shop is allowed."""
        return Guarantee(self.clock_tolerance_s, self.presentment_deadline_s)

    def risk_policy(self) -> RiskPolicy:
        """What every gateway is told of it."""
        return RiskPolicy(
            stale_per_tap_cap_minor=self.stale_per_tap_cap_minor,
            presentment_deadline_s=self.presentment_deadline_s,
            clock_tolerance_s=self.clock_tolerance_s,
        )


def check_costs(policy: Policy) -> None:
    """
    Raises:
        InvalidInput: an offer costs more a year than the policy's own cap.
    """
    for offer in policy.offers:
        for periods in offer.periods:
            shares = schedule(offer, _SAMPLE_MINOR, periods)
            rate = rate_per_period(_SAMPLE_MINOR, [share.total_minor for share in shares]) * PERIODS_A_YEAR
            if rate * 1_000_000 > policy.credit.annual_cost_cap_ppm:
                why = f"costs more a year than the policy's cap, in {periods} periods"
                raise InvalidInput(why, where=f"offer {offer.id}")


def policy_in_force(connection: sa.Connection) -> Policy:
    """The newest one."""
    query = sa.select(store.policies.c.body).order_by(store.policies.c.version.desc()).limit(1)
    return Policy.model_validate_json(connection.scalars(query).one())


def policy_by_use() -> Policy:
    """The shipped policy whose allowances go by use: what the simulator runs with unless told otherwise."""
    text = files(__package__).joinpath("policies", "by-use.json").read_text()
    return Policy.model_validate_json(text)
