"""Why a payment is declined: one enum, in the order in which the reasons take precedence.

Where several apply, the one that stands first here is given. `decision` tests them in this order, and
a test holds it to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a reason is told to each audience.

    `response_code`: ISO 8583:1987 field 39. `error_condition`: nexo Retailer 3.0 ErrorCondition.
    """

    response_code: str
    error_condition: str
    english: str
    chinese: str


class Reason(Enum):
    """A decline. The value is the stable name used in journals, APIs and metrics."""

    CARD_NOT_SUPPORTED = "card_not_supported"
    INVALID_CARD_DATA = "invalid_card_data"
    CARD_LEFT = "card_left"
    ISSUER_SLOW = "issuer_slow"
    CARD_EXPIRED = "card_expired"
    UNTRUSTED_CLOCK = "untrusted_clock"
    NO_VALID_LIMITS = "no_valid_limits"
    GATEWAY_CAP = "gateway_cap"
    UNKNOWN_TOKEN = "unknown_token"  # noqa: S105 - a decline reason, not a secret
    BLOCKED = "blocked"
    CLOSED = "closed"
    OVER_TAP_CAP = "over_tap_cap"
    HOLDER_NOT_VERIFIED = "holder_not_verified"
    PLAN_NOT_ALLOWED = "plan_not_allowed"
    OVER_CEILING = "over_ceiling"
    CARD_DECLINED = "card_declined"
    AUTHENTICATION_FAILED = "authentication_failed"
    INTERVAL_OVERLAP = "interval_overlap"

    @property
    def precedence(self) -> int:
        """0 comes first."""
        return _PRECEDENCE[self]

    @property
    def explanation(self) -> Explanation:
        return _EXPLANATIONS[self]


_PRECEDENCE = {reason: place for place, reason in enumerate(Reason)}

_EXPLANATIONS = {
    Reason.CARD_NOT_SUPPORTED: Explanation(
        "12", "InvalidCard", "This card is not accepted here.", "本店不受理此卡。"
    ),
    Reason.INVALID_CARD_DATA: Explanation(
        "30", "InvalidCard", "The card could not be read properly.", "无法正确读取此卡。"
    ),
    Reason.CARD_LEFT: Explanation(
        "19",
        "Cancel",
        "The card was taken away too early. Please tap again.",
        "卡片离开过早，请重新轻触。",
    ),
    Reason.ISSUER_SLOW: Explanation(
        "91",
        "UnreachableHost",
        "The card's issuer is being asked. Please tap again.",
        "正在向发卡方确认，请再次轻触。",
    ),
    Reason.CARD_EXPIRED: Explanation("54", "InvalidCard", "The card has expired.", "卡片已过期。"),
    Reason.UNTRUSTED_CLOCK: Explanation(
        "96",
        "UnavailableService",
        "This till's clock is not trusted. A manager must confirm the time.",
        "收银设备时钟不可信，请店长确认时间。",
    ),
    Reason.NO_VALID_LIMITS: Explanation(
        "91",
        "UnavailableService",
        "No valid credit limits are on this till. Connect it to the network.",
        "本机没有有效的额度数据，请连接网络更新。",
    ),
    Reason.GATEWAY_CAP: Explanation(
        "61",
        "PaymentRestriction",
        "This till has reached what it may approve before it synchronises.",
        "本机离线受理额度已用完，请联网同步。",
    ),
    Reason.UNKNOWN_TOKEN: Explanation(
        "14", "Refusal", "This card has no limit here yet.", "此卡暂无可用额度。"
    ),
    Reason.BLOCKED: Explanation("62", "Refusal", "This card is blocked.", "此卡已被冻结。"),
    Reason.CLOSED: Explanation("78", "Refusal", "This card has been closed.", "此卡已注销。"),
    Reason.OVER_TAP_CAP: Explanation(
        "61",
        "PaymentRestriction",
        "The amount is more than one tap may be.",
        "金额超过单次轻触上限。",
    ),
    Reason.HOLDER_NOT_VERIFIED: Explanation(
        "70", "Refusal", "Unlock the phone and tap again.", "请先解锁手机，再重新轻触。"
    ),
    Reason.PLAN_NOT_ALLOWED: Explanation(
        "57",
        "PaymentRestriction",
        "This card cannot pay in these instalments here.",
        "此卡在本店不支持该分期方案。",
    ),
    Reason.OVER_CEILING: Explanation(
        "51",
        "Refusal",
        "Not enough credit can be confirmed for this amount.",
        "可确认的额度不足以支付此金额。",
    ),
    Reason.CARD_DECLINED: Explanation("05", "Refusal", "The card declined.", "卡片拒绝了此交易。"),
    Reason.AUTHENTICATION_FAILED: Explanation(
        "63", "Refusal", "The card could not be proven genuine.", "无法验证此卡的真实性。"
    ),
    Reason.INTERVAL_OVERLAP: Explanation(
        "59",
        "Refusal",
        "This card contradicts an earlier payment. Both are kept as evidence.",
        "此卡与先前交易相矛盾，两份记录均已留存。",
    ),
}
