"""What monitoring is told: the names that alerts go by, real numbers, and nothing of a card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pos_gateway.gateway.config import firmware_config
from pos_gateway.gateway.metrics import GatewayMetrics, problems
from pos_gateway.gateway.payments import Payments
from pos_gateway.gateway.program import now_unix_ms
from pos_gateway.gateway.status import status
from pos_gateway.gateway.synchroniser import SynchroniserState
from pos_gateway.gateway.till import Approved, Declined
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.metrics import LedgerMetrics
from pos_gateway.records import Verdict

LABELS = {
    *("version", "gateway_id", "terminal_id", "currency", "outcome", "reason", "verdict", "kind", "answered"),
    *("le", "status", "route"),
}


@pytest.fixture
def shop(tmp_path: Path, ledger_home: Path) -> Iterator[Shop]:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    with Shop(tmp_path) as shop:
        yield shop


@pytest.fixture
def watched(shop: Shop) -> GatewayMetrics:
    """A shop in which one card has paid, and was declined once."""
    metrics = GatewayMetrics()
    payments = Payments(shop.till, shop.journal, lambda view: None)

    def tell() -> dict[str, object]:
        state = SynchroniserState()
        return status(
            shop.enrolment,
            shop.settings,
            shop.journal,
            shop.feed,
            state,
            payments,
            shop.till.singles,
            now_unix_ms(),
        )

    metrics.watch(tell)
    return metrics


def samples(text: bytes) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_a_tap_is_counted_and_tells_nothing_of_its_card(shop: Shop, watched: GatewayMetrics) -> None:
    _, personalisation = shop.issue(limit_minor=2000)
    shop.publish()
    card = VirtualCard(personalisation)
    facts = []
    for amount_minor in (1500, 1500):
        outcome = shop.till.tap(shop.till.new_payment(uuid4(), amount_minor, 1), DirectChannel(card))
        assert isinstance(outcome, Approved | Declined)
        watched.tapped(outcome, 0.12)
        if isinstance(outcome, Approved):
            facts.append(outcome.record.facts())
    watched.presented([Verdict.POSTED, Verdict.LATE], 0.3)
    watched.asked("grant", True, 0.05)
    text = watched.expose()
    told = samples(text)
    assert told["pos_gateway_decisions_total{reason=approved}"] == 1
    assert told["pos_gateway_decisions_total{reason=over_ceiling}"] == 1
    assert told["pos_gateway_tap_seconds_bucket{le=0.15,outcome=approved}"] == 1
    assert told["pos_gateway_tap_seconds_bucket{le=0.1,outcome=approved}"] == 0
    assert told["pos_gateway_verdicts_total{verdict=late}"] == 1
    assert told["pos_gateway_grant_seconds_count{answered=yes,kind=grant}"] == 1
    assert told["pos_gateway_queue_records"] == 1
    assert told["pos_gateway_queue_amount_minor"] == 1500
    assert told["pos_gateway_snapshot_version"] == 1
    assert told["pos_gateway_ready"] == 0  # no reader is plugged in
    assert "pos_gateway_line_up" not in told  # not tried yet
    pan, sale = personalisation.pan, facts[0]
    for secret in (pan, pan[-4:] + "}", sale["token_key"], sale["sale_id"], sale["ac"]):
        assert secret not in text.decode()
    names = {label for key in told if "{" in key for label in re.findall(r"(?:[{,])(\w+)=", key)}
    assert names <= LABELS


def test_every_alert_names_metrics_that_there_are(shop: Shop, watched: GatewayMetrics) -> None:
    rules = (firmware_config() / "alerts.yml").read_text()
    wanted = set(re.findall(r"\bpos_(?:gateway|ledger)_\w+", rules))
    text = watched.expose() + LedgerMetrics(shop.ledger).expose()
    helped = set(re.findall(r"^# TYPE (\S+)", text.decode(), re.MULTILINE))
    there = helped | {f"{name}{suffix}" for name in helped for suffix in ("_bucket", "_count", "_total")}
    # Limits and a certificate come later in a gateway's life than this one's.
    later = {"pos_gateway_snapshot_valid_seconds", "pos_gateway_certificate_valid_seconds"}
    later |= {"pos_ledger_published_age_seconds"}
    assert wanted - there == later
    shop.publish()
    text = watched.expose() + LedgerMetrics(shop.ledger).expose()
    assert (wanted - set(re.findall(r"^# TYPE (\S+)", text.decode(), re.MULTILINE))) & later == {
        "pos_gateway_certificate_valid_seconds"
    }
    assert len(wanted) > 15


def test_every_alert_is_explained() -> None:
    rules = re.findall(r"- alert: (\w+)", (firmware_config() / "alerts.yml").read_text())
    page = (Path(__file__).parents[2] / "docs" / "alerts.md").read_text()
    assert rules
    for rule in rules:
        assert re.search(rf"^\| [^|]*\b{rule}\b", page, re.MULTILINE), rule


def test_problems_name_what_stops_payments(shop: Shop) -> None:
    payments = Payments(shop.till, shop.journal, lambda view: None)
    told = status(
        shop.enrolment,
        shop.settings,
        shop.journal,
        shop.feed,
        SynchroniserState(),
        payments,
        shop.till.singles,
        now_unix_ms(),
    )
    assert problems(told) == ["no_reader", "no_limits"]
    told["lanes"] = [{"present": True, "busy": False}]
    told["disk"]["payments_stopped"] = True
    assert problems(told) == ["disk", "no_limits"]
