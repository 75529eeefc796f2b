"""One run: a town, its history, and the three systems side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pos_gateway.authorization.policy import Policy as GatewayPolicy
from pos_gateway.lab.simulator.history import History
from pos_gateway.lab.simulator.load import Load
from pos_gateway.lab.simulator.measures import Measures
from pos_gateway.lab.simulator.ours import Ours
from pos_gateway.lab.simulator.peers import AVAILABLE_CREDIT, STORE_AND_FORWARD, Peer
from pos_gateway.lab.simulator.town import DAY_S, Size, build_town
from pos_gateway.ledger.config import Policy, policy_by_use

Progress = Callable[[int, int], None]
"""(days done, of)"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run, by system."""

    size: Size
    systems: dict[str, Measures]

    def to_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "shops": self.size.shops,
            "tokens": self.size.tokens,
            "days": self.size.days,
            "outage": self.size.outage,
            "clones": self.size.clones,
            "seed": self.size.seed,
        }
        return told | {name: measures.to_json() for name, measures in self.systems.items()}


def simulate(
    size: Size,
    load: Load,
    policy: Policy | None = None,
    progress: Progress = lambda done, of: None,
    *,
    peers: bool = True,
) -> Outcome:
    """The same size, load and policy always give the same outcome."""
    policy = policy or policy_by_use()
    town = build_town(size, load)
    ours = Ours(size, town, load, policy, gateway_policy(policy))
    others = [
        Peer(town, load, policy.valid_s, load.peers.floor_cap_minor),
        Peer(town, load, policy.valid_s, None),
    ]
    systems: list[Ours | Peer] = [ours, *(others if peers else [])]
    for day, happenings in enumerate(History(size, town, load, DAY_S).days()):
        progress(day, size.days)
        for at_unix_ms, happening in happenings:
            for system in systems:
                system.handle(at_unix_ms, happening)
    for system in systems:
        system.finish()
    progress(size.days, size.days)
    names = ("ours", STORE_AND_FORWARD, AVAILABLE_CREDIT)
    return Outcome(size, {name: s.measures for name, s in zip(names, systems, strict=False)})


def gateway_policy(policy: Policy) -> GatewayPolicy:
    """What a shop sets for itself: the shipped settings, its queue's age within the presentment deadline."""
    return GatewayPolicy(
        per_tap_cap_minor=500_000,
        holder_verification_limit_minor=100_000,
        unsynchronised_amount_cap_minor=20_000_000,
        unsynchronised_count_cap=20_000,
        unsynchronised_age_cap_s=policy.presentment_deadline_s - DAY_S,
        clock_tolerance_s=policy.clock_tolerance_s,
    )
