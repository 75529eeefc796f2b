"""How the gateway stands, in one JSON object: for the page, the command line, and `doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final
from uuid import UUID

from pos_gateway.authorization.forecast import forecast
from pos_gateway.authorization.reasons import Reason
from pos_gateway.enrolment import Enrolment
from pos_gateway.gateway.certificate import CertificateState
from pos_gateway.gateway.config import Settings
from pos_gateway.gateway.deadline import deadline
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.journal_view import Refusal
from pos_gateway.gateway.meanings import meaning_of
from pos_gateway.gateway.payments import Payments
from pos_gateway.gateway.retention import keep_s
from pos_gateway.gateway.singles import Singles
from pos_gateway.gateway.synchroniser import Line, SynchroniserState
from pos_gateway.limits.header import SnapshotHeader, explain_freshness, freshness
from pos_gateway.limits.layers import Layers
from pos_gateway.money import Currency, Money, currency
from pos_gateway.records import Kind, Record, Verdict

_RECENT: Final = 12
_LOOK_BACK_RECORDS: Final = 100


def status(
    enrolment: Enrolment,
    settings: Settings,
    journal: Journal,
    feed: SnapshotFeed,
    synchroniser: SynchroniserState,
    payments: Payments,
    singles: Singles,
    now_unix_ms: int,
    *,
    certificate: CertificateState | None = None,
) -> dict[str, Any]:
    unit = currency(enrolment.currency)
    view = journal.view
    exposure, again = view.exposure, view.again
    room = journal.room(settings.journal.headroom_bytes)
    cap_minor = settings.caps.unsynchronised_amount_cap_minor
    limits = feed.current()
    deadline_s = limits.newest.policy.presentment_deadline_s if limits else None
    return {
        "gateway_id": enrolment.gateway_id,
        "terminal_id": enrolment.terminal_id,
        "merchant": enrolment.merchant.model_dump(),
        "currency": unit.code,
        "currency_exponent": unit.exponent,
        "now_unix_ms": now_unix_ms,
        "lanes": [
            {
                "name": lane.name,
                "reader": lane.reader_name,
                "present": lane.reader_present,
                "busy": lane.busy,
            }
            for lane in payments.lanes
        ],
        "line": {
            "up": {Line.UP: True, Line.DOWN: False, Line.UNKNOWN: None}[synchroniser.line],
            "since_unix_ms": synchroniser.since_unix_ms,
            "last_success_at_unix_ms": synchroniser.last_success_at_unix_ms,
            "problem": synchroniser.last_error or "",
        },
        "synchronisation": {
            "running": synchroniser.running,
            "presented": synchroniser.presented,
            "remaining": synchroniser.remaining,
            "per_s": round(synchroniser.per_s) if synchroniser.per_s is not None else None,
            "left_s": synchroniser.left_s,
            "again": again.until_sequence - again.next_sequence + 1 if again else 0,
            "epoch": view.epoch,
        },
        "queue": {
            "count": exposure.count,
            "amount_minor": exposure.amount_minor,
            "amount": str(Money(exposure.amount_minor, unit)),
            "oldest_at_unix_ms": exposure.oldest_at_unix_ms,
            "cap_minor": cap_minor,
            "cap": str(Money(cap_minor, unit)),
            "share_of_cap_percent": _share_percent(exposure.amount_minor, cap_minor),
        },
        "deadline": deadline(
            exposure,
            journal.waiting_since,
            presentment_deadline_s=deadline_s,
            warn_share_percent=settings.synchroniser.warn_share_percent,
            now_unix_ms=now_unix_ms,
        ).as_json(unit, now_unix_ms),
        "snapshot": _snapshot(limits, now_unix_ms),
        "snapshot_problem": feed.last_error.reason if feed.last_error else "",
        "snapshot_advice": feed.last_error.advice if feed.last_error else "",
        "snapshot_progress": asdict(feed.progress) if feed.progress else None,
        "singles": singles.summary(now_unix_ms // 1000),
        "forecast": _forecast(settings, journal, feed.current(), now_unix_ms, unit),
        "certificate": _certificate(certificate) if certificate else None,
        "journal": {
            "sequence": journal.last_sequence,
            "pruned_until": journal.pruned_until,
            "keep_s": keep_s(settings.journal.keep_days, deadline_s),
        },
        "disk": {
            "free_bytes": room.free_bytes,
            "needed_bytes": room.needed_bytes,
            "payments_stopped": room.short,
        },
        "refused": [refused(refusal, unit) for refusal in view.refused],
        "recent": _recent(journal, unit),
    }


def _forecast(
    settings: Settings, journal: Journal, limits: Layers | None, now_unix_ms: int, unit: Currency
) -> dict[str, Any]:
    """How much can still be approved without a line, for how long, by which bound first."""
    found = forecast(
        exposure=journal.exposure,
        policy=settings.policy(),
        header=limits.base.header if limits else None,
        now_unix_ms=now_unix_ms,
        clock_high_water_unix_ms=journal.latest_at_unix_ms,
    )
    return {
        "amount_left_minor": found.amount_left_minor,
        "amount_left": str(Money(found.amount_left_minor, unit)),
        "count_left": found.count_left,
        "per_tap_cap_minor": found.per_tap_cap_minor,
        "per_tap_cap": str(Money(found.per_tap_cap_minor, unit)),
        "stopped": found.stopped,
        "first": found.first.name if found.first else None,
        "first_at_unix_ms": found.first.at_unix_ms if found.first else None,
        "bounds": [asdict(bound) for bound in found.bounds],
    }


def _certificate(state: CertificateState) -> dict[str, Any]:
    return {
        "until_unix_s": int(state.until.timestamp()) if state.until else None,
        "due_unix_s": int(state.due.timestamp()) if state.due else None,
        "sentence": state.sentence,
        "well": state.well,
    }


def refused(refusal: Refusal, unit: Currency) -> dict[str, Any]:
    """What the ledger did not simply take, and what that means for the merchant's money."""
    return {
        "id": str(refusal.record_id),
        "kind": refusal.kind.value,
        "verdict": refusal.verdict.value,
        "reason": refusal.reason,
        "amount_minor": refusal.amount_minor,
        "amount": str(Money(refusal.amount_minor, unit)),
        "at_unix_ms": refusal.at_unix_ms,
        "meaning": meaning_of(refusal.kind, refusal.verdict).as_json(),
    }


def _share_percent(part: int, whole: int) -> int:
    return 100 * part // whole if whole else 100


def _snapshot(limits: Layers | None, now_unix_ms: int) -> dict[str, Any] | None:
    """Validity as most tokens have it: a delta renews those alone that it lists."""
    if limits is None:
        return None
    now_unix_s = now_unix_ms // 1000
    return _layer(limits.base.header, now_unix_s) | {
        "version": limits.version,
        "sentence": limits.explain(now_unix_s),
        "delta": None if limits.delta is None else _layer(limits.delta.header, now_unix_s),
    }


def _layer(header: SnapshotHeader, now_unix_s: int) -> dict[str, Any]:
    return {
        "version": header.version,
        "count": header.count,
        "freshness": freshness(header, now_unix_s).value,
        "sentence": explain_freshness(header, now_unix_s),
        "valid_from_unix_s": header.valid_from_unix_s,
        "refresh_after_unix_s": header.refresh_after_unix_s,
        "valid_until_unix_s": header.valid_until_unix_s,
    }


def _recent(journal: Journal, unit: Currency) -> list[dict[str, Any]]:
    """The newest payments with what became of them, newest first."""
    after = max(0, journal.last_sequence - _LOOK_BACK_RECORDS)
    records = journal.records(after, _LOOK_BACK_RECORDS)
    verdicts: dict[UUID, str] = {}
    for record in records:
        if record.kind is Kind.ACKNOWLEDGEMENT:
            facts = record.facts()
            verdicts[UUID(facts["about"])] = facts["verdict"]
    shown = [r for r in reversed(records) if r.kind in (Kind.AUTHORIZATION, Kind.DECLINE)]
    return [_payment(record, unit, verdicts) for record in shown[:_RECENT]]


def _payment(record: Record, unit: Currency, verdicts: dict[UUID, str]) -> dict[str, Any]:
    facts = record.facts()
    approved = record.kind is Kind.AUTHORIZATION
    result = "approved" if approved else Reason(facts["reason"]).explanation.english
    return {
        "id": facts["sale_id"],
        "at_unix_ms": facts["at_unix_ms"],
        "amount": str(Money(facts["amount_minor"], unit)),
        "token_last4": facts["token_last4"],
        "approved": approved,
        "result": result,
        "ledger": verdicts.get(record.id, "waiting") if approved else "",
        "meaning": _meaning(record, verdicts.get(record.id)) if approved else None,
    }


def _meaning(record: Record, verdict: str | None) -> dict[str, str]:
    return meaning_of(record.kind, Verdict(verdict) if verdict is not None else None).as_json()
