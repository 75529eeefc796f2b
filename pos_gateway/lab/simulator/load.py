"""The load: what the simulated town does. `load.toml` beside this file says each figure's meaning."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pos_gateway.errors import InvalidConfiguration

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]
Minor = Annotated[int, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Customers(_Part):
    phone_share: Share
    plastic_beside_phone_share: Share
    phone_tap_share: Share
    limit_median_minor: Minor
    limit_sigma: Rate
    limit_min_minor: Minor
    limit_max_minor: Minor
    first_utilisation_alpha: Positive
    first_utilisation_beta: Positive
    intensity_sigma: Rate


class Taps(_Part):
    per_customer_day: Rate
    amount_of_limit_median: Positive
    amount_of_limit_sigma: Rate
    amount_of_limit_max: Share
    amount_min_minor: Minor
    plastic_amount_max_minor: Minor
    hours: Annotated[list[Rate], Field(min_length=24, max_length=24)]
    own_shops: Annotated[int, Field(ge=1)]
    own_shop_share: Share
    torn_share: Share
    torn_tapped_again_share: Share


class Online(_Part):
    per_customer_day: Rate
    amount_of_limit_median: Positive
    amount_of_limit_sigma: Rate


class Phones(_Part):
    refreshes_per_day: Rate
    network_at_cut_off_shop: Share
    network_elsewhere: Share
    wallet_opened_share: Share
    taps_again_share: Share


class Repayments(_Part):
    full_share: Share
    half_share: Share
    minimum_of_owed: Share
    early_above_utilisation: Share
    early_per_day: Share
    early_of_owed: Share
    not_final_share: Share
    not_final_days_max: Annotated[int, Field(ge=1)]
    bounced_share: Share


class Decisions(_Part):
    limit_cuts: Rate
    limit_cut_to: Share
    limit_raises: Rate
    limit_raise_to: Annotated[float, Field(ge=1)]
    vault_locks: Rate
    vault_unlocks: Rate
    vault_of_limit: Share
    tokens_blocked: Rate
    replaced_after_days: Positive


class Shops(_Part):
    popularity_sigma: Rate
    outages: Annotated[list[tuple[Share, Positive, Rate]], Field(min_length=1)]
    late_share: Share
    late_hours_mean: Positive
    carrier_after_days: Positive
    carrier_share: Share
    clock_sigma_s: Rate
    clock_wrong_share: Share
    clock_wrong_days_max: Positive
    clock_corrected_after_days: Positive
    grant_lost_share: Share
    stolen_per_month: Rate
    stolen_reported_after_days: Positive
    stolen_taps: Annotated[int, Field(ge=0)]


class LedgerLoad(_Part):
    restores_per_60_days: Annotated[int, Field(ge=0)]
    backup_age_hours: Positive


class Clones(_Part):
    rolled_back_share: Share
    taps_per_day: Rate
    amount_of_limit_median: Positive
    dispute_after_days_phone: Positive
    dispute_after_days_plastic: Positive


class Peers(_Part):
    floor_cap_minor: Minor


class Load(_Part):
    """All of it; every field must be there, so that a file says the whole load."""

    customers: Customers
    taps: Taps
    online: Online
    phones: Phones
    repayments: Repayments
    decisions: Decisions
    shops: Shops
    ledger: LedgerLoad
    clones: Clones
    peers: Peers


def read_load(path: Path | None = None) -> Load:
    """The load in a file, or the one that is shipped.

    Raises:
        InvalidConfiguration: no such file, no TOML, or a field that is missing or wrong.
    """
    where = str(path) if path is not None else "load.toml"
    try:
        text = path.read_text() if path is not None else files(__package__).joinpath("load.toml").read_text()
        return Load.model_validate(tomllib.loads(text))
    except OSError as error:
        raise InvalidConfiguration(f"cannot be read ({error.strerror})", where=where) from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfiguration(f"no TOML: {error}", where=where) from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidConfiguration(first["msg"], where=f"{where}, field {place or 'root'}") from None
