"""How the gateway stands, in plain words: what is wrong, and what to do. The most urgent first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pos_gateway.gateway.language import Language

ACT: Final = "act"
WATCH: Final = "watch"
WELL: Final = "well"
_ORDER: Final = (ACT, WATCH, WELL)


@dataclass(frozen=True, slots=True)
class Advice:
    """`urgency`: act, watch or well."""

    urgency: str
    what: str
    todo: str


def advice(status: Mapping[str, Any], language: Language) -> list[Advice]:
    """Of a status as `status.status` tells it; never empty."""
    _ = language.tell
    found: list[Advice] = []
    if not status["lanes"]:
        found.append(
            Advice(ACT, _("No reader is connected."), _("Plug the reader in; it is found by itself."))
        )
    if status["disk"]["payments_stopped"]:
        found.append(
            Advice(
                ACT,
                _("The disk is nearly full: payments have stopped."),
                _("Make room on it, or call support."),
            )
        )
    found += _limits(status, language)
    queue, line = status["queue"], status["line"]
    if queue["share_of_cap_percent"] >= 80:
        found.append(
            Advice(
                ACT,
                _("Much is waiting for the ledger: payments stop when the cap is reached."),
                _("Connect this till to the network soon."),
            )
        )
    if status["deadline"]["urgency"] != "fine":
        told = status["deadline"]["chinese" if language.code == "zh" else "english"]
        found.append(Advice(ACT, told, ""))
    if line["up"] is False:
        found.append(
            Advice(
                WATCH,
                _("This till is off the network."),
                _("Taps still work within the limits. Check the cable or Wi-Fi; nothing is lost meanwhile."),
            )
        )
    certificate = status["certificate"]
    if certificate and not certificate["well"]:
        found.append(Advice(WATCH, certificate["sentence"], ""))
    if status["refused"]:
        found.append(
            Advice(
                WATCH,
                _("The ledger did not simply pay everything."),
                _("Look at the list below; it says what to do for each."),
            )
        )
    if not found:
        found.append(Advice(WELL, _("All is well."), _("Nothing to do.")))
    return sorted(found, key=lambda one: _ORDER.index(one.urgency))


def _limits(status: Mapping[str, Any], language: Language) -> list[Advice]:
    _ = language.tell
    snapshot = status["snapshot"]
    if snapshot is None:
        return [
            Advice(
                ACT,
                _("There are no credit limits on this till yet: nothing can be approved."),
                _("Connect it to the network, or bring limits on a stick."),
            )
        ]
    match snapshot["freshness"]:
        case "expired":
            return [
                Advice(
                    ACT,
                    _("The credit limits have expired: nothing can be approved."),
                    _("Connect it to the network, or bring limits on a stick."),
                )
            ]
        case "not_yet_valid":
            return [
                Advice(
                    ACT,
                    _("The credit limits are not valid yet: is the clock right?"),
                    _("Compare this machine's clock with another one; a manager confirms the time."),
                )
            ]
        case "stale":
            return [
                Advice(
                    WATCH,
                    _("The credit limits are getting old: only smaller amounts are approved."),
                    _("Connect it to the network."),
                )
            ]
        case _:
            return []
