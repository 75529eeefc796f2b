"""One payment told from its journal records, and the answer to a customer who says: I paid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pos_gateway.authorization.reasons import Reason
from pos_gateway.gateway.lane import PaymentView, State
from pos_gateway.gateway.language import Language
from pos_gateway.gateway.meanings import Meaning, meaning_of
from pos_gateway.records import Kind, Record, Verdict

_HIDDEN: Final = frozenset({"plan", "totals"})


@dataclass(frozen=True, slots=True)
class Answer:
    """`word`: yes or no; `because`: which evidence says so; `todo`: what to do now."""

    word: str
    because: str
    todo: str


def word_of(view: PaymentView, language: Language) -> str:
    _ = language.tell
    if view.voided:
        return _("Void")
    if view.refunded_minor:
        return (
            _("Approved, refunded")
            if view.refunded_minor == view.amount_minor
            else _("Approved, partly refunded")
        )
    return _("Approved") if view.state is State.APPROVED else _("Declined")


def sentence_of(main: Record, records: Sequence[Record], language: Language) -> str:
    """For an approval, how it stands with the money; for a decline, why."""
    if main.kind is Kind.AUTHORIZATION:
        return _told(meaning_of(main.kind, _verdict(main, records)), language)
    told = Reason(main.facts()["reason"]).explanation
    return told.chinese if language.code == "zh" else told.english


def answer_to_i_paid(records: Sequence[Record], language: Language) -> Answer:
    """What the journal can show of one sale. A till approves only what it has recorded first."""
    _ = language.tell
    if any(record.kind is Kind.AUTHORIZATION for record in records):
        return Answer(
            _("Yes, it was paid."),
            _("This till holds the card's signed approval for this sale."),
            _("Hand over the goods, and a receipt. It is charged once, however often it was tapped."),
        )
    left = any(
        record.kind is Kind.DECLINE and record.facts()["reason"] == Reason.CARD_LEFT.value
        for record in records
    )
    if left:
        return Answer(
            _("No, it was not."),
            _(
                "The card was taken away before its answer was complete, and this till recorded no approval. "
                "The card may have counted the attempt; that costs nothing and is written off by itself."
            ),
            _("Take the payment again. Whatever the phone shows, nothing is in the books."),
        )
    return Answer(
        _("No, it was not."),
        _("This till declined the sale and recorded no approval: nothing was charged."),
        _("Take the payment again, or another way."),
    )


def steps_of(
    records: Sequence[Record], language: Language, money: Callable[[int], str]
) -> Iterator[dict[str, Any]]:
    """Each record as a step of the story, with all the facts that may be shown."""
    kinds = {record.id: record.kind for record in records}
    for record in records:
        facts = record.facts()
        what, detail = _step(record, facts, kinds, language, money)
        shown = [(name, str(value)) for name, value in sorted(facts.items()) if name not in _HIDDEN]
        yield {
            "at_unix_ms": facts["at_unix_ms"],
            "what": what,
            "detail": detail,
            "sequence": record.sequence,
            "facts": [
                ("record", str(record.id)),
                *shown,
                ("hash", record.hash.hex()),
                ("previous_hash", record.previous_hash.hex()),
                ("sealed_evidence_bytes", str(len(record.proof))),
            ],
        }


def _step(
    record: Record,
    facts: dict[str, Any],
    kinds: dict[Any, Kind],
    language: Language,
    money: Callable[[int], str],
) -> tuple[str, str]:
    _ = language.tell
    match record.kind:
        case Kind.AUTHORIZATION:
            relied = _(
                "Limits version {version}; the card's counter went to {after}, the ceiling was {ceiling}.",
                version=facts["snapshot_version"],
                after=facts["counter_after"],
                ceiling=facts["ceiling"],
            )
            return _("Approved"), relied
        case Kind.DECLINE:
            told = Reason(facts["reason"]).explanation
            return _("Declined"), told.chinese if language.code == "zh" else told.english
        case Kind.REFUND:
            return _("Refund"), f"{money(facts['amount_minor'])} {facts['reason']}".strip()
        case Kind.REVERSAL:
            return _("Void"), facts["reason"]
        case Kind.ACKNOWLEDGEMENT:
            of = next((kind for key, kind in kinds.items() if str(key) == facts["about"]), Kind.AUTHORIZATION)
            return _("The ledger's word"), _told(meaning_of(of, Verdict(facts["verdict"])), language)
        case Kind.STAFF_ACTION:
            who = _("by {name}", name=facts["by"])
            words = {
                "approved_refunds": _("A manager approved the refund"),
                "approved_reversal": _("A manager approved the void"),
                "refunded": _("Refunded by the staff"),
                "voided": _("Voided by the staff"),
            }
            if "for" in facts:
                who = f"{who} ({_('for {name}', name=facts['for'])})"
            return words.get(facts["action"], facts["action"]), who
        case _:
            return record.kind.value, ""


def _verdict(main: Record, records: Sequence[Record]) -> Verdict | None:
    verdict: Verdict | None = None
    for record in records:
        if record.kind is Kind.ACKNOWLEDGEMENT and record.facts()["about"] == str(main.id):
            verdict = Verdict(record.facts()["verdict"])
    return verdict


def _told(meaning: Meaning, language: Language) -> str:
    return meaning.chinese if language.code == "zh" else meaning.english
