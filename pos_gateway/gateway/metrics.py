"""What the gateway tells a monitoring system, in Prometheus' text format.

Labels come from closed sets: reasons, verdicts, states. Nothing of a card, a token or a sale is among them.
What can be read from `status` is read when somebody asks; the rest is counted as it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import pos_gateway
from pos_gateway.gateway.till import Approved, Declined, Outcome
from pos_gateway.records import Verdict

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_TAP_BUCKETS_S: Final = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0)
_LINE_BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class GatewayMetrics:
    """One gateway's. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._taps = Histogram(
            "pos_gateway_tap_seconds",
            "From the card in the field to the outcome, the journal's commit included.",
            ["outcome"],
            buckets=_TAP_BUCKETS_S,
            registry=self._registry,
        )
        self._decisions = Counter(
            "pos_gateway_decisions",
            "Taps by what was decided: approved, or the reason of a decline or of another tap.",
            ["reason"],
            registry=self._registry,
        )
        self._batches = Histogram(
            "pos_gateway_batch_seconds",
            "From sending a batch to its journalled verdicts.",
            buckets=_LINE_BUCKETS_S,
            registry=self._registry,
        )
        self._verdicts = Counter(
            "pos_gateway_verdicts",
            "Records the ledger gave its word on.",
            ["verdict"],
            registry=self._registry,
        )
        self._questions = Histogram(
            "pos_gateway_grant_seconds",
            "From asking the issuer for a grant or a note to its answer.",
            ["kind", "answered"],
            buckets=_LINE_BUCKETS_S,
            registry=self._registry,
        )

    def watch(self, status: Callable[[], dict[str, Any]]) -> None:
        """Tell what `status` tells as well, whenever somebody asks."""
        self._registry.register(_Standing(status))

    def tapped(self, outcome: Outcome, took_s: float) -> None:
        match outcome:
            case Approved():
                name, reason = "approved", "approved"
            case Declined():
                name, reason = "declined", outcome.decline.reason.value
            case _:
                name, reason = "tap_again", outcome.decline.reason.value
        self._taps.labels(name).observe(took_s)
        self._decisions.labels(reason).inc()

    def presented(self, verdicts: Sequence[Verdict], took_s: float) -> None:
        self._batches.observe(took_s)
        for verdict in verdicts:
            self._verdicts.labels(verdict.value).inc()

    def asked(self, kind: str, answered: bool, took_s: float) -> None:
        """`kind`: grant or note."""
        self._questions.labels(kind, "yes" if answered else "no").observe(took_s)

    def expose(self) -> bytes:
        """The text to be scraped. Blocks on the journal for what `status` looks up."""
        return generate_latest(self._registry)


class _Standing(Collector):
    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        return standing(self._status())


def standing(status: dict[str, Any]) -> Iterator[Metric]:
    """`gateway.status` as gauges. What is not known has no sample."""
    now_s = status["now_unix_ms"] / 1000
    queue, disk, snapshot = status["queue"], status["disk"], status["snapshot"]
    line, forecast, run = status["line"], status["forecast"], status["synchronisation"]

    def gauge(name: str, what: str, value: float | None, **labels: str) -> Metric:
        family = GaugeMetricFamily(f"pos_gateway_{name}", what, labels=list(labels))
        if value is not None:
            family.add_metric(list(labels.values()), float(value))
        return family

    def age(unix_ms: int | None) -> float | None:
        return None if unix_ms is None else max(0.0, now_s - unix_ms / 1000)

    yield gauge(
        "info",
        "Which gateway and program this is.",
        1,
        version=pos_gateway.__version__,
        gateway_id=status["gateway_id"],
        terminal_id=status["terminal_id"],
        currency=status["currency"],
    )
    yield gauge("ready", "1 while a payment could be begun and approved.", not problems(status))
    yield gauge("queue_records", "Records that wait for the ledger.", queue["count"])
    yield gauge("queue_amount_minor", "Money in them, minor units: the exposure.", queue["amount_minor"])
    yield gauge("queue_cap_minor", "At most so much may wait.", queue["cap_minor"])
    yield gauge(
        "queue_oldest_age_seconds", "How long the oldest has waited.", age(queue["oldest_at_unix_ms"])
    )
    yield gauge("refused_records", "Records the ledger did not simply take.", len(status["refused"]))
    yield gauge("presented_again_records", "To be presented again to a restored ledger.", run["again"])
    yield gauge("line_up", "Is the line to the ledger up? No sample before it was tried.", line["up"])
    yield gauge(
        "line_success_age_seconds", "Since all was synchronised.", age(line["last_success_at_unix_ms"])
    )
    if snapshot is not None:
        yield gauge("snapshot_version", "The limits in use.", snapshot["version"])
        yield gauge("snapshot_age_seconds", "Since they became valid.", now_s - snapshot["valid_from_unix_s"])
        yield gauge(
            "snapshot_valid_seconds",
            "Until they expire; below 0 after that.",
            snapshot["valid_until_unix_s"] - now_s,
        )
    yield gauge("snapshot_refused", "1 while newer limits are refused.", bool(status["snapshot_problem"]))
    yield gauge(
        "offline_amount_minor", "Could still be approved without a line.", forecast["amount_left_minor"]
    )
    yield gauge("offline_payments", "In so many payments.", forecast["count_left"])
    yield gauge("disk_free_bytes", "On the journal's disk.", disk["free_bytes"])
    yield gauge("disk_needed_bytes", "Below that no payment is begun.", disk["needed_bytes"])
    yield gauge("journal_records", "The journal's newest sequence.", status["journal"]["sequence"])
    yield gauge(
        "lanes", "Lanes with their reader plugged in.", sum(lane["present"] for lane in status["lanes"])
    )
    yield gauge("lanes_busy", "Lanes taking a payment.", sum(lane["busy"] for lane in status["lanes"]))
    if (certificate := status["certificate"]) and certificate["until_unix_s"] is not None:
        yield gauge("certificate_valid_seconds", "Until ours expires.", certificate["until_unix_s"] - now_s)


def problems(status: dict[str, Any]) -> list[str]:
    """Why no payment could be begun and approved now; empty if one could."""
    found = []
    if status["disk"]["payments_stopped"]:
        found.append("disk")
    if not any(lane["present"] for lane in status["lanes"]):
        found.append("no_reader")
    if status["forecast"]["stopped"]:
        found.append(str(status["forecast"]["first"]))
    return found
