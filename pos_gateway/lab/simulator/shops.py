"""A shop's gateway: the real judgement over the real limits; its journal is a list, its clock is given."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Final
from uuid import UUID

from pos_gateway.authorization.at_hand import AtHand, Source, at_hand, terms_in_force
from pos_gateway.authorization.decision import (
    Ask,
    Decline,
    Evidence,
    Interval,
    Request,
    judge_claim,
    judge_cryptogram,
    judge_grant,
    judge_request,
)
from pos_gateway.authorization.policy import Exposure, Policy
from pos_gateway.lab.simulator.books import Renunciation, Tap
from pos_gateway.lab.simulator.cards import Answer, Card
from pos_gateway.limits.header import freshness
from pos_gateway.limits.layers import Layers
from pos_gateway.limits.single import SingleLimit

_EFFECTIVE: Final = date(2020, 1, 1)
_EXPIRES: Final = date(2099, 12, 31)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a card was asked for: the ceiling and the record it signs."""

    request: Request
    ask: Ask
    digest: bytes
    signed: bytes
    valid_until_unix_s: int


@dataclass(slots=True)
class Gateway:
    """`skew_s`: how far its clock is off. `frozen_unix_ms`: a thief keeps turning it back to then."""

    terminal_id: str
    policy: Policy
    line: bool = True
    synchronised: bool = True
    skew_s: int = 0
    frozen_unix_ms: int | None = None
    layers: Layers | None = None
    epoch: int = 0
    queue: list[Tap] = field(default_factory=list)
    renounced: list[Renunciation] = field(default_factory=list)
    kept: deque[tuple[int, Tap]] = field(default_factory=deque)
    """Acknowledged records, and when they were: presented again in another epoch."""
    seen: dict[bytes, list[Interval]] = field(default_factory=dict)
    high_water_unix_ms: int = 0
    queued_minor: int = 0
    queued_online_minor: int = 0

    @property
    def stolen(self) -> bool:
        return self.frozen_unix_ms is not None

    def now_unix_ms(self, at_unix_ms: int) -> int:
        return self.frozen_unix_ms if self.frozen_unix_ms is not None else at_unix_ms + 1000 * self.skew_s

    @property
    def exposure(self) -> Exposure:
        oldest = self.queue[0].at_unix_ms if self.queue else None
        if self.stolen:
            # The thief's gateway forgets what it has let through.
            return Exposure(0, 0, None)
        return Exposure(len(self.queue), self.queued_minor, oldest, self.queued_online_minor)

    def ask(self, at_unix_ms: int, sale: int, card: Card, amount_minor: int) -> Asked | Decline:
        """What stands before GENERATE AC in a till."""
        now_unix_ms = self.now_unix_ms(at_unix_ms)
        now_unix_s = now_unix_ms // 1000
        layers = self.layers
        record = header = None
        if layers is not None:
            record, header = layers.lookup(card.token_key)
        newest = layers.newest if layers is not None else None
        note: SingleLimit | None = card.note
        singles: tuple[AtHand, ...] = ()
        if note is not None and newest is not None:
            found = at_hand(note, newest, terminal_id=self.terminal_id, now_unix_s=now_unix_s)
            singles = (found,)
        request = Request(
            amount_minor=amount_minor,
            today=_day(now_unix_s // 86_400),
            now_unix_ms=now_unix_ms,
            clock_high_water_unix_ms=0 if self.stolen else self.high_water_unix_ms,
            card_effective=_EFFECTIVE,
            card_expires=_EXPIRES,
            device_can_verify_holder=card.is_phone,
            freshness=freshness(header, now_unix_s) if header is not None else None,
            stale_per_tap_cap_minor=header.policy.stale_per_tap_cap_minor if header is not None else 0,
            record=record,
            exposure=self.exposure,
            policy=self.policy,
            singles=singles,
            online=terms_in_force(newest, now_unix_s),
            issuer_reachable=self.line,
        )
        judgement = judge_request(request)
        if isinstance(judgement, Decline):
            return judgement
        digest, valid_until_unix_s = bytes(16), 0
        if judgement.single is not None and note is not None:
            digest, valid_until_unix_s = judgement.single.digest, note.valid_until_unix_s
        elif record is not None and header is not None and not judgement.issuer_first:
            digest, valid_until_unix_s = record.digest(header.nonce), header.valid_until_unix_s
        return self._asked(request, judgement, sale, digest, valid_until_unix_s)

    def ask_again(self, at_unix_ms: int, sale: int, before: Asked, grant: SingleLimit) -> Asked | Decline:
        """After an ARQC, with the ledger's grant in hand."""
        if self.layers is None:
            raise AssertionError("a grant without limits")
        now_unix_s = self.now_unix_ms(at_unix_ms) // 1000
        found = at_hand(grant, self.layers.newest, terminal_id=self.terminal_id, now_unix_s=now_unix_s)
        judgement = judge_grant(before.request, found, before.ask.ceiling)
        if isinstance(judgement, Decline):
            return judgement
        return self._asked(before.request, judgement, sale, grant.digest, grant.valid_until_unix_s)

    def take(self, at_unix_ms: int, sale: int, card: Card, asked: Asked, answer: Answer) -> Tap | Decline:
        """Judge the card's answer; an approval is journalled."""
        request = asked.request
        claim = judge_cryptogram(
            Evidence(
                sale_id=UUID(int=sale),
                amount_minor=request.amount_minor,
                ceiling=asked.ask.ceiling,
                kind=answer.kind,
                iad=answer.iad,
                policy=self.policy,
            )
        )
        if isinstance(claim, Decline):
            return claim
        seen = self.seen.setdefault(card.token_key, [])
        verdict = judge_claim(claim, seen)
        if isinstance(verdict, Decline):
            return verdict
        seen.append(verdict.interval)
        tap = Tap(
            id=sale,
            token_key=card.token_key,
            amount_minor=request.amount_minor,
            counter_before=verdict.interval.before,
            counter_after=verdict.interval.after,
            limit_digest=asked.digest,
            at_unix_ms=request.now_unix_ms,
            previous_digest=answer.iad.previous_digest,
        )
        self.queue.append(tap)
        self.queued_minor += tap.amount_minor
        if asked.ask.source is not Source.SNAPSHOT:
            self.queued_online_minor += tap.amount_minor
        self.high_water_unix_ms = max(self.high_water_unix_ms, request.now_unix_ms)
        return tap

    def renounce(self, card: Card, asked: Asked, signed_digest: bytes) -> None:
        self.renounced.append(Renunciation(card.token_key, signed_digest, asked.request.amount_minor))

    def acknowledged(self, at_unix_ms: int, keep_ms: int) -> None:
        """Everything in the queue has its verdict."""
        self.kept.extend((at_unix_ms, tap) for tap in self.queue)
        while self.kept and self.kept[0][0] < at_unix_ms - keep_ms:
            self.kept.popleft()
        self.queue.clear()
        self.renounced.clear()
        self.queued_minor = self.queued_online_minor = 0

    def _asked(self, request: Request, ask: Ask, sale: int, digest: bytes, valid_until_unix_s: int) -> Asked:
        signed = b"%d/%d/%s/%d/" % (sale, request.amount_minor, self.terminal_id.encode(), ask.ceiling)
        return Asked(request, ask, digest, signed + digest, valid_until_unix_s)


@lru_cache(maxsize=1024)
def _day(days: int) -> date:
    return datetime.fromtimestamp(86_400 * days, UTC).date()
