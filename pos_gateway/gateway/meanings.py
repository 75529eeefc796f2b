"""What the ledger's verdict means for the merchant's money, in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from pos_gateway.records import Kind, Verdict


class Paid(Enum):
    """How the merchant stands with this record's money."""

    PAID = "paid"
    NOT_PAID = "not_paid"
    UNDER_REVIEW = "under_review"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class Meaning:
    """Each text says what became of the money and what to do."""

    money: Paid
    english: str
    chinese: str

    def as_json(self) -> dict[str, str]:
        return {"money": self.money.value, "english": self.english, "chinese": self.chinese}


def meaning_of(kind: Kind, verdict: Verdict | None) -> Meaning:
    """For a presented record; no verdict: it still waits for the ledger."""
    if verdict is None:
        return _WAITING
    return (_CORRECTIONS if kind.corrects else _PAYMENTS)[verdict]


_WAITING: Final = Meaning(
    Paid.WAITING,
    "Approved and safe on this till; it is paid once the ledger has it. Nothing to do.",
    "已批准并安全保存在本机，送达发卡方账务系统后即付款。无需操作。",
)
_PAYMENTS: Final = {
    Verdict.POSTED: Meaning(Paid.PAID, "Paid. Nothing to do.", "已付款，无需操作。"),
    Verdict.DUPLICATE: Meaning(
        Paid.PAID, "Paid; it had arrived before. Nothing to do.", "已付款（此前已送达），无需操作。"
    ),
    Verdict.CONFLICT: Meaning(
        Paid.NOT_PAID,
        "Not paid: it contradicts another payment of the same card, which may be a copy. "
        "Keep the receipt and call the issuer.",
        "未付款：与同一张卡的另一笔交易相矛盾，该卡可能被复制。请保留小票并联系发卡方。",
    ),
    Verdict.INVALID: Meaning(
        Paid.NOT_PAID,
        "Not paid: the ledger could not verify it. Keep the receipt and call the issuer.",
        "未付款：账务系统无法核验此交易。请保留小票并联系发卡方。",
    ),
    Verdict.LATE: Meaning(
        Paid.UNDER_REVIEW,
        "Under review: genuine, but outside what the issuer guarantees. The issuer decides; "
        "keep the receipt. It may still be paid.",
        "审核中：交易真实，但已超出发卡方担保范围，由发卡方决定。请保留小票，仍有可能付款。",
    ),
    Verdict.UNKNOWN: Meaning(
        Paid.UNDER_REVIEW,
        "Not paid yet: the issuer does not know this card yet. It is presented again by itself; "
        "call the issuer if it stays for a day.",
        "尚未付款：发卡方暂未识别此卡，系统会自动重新提交。如一天后仍未解决，请联系发卡方。",
    ),
}
_CORRECTIONS: Final = {
    Verdict.POSTED: Meaning(
        Paid.PAID,
        "Done: the customer has the money back. Nothing to do.",
        "已完成：款项已退还顾客，无需操作。",
    ),
    Verdict.DUPLICATE: Meaning(
        Paid.PAID,
        "Done; it had arrived before. Nothing to do.",
        "已完成（此前已送达），无需操作。",
    ),
    Verdict.CONFLICT: Meaning(
        Paid.NOT_PAID,
        "Not done: another void or refund came under the same id. The customer has not got this money "
        "back; call the issuer.",
        "未完成：同一编号下已有另一笔撤销或退款，顾客尚未收到此款。请联系发卡方。",
    ),
    Verdict.INVALID: Meaning(
        Paid.NOT_PAID,
        "Not done: the ledger did not accept it. The customer has not got the money back; pay it back "
        "otherwise, or call the issuer.",
        "未完成：账务系统未接受，顾客尚未收到退款。请以其他方式退还，或联系发卡方。",
    ),
    Verdict.LATE: Meaning(
        Paid.UNDER_REVIEW,
        "Under review: the issuer decides about it. Nothing to do.",
        "审核中：由发卡方决定，无需操作。",
    ),
    Verdict.UNKNOWN: Meaning(
        Paid.UNDER_REVIEW,
        "Waits for its payment to arrive; it is presented again by itself. Nothing to do.",
        "等待原交易送达，系统会自动重新提交，无需操作。",
    ),
}
