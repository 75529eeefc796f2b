"""What stands on a receipt and on a report. Pure: made from what the journal keeps, so that a receipt made
again is the same but for the word *duplicate*."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, tzinfo
from decimal import Decimal
from enum import Enum
from typing import Any

from pos_gateway.authorization.reasons import Reason
from pos_gateway.gateway.language import Language
from pos_gateway.gateway.receipts.paper import Centred, Line, Pair, Paper, Qr, Rule, Weight
from pos_gateway.instalments import Quote
from pos_gateway.money import Currency


class Copy(Enum):
    """For whom."""

    CUSTOMER = "customer"
    MERCHANT = "merchant"


@dataclass(frozen=True, slots=True)
class Shop:
    """Where papers come from."""

    merchant_name: str
    merchant_id: str
    terminal_id: str
    issuer: str
    unit: Currency
    zone: tzinfo | None = None
    training: bool = False


@dataclass(frozen=True, slots=True)
class Sale:
    """What a receipt tells of one payment. `verdict_known`: the ledger has it; `proof`: what the QR says."""

    facts: Mapping[str, Any]
    approved: bool
    sequence: int
    plan: Quote | None
    refunded_minor: int = 0
    voided: bool = False
    presented_by_unix_ms: int | None = None
    verdict_known: bool = False
    proof: str = ""
    duplicate: bool = False


def approval_code(sequence: int) -> str:
    """The reference that shop, customer and issuer find the approval by."""
    return f"{sequence % 1_000_000:06d}"


def percent(ppm: int) -> str:
    return f"{Decimal(ppm).scaleb(-4).quantize(Decimal('0.01'))}%"


def receipt(shop: Shop, sale: Sale, copy: Copy, language: Language) -> Paper:
    _ = language.tell
    facts, unit = sale.facts, shop.unit
    at = datetime.fromtimestamp(facts["at_unix_ms"] / 1000, shop.zone).astimezone(shop.zone)
    lines: list[Line] = [Centred(shop.merchant_name, Weight.STRONG)]
    if sale.duplicate:
        lines.append(Centred(_("DUPLICATE"), Weight.STRONG))
    lines += [
        Rule(),
        Pair(_("Date"), f"{at:%Y-%m-%d}"),
        Pair(_("Time"), f"{at:%H:%M:%S %z}"),
        Pair(_("Merchant"), shop.merchant_id),
        Pair(_("Terminal"), shop.terminal_id),
    ]
    if facts.get("token_last4"):
        lines.append(Pair(_("Card"), f"**** **** **** {facts['token_last4']}"))
    if facts.get("aid"):
        lines.append(Pair("AID", facts["aid"].upper()))
    lines += [
        Rule(),
        Centred(f"{unit.code} {unit.format(facts['amount_minor'])}", Weight.BIG),
        Centred(_("APPROVED") if sale.approved else _("DECLINED – not paid"), Weight.STRONG),
    ]
    if not sale.approved:
        told = Reason(facts["reason"]).explanation
        lines.append(Centred(told.chinese if language.code == "zh" else told.english))
    if sale.approved:
        lines += _approved(shop, sale, copy, language)
    lines += [Rule(), Pair(_("Reference"), facts["sale_id"], Weight.SMALL)]
    if sale.proof and sale.approved:
        lines.append(Qr(sale.proof, _("Signed digest of this decision")))
    lines.append(
        Centred(
            _("Customer copy – please keep it") if copy is Copy.CUSTOMER else _("Merchant copy"), Weight.SMALL
        )
    )
    title = f"{_('Receipt')} {facts['sale_id'][-12:]}"
    return Paper(title, language.tag, lines, _watermark(shop, language))


def _approved(shop: Shop, sale: Sale, copy: Copy, language: Language) -> list[Line]:
    _ = language.tell
    unit = shop.unit
    lines: list[Line] = [
        Pair(_("Approval"), approval_code(sale.sequence), Weight.STRONG),
        Centred(_("Offline approval, guaranteed by {issuer}", issuer=shop.issuer)),
    ]
    if copy is Copy.MERCHANT and sale.presented_by_unix_ms is not None and not sale.verdict_known:
        until = datetime.fromtimestamp(sale.presented_by_unix_ms / 1000, shop.zone).astimezone(shop.zone)
        lines.append(Pair(_("To reach the issuer by"), f"{until:%Y-%m-%d %H:%M}", Weight.SMALL))
    if (plan := sale.plan) is not None:
        first, last = plan.instalments[0].total_minor, plan.instalments[-1].total_minor
        lines += [
            Rule(),
            Centred(_("Instalments"), Weight.STRONG),
            Pair(_("Payments"), f"{plan.periods} × {unit.format(first)} {unit.code}"),
        ]
        if last != first:
            lines.append(Pair(_("Last payment"), f"{unit.format(last)} {unit.code}"))
        lines += [
            Pair(_("Fees in all"), f"{unit.format(plan.fee_minor)} {unit.code}"),
            Pair(_("To be repaid in all"), f"{unit.format(plan.total_minor)} {unit.code}"),
            Pair(_("Annual percentage rate"), percent(plan.annual_percentage_rate_ppm)),
        ]
    if sale.voided:
        lines += [Rule(), Centred(_("VOID – the whole amount was taken back"), Weight.STRONG)]
    elif sale.refunded_minor:
        lines += [
            Rule(),
            Pair(_("Refunded"), f"{unit.format(sale.refunded_minor)} {unit.code}", Weight.STRONG),
        ]
    return lines


def report(
    shop: Shop, title: str, head: list[tuple[str, str]], totals: Mapping[str, Any], language: Language
) -> Paper:
    """An X, Z or shift report. `head`: what stands above the sums."""
    _ = language.tell
    unit = shop.unit

    def money(amount_minor: int) -> str:
        return f"{unit.format(amount_minor)} {unit.code}"

    def counted(name: str, key: str, weight: Weight = Weight.PLAIN, sign: int = 1) -> Pair:
        pair = totals[key]
        return Pair(f"{name} ({pair['count']})", money(sign * pair["amount_minor"]), weight)

    words = {
        "provisional": _("PROVISIONAL – the ledger has not agreed to all of it yet"),
        "settled": _("SETTLED – the ledger agrees"),
        "differs": _("SETTLED, WITH DIFFERENCES – see below"),
    }
    lines: list[Line] = [Centred(shop.merchant_name, Weight.STRONG), Centred(title, Weight.STRONG), Rule()]
    lines += [Pair(name, value) for name, value in head]
    lines += [
        Pair(_("Journal records"), f"{totals['first_sequence']} – {totals['last_sequence']}"),
        Rule(),
        counted(_("Sales"), "sales"),
        counted(_("Voids"), "voids", sign=-1),
        counted(_("Refunds"), "refunds", sign=-1),
        Pair(_("Takings"), money(totals["net_minor"]), Weight.STRONG),
        counted(_("of them sold in instalments"), "instalments", Weight.SMALL),
        Rule(),
        Centred(words[totals["state"]], Weight.STRONG),
    ]
    if totals["waiting"]["count"]:
        lines.append(counted(_("Guaranteed, on its way to the ledger"), "waiting"))
    if totals["review"]["count"]:
        lines.append(counted(_("Under review at the issuer"), "review"))
    if totals["not_paid"]["count"]:
        lines.append(counted(_("Not paid: call the issuer"), "not_paid", Weight.STRONG))
    if totals["declined"]:
        lines += [Rule(), Centred(_("Declined"), Weight.STRONG)]
        for reason, count in sorted(totals["declined"].items()):
            told = Reason(reason).explanation
            lines.append(
                Pair(told.chinese if language.code == "zh" else told.english, f"{count} ×", Weight.SMALL)
            )
    return Paper(title, language.tag, lines, _watermark(shop, language))


def _watermark(shop: Shop, language: Language) -> str:
    return language.tell("TRAINING – NO MONEY") if shop.training else ""
