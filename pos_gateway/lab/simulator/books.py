"""The ledger in memory: the same pure rules as the ledger on its database, for histories of millions.

What decides is the product's: counter lines, evidence, ceilings and the invariant (`ledger.reserve`),
allowances (`ledger.use`), the policy. What a transaction does to the tables is done to objects here;
`tests/lab/test_simulator_ledger.py` holds both to one history. The invariant is checked after every change.
"""

from __future__ import annotations

import copy
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.reserve import (
    CounterLine,
    IntervalSet,
    InvariantBroken,
    Publication,
    PublicationKind,
    check_invariant,
    claimable,
    contains,
    interval_set,
    measure,
    subtract,
    union,
)
from pos_gateway.ledger.use import Allowance, Debits, Use, UsePolicy, allowances, ceiling_for, stuck_minor
from pos_gateway.limits.record import LimitRecord, Status
from pos_gateway.records import Verdict

_AT_ONCE_S: Final = 600
_NOTHING: Final = Allowance(0, 0)
_TIDY_ABOVE: Final = 12
"""Publications on one line before the needless ones are dropped."""


@dataclass(frozen=True, slots=True)
class Issued:
    """One ceiling that left the house: as a record by itself (`valid_until_unix_s`, `terminal_id`), or in
    a snapshot, whose header says so."""

    kind: PublicationKind
    record: LimitRecord
    nonce: bytes
    digest: bytes
    issued_unix_s: int
    valid_until_unix_s: int
    terminal_id: str | None = None


@dataclass(frozen=True, slots=True)
class Tap:
    """A genuine TC as it comes out of `ledger.evidence.examine`, with what the simulator follows it by."""

    id: int
    token_key: bytes
    amount_minor: int
    counter_before: int
    counter_after: int
    limit_digest: bytes
    at_unix_ms: int
    previous_digest: bytes


@dataclass(frozen=True, slots=True)
class Renunciation:
    """A TC was asked for over these CDOL1 values and its answer never came."""

    token_key: bytes
    signed_digest: bytes
    amount_minor: int


@dataclass(frozen=True, slots=True)
class Judged:
    """`fraud`: the issuer pays, not the customer."""

    verdict: Verdict
    reason: str
    fraud: bool = False
    clone_proven: bool = False


@dataclass(slots=True)
class TokenBook(CounterLine):
    """One token."""

    token_key: bytes = b""
    account: int = 0
    returns: bool = False
    assurance: int = 1
    status: Status = Status.ACTIVE
    per_tap_cap_minor: int = 0
    sequence: int = 0
    record: LimitRecord | None = None
    """In the last snapshot."""
    last_note: Issued | None = None
    issued: dict[bytes, Publication] = field(default_factory=dict)
    """All that ever were, by digest."""
    claims: list[tuple[int, int, int, bool]] = field(default_factory=list)
    """(after, before, tap id, billed) of every genuine TC, while it can matter."""
    renounced: dict[bytes, int] = field(default_factory=dict)
    spent: deque[tuple[int, int, int]] = field(default_factory=deque)
    """(when, how much, how much of it in a shop without a line)"""
    spent_minor: int = 0
    cut_off_minor: int = 0
    largest: deque[tuple[int, int]] = field(default_factory=deque)
    """Of `spent`, those that nothing later passes."""
    known: IntervalSet | None = None
    known_until_unix_s: int = -1
    """U as last worked out, and until when it stays so if nothing is changed."""

    def claimable(self, now_unix_s: int) -> IntervalSet:
        if self.known is None or now_unix_s > self.known_until_unix_s:
            self.known = claimable(self.publications, self.posted, now_unix_s)
            self.known_until_unix_s = min(
                (p.stands_until_unix_s for p in self.publications if p.stands(now_unix_s)), default=1 << 62
            )
        return self.known

    def changed(self) -> None:
        """After any change to what is published or posted."""
        self.known = None

    def overlapping(self, before: int, after: int) -> list[tuple[int, int, int, bool]]:
        return [claim for claim in self.claims if claim[1] < after and before < claim[0]]

    def used(self, now_unix_s: int, window_s: int) -> Use:
        while self.spent and self.spent[0][0] < now_unix_s - window_s:
            _, amount_minor, cut_off_minor = self.spent.popleft()
            self.spent_minor -= amount_minor
            self.cut_off_minor -= cut_off_minor
        while self.largest and self.largest[0][0] < now_unix_s - window_s:
            self.largest.popleft()
        largest_minor = self.largest[0][1] if self.largest else 0
        return Use(self.spent_minor, self.cut_off_minor, largest_minor, self.returns, self.assurance)

    def uses(self, now_unix_s: int, amount_minor: int, *, cut_off: bool) -> None:
        self.spent.append((now_unix_s, amount_minor, amount_minor if cut_off else 0))
        self.spent_minor += amount_minor
        self.cut_off_minor += amount_minor if cut_off else 0
        while self.largest and self.largest[-1][1] <= amount_minor:
            self.largest.pop()
        self.largest.append((now_unix_s, amount_minor))


@dataclass(slots=True)
class AccountBook:
    """One account. `limit_minor` is in force, `target_minor` is where a cut is going."""

    limit_minor: int
    target_minor: int
    outstanding_minor: int
    uncleared_minor: int = 0
    tokens: list[TokenBook] = field(default_factory=list)
    debits: deque[tuple[int, int]] = field(default_factory=deque)
    debited_minor: int = 0
    repayments: dict[int, int] = field(default_factory=dict)

    @property
    def owable_minor(self) -> int:
        return self.limit_minor - self.outstanding_minor - self.uncleared_minor

    def reserve_minor(self, now_unix_s: int) -> int:
        return sum(measure(token.claimable(now_unix_s)) for token in self.tokens)

    def free_minor(self, now_unix_s: int) -> int:
        return self.owable_minor - self.reserve_minor(now_unix_s)

    def debited(self, now_unix_s: int, window_s: int) -> Debits:
        while self.debits and self.debits[0][0] < now_unix_s - window_s:
            self.debited_minor -= self.debits.popleft()[1]
        return Debits(self.debited_minor, max((amount for _, amount in self.debits), default=0))


@dataclass(slots=True)
class _State:
    """All that a database would hold."""

    accounts: list[AccountBook] = field(default_factory=list)
    tokens: dict[bytes, TokenBook] = field(default_factory=dict)
    seen: dict[int, Judged] = field(default_factory=dict)
    suspended: dict[str, None] = field(default_factory=dict)
    complete_until_unix_ms: dict[str, int] = field(default_factory=dict)
    fraud_minor: dict[int, int] = field(default_factory=dict)
    """What the issuer paid for itself, by tap."""
    billed_minor: dict[int, int] = field(default_factory=dict)
    """What customers were billed, by tap."""


class Books:
    """Functions take `now_unix_s`, true time: the ledger's clock is right."""

    def __init__(self, policy: Policy, nonce: Callable[[], bytes]) -> None:
        self.policy = policy
        self.use = policy.use or UsePolicy()
        self.guarantee = policy.guarantee
        self.epoch = 0
        self._nonce = nonce
        self._state = _State()
        self._log: list[tuple[int, bytes, Publication, LimitRecord]] = []
        self._backup: tuple[int, _State] | None = None
        self._feed: list[tuple[str, tuple[Any, ...]]] = []
        self._excess_minor: dict[int, int] = {}
        self.proven: dict[bytes, int] = {}
        """Tokens that a contradiction has proven to be copied, and since when."""

    @property
    def accounts(self) -> list[AccountBook]:
        return self._state.accounts

    def token(self, token_key: bytes) -> TokenBook:
        return self._state.tokens[token_key]

    def tokens(self) -> list[TokenBook]:
        return list(self._state.tokens.values())

    @property
    def fraud_minor(self) -> dict[int, int]:
        return self._state.fraud_minor

    @property
    def billed_minor(self) -> dict[int, int]:
        return self._state.billed_minor

    # Accounts and their decisions

    def open_account(self, limit_minor: int, owed_minor: int) -> int:
        self.accounts.append(AccountBook(limit_minor, limit_minor, owed_minor))
        return len(self.accounts) - 1

    def issue_token(
        self, account: int, token_key: bytes, counter: int, *, returns: bool, assurance: int
    ) -> None:
        self._keep("issue_token", account, token_key, counter, returns=returns, assurance=assurance)
        if token_key in self._state.tokens:
            return
        book = TokenBook(
            counter,
            token_key=token_key,
            account=account,
            returns=returns,
            assurance=assurance,
            per_tap_cap_minor=self.policy.per_tap_cap_minor,
        )
        self._state.tokens[token_key] = book
        self.accounts[account].tokens.append(book)

    def set_status(self, token_key: bytes, status: Status) -> None:
        self._keep("set_status", token_key, status)
        self.token(token_key).status = status

    def suspend(self, terminal_id: str) -> None:
        """Revoked: what it presents from now on is held for review."""
        self._keep("suspend", terminal_id)
        self._state.suspended[terminal_id] = None

    def set_limit(self, account: int, limit_minor: int, now_unix_s: int) -> None:
        self._keep("set_limit", account, limit_minor, now_unix_s)
        book = self.accounts[account]
        book.target_minor = limit_minor
        book.limit_minor = max(book.limit_minor, limit_minor)
        self._check(account, now_unix_s)

    def repay(self, account: int, reference: int, amount_minor: int, now_unix_s: int, *, final: bool) -> None:
        self._keep("repay", account, reference, amount_minor, now_unix_s, final=final)
        book = self.accounts[account]
        if reference in book.repayments:
            return
        book.outstanding_minor -= amount_minor
        book.repayments[reference] = 0 if final else amount_minor
        book.uncleared_minor += book.repayments[reference]
        self._check(account, now_unix_s)

    def repayment_final(self, account: int, reference: int, now_unix_s: int, *, bounces: bool) -> None:
        self._keep("repayment_final", account, reference, now_unix_s, bounces=bounces)
        book = self.accounts[account]
        amount_minor = book.repayments.get(reference, 0)
        book.repayments[reference] = 0
        book.uncleared_minor -= amount_minor
        book.outstanding_minor += amount_minor if bounces else 0
        self._check(account, now_unix_s)

    def debit(self, account: int, amount_minor: int, now_unix_s: int) -> bool:
        """An online purchase that no token's counter covers: out of free credit, or not at all."""
        book = self.accounts[account]
        book.debits.append((now_unix_s, amount_minor))
        book.debited_minor += amount_minor
        if amount_minor > book.free_minor(now_unix_s):
            return False
        self.post_debit(account, amount_minor, now_unix_s)
        self._check(account, now_unix_s)
        return True

    def post_debit(self, account: int, amount_minor: int, now_unix_s: int) -> None:
        self._keep("post_debit", account, amount_minor, now_unix_s)
        self.accounts[account].outstanding_minor += amount_minor

    # Giving out ceilings

    def issue(
        self,
        token: TokenBook,
        kind: PublicationKind,
        ceiling: int,
        now_unix_s: int,
        valid_until_unix_s: int,
        terminal_id: str | None = None,
        nonce: bytes | None = None,
        record: LimitRecord | None = None,
    ) -> Issued:
        """As `ledger.issue.issue`.

        Raises:
            InvariantBroken: the account has not that much free; nothing was recorded.
        """
        free_minor = max(self.accounts[token.account].free_minor(now_unix_s), 0)
        if token.cost_minor(ceiling, now_unix_s) > free_minor:
            raise InvariantBroken("not so much is free")
        if record is None:
            token.sequence += 1
            record = self._record(token, ceiling)
        nonce = self._nonce() if nonce is None else nonce
        digest = record.digest(nonce)
        publication = Publication(
            highest=token.highest,
            ceiling=ceiling,
            stands_until_unix_s=self.guarantee.stands_until_unix_s(valid_until_unix_s),
            valid_until_unix_s=valid_until_unix_s,
            issued_unix_s=now_unix_s,
            terminal_id=terminal_id,
            digest=digest,
        )
        self._record_publication(token, publication)
        self._log.append((now_unix_s, token.token_key, publication, record))
        return Issued(kind, record, nonce, digest, now_unix_s, valid_until_unix_s, terminal_id)

    def publish(
        self, now_unix_s: int, nonce: bytes, valid_until_unix_s: int, only: list[TokenBook] | None = None
    ) -> list[LimitRecord]:
        """Every token's next record under one header, or a delta's: those in `only`."""
        found = []
        for account, book in enumerate(self.accounts):
            if only is not None and not any(token in only for token in book.tokens):
                continue
            self.lapse(account, now_unix_s)
            targets = self.targets(account, now_unix_s)
            for token in book.tokens:
                if only is not None and token not in only:
                    continue
                ceiling = self.ceiling(
                    token, targets.get(token.token_key, _NOTHING).snapshot_minor, now_unix_s
                )
                record = self._record(token, ceiling if token.status is Status.ACTIVE else 0)
                if token.record is None or record != token.record:
                    token.sequence += 1
                    record = record._replace(sequence=token.sequence)
                token.record = record
                if token.status is Status.ACTIVE:
                    self.issue(
                        token,
                        PublicationKind.SNAPSHOT,
                        ceiling,
                        now_unix_s,
                        valid_until_unix_s,
                        nonce=nonce,
                        record=record,
                    )
                found.append(record)
            self._check(account, now_unix_s)
        return found

    def targets(self, account: int, now_unix_s: int) -> dict[bytes, Allowance]:
        """What each active token should hold, in minor units."""
        book, window_s = self.accounts[account], self.use.window_s
        active = [token for token in book.tokens if token.status is Status.ACTIVE]
        wanted = allowances(
            self.use,
            [token.used(now_unix_s, window_s) for token in active],
            book.debited(now_unix_s, window_s),
            owable_minor=book.owable_minor - sum(_stuck_minor(token, now_unix_s) for token in book.tokens),
            limit_minor=book.target_minor,
        )
        return {token.token_key: each for token, each in zip(active, wanted, strict=True)}

    def ceiling(self, token: TokenBook, target_minor: int, now_unix_s: int, needed_minor: int = 0) -> int:
        """The next ceiling of a token that should have `target_minor` ahead of it, and needs
        `needed_minor` at once."""
        return ceiling_for(
            token.claimable(now_unix_s),
            token.highest,
            ahead_minor=max(target_minor, needed_minor),
            free_minor=self.accounts[token.account].free_minor(now_unix_s),
        )

    def hear(self, token: TokenBook, counter: int, relied_on: bytes, now_unix_s: int) -> bool:
        """An authenticated ARQC. False: its counter lies below what was heard before: there are two cards."""
        published = token.issued.get(relied_on)
        issued_unix_s = published.issued_unix_s if published is not None else 0
        if counter < token.highest:
            return False
        cut = token.observe(
            counter_before=counter,
            counter_after=counter,
            relied_on_issued_unix_s=issued_unix_s,
            guarantee=self.guarantee,
        )
        if cut:
            token.changed()
        return True

    def grant(self, token: TokenBook, terminal_id: str, amount_minor: int, now_unix_s: int) -> Issued | None:
        """For one tap of `amount_minor` at that terminal now; None if credit does not suffice."""
        if token.status is not Status.ACTIVE:
            return None
        self.lapse(token.account, now_unix_s)
        target_minor = self.targets(token.account, now_unix_s)[token.token_key].note_minor
        ceiling = self.ceiling(token, target_minor, now_unix_s, amount_minor)
        if ceiling < token.highest + amount_minor:
            return None
        ceiling = token.highest + amount_minor
        valid_until_unix_s = now_unix_s + self.policy.online.grant_life_s
        return self.issue(token, PublicationKind.GRANT, ceiling, now_unix_s, valid_until_unix_s, terminal_id)

    def note(self, token: TokenBook, now_unix_s: int, needed_minor: int = 0) -> Issued | None:
        """What the customer may carry to shops without a line; None if there is nothing to give."""
        if token.status is not Status.ACTIVE:
            return None
        self.lapse(token.account, now_unix_s)
        target_minor = self.targets(token.account, now_unix_s)[token.token_key].note_minor
        ceiling = self.ceiling(token, target_minor, now_unix_s, needed_minor)
        last = token.last_note
        if (
            last is not None
            and last.record.ceiling == ceiling
            and last.valid_until_unix_s - now_unix_s > self.use.note_renew_s
        ):
            return last
        valid_until_unix_s = now_unix_s + self.policy.online.note_life_s
        token.last_note = self.issue(token, PublicationKind.NOTE, ceiling, now_unix_s, valid_until_unix_s)
        return token.last_note

    def surplus_minor(self, token: TokenBook, now_unix_s: int) -> int:
        """How much more a token has ahead of it than it should."""
        target_minor = self.targets(token.account, now_unix_s).get(token.token_key, _NOTHING).note_minor
        return measure(token.claimable(now_unix_s)) - _stuck_minor(token, now_unix_s) - target_minor

    def return_all(self, token: TokenBook, counter: int, now_unix_s: int) -> int:
        """The token claims all it could still claim, with the issuer as merchant and no money owed; the
        counter that it moves to."""
        claim = token.claimable(now_unix_s)
        end = max([counter, *(end for _, end in claim)])
        self.write_off(token, counter, end)
        token.highest = max(token.highest, end)
        self._check(token.account, now_unix_s)
        return end

    def write_off(self, token: TokenBook, before: int, after: int) -> None:
        if before < after:
            token.posted.append((before, after))
            token.changed()

    # What shops present

    def present(
        self,
        terminal_id: str,
        taps: list[Tap],
        renounced: list[Renunciation],
        complete_until_unix_ms: int,
        now_unix_s: int,
    ) -> list[Judged]:
        """One batch of one gateway: `ledger.settlement` says what each verdict means."""
        judged = [self._present(terminal_id, tap, now_unix_s) for tap in taps]
        for renunciation in renounced:
            if renunciation.token_key in self._state.tokens:
                token = self.token(renunciation.token_key)
                token.renounced[renunciation.signed_digest] = renunciation.amount_minor
        before_unix_ms = self._state.complete_until_unix_ms.get(terminal_id, 0)
        # A clock that runs ahead must not make what it stamps once it is right look old.
        believed_unix_ms = 1000 * (now_unix_s - self.guarantee.clock_tolerance_s)
        told_unix_ms = min(complete_until_unix_ms, believed_unix_ms)
        self._state.complete_until_unix_ms[terminal_id] = max(before_unix_ms, told_unix_ms)
        return judged

    def _free_grants(self, token: TokenBook) -> None:
        """Grants of terminals that have told all they approved under them."""
        for terminal_id in sorted({p.terminal_id for p in token.publications if p.terminal_id is not None}):
            told_unix_ms = self._state.complete_until_unix_ms.get(terminal_id, 0)
            token.free(terminal_id, told_unix_ms // 1000, self.guarantee)

    def _present(self, terminal_id: str, tap: Tap, now_unix_s: int) -> Judged:
        seen = self._state.seen.get(tap.id)
        if seen is not None:
            return Judged(Verdict.DUPLICATE if seen.verdict.paid else seen.verdict, seen.reason, seen.fraud)
        if tap.at_unix_ms <= self._state.complete_until_unix_ms.get(terminal_id, 0):
            judged = Judged(Verdict.LATE, "Stamped before what the gateway said was complete.")
        elif tap.token_key not in self._state.tokens:
            judged = Judged(Verdict.UNKNOWN, "This issuer does not know the card.")
        else:
            judged = self._settle(terminal_id, tap, now_unix_s)
        self._state.seen[tap.id] = judged
        return judged

    def _settle(self, terminal_id: str, tap: Tap, now_unix_s: int) -> Judged:
        token = self.token(tap.token_key)
        published = token.issued.get(tap.limit_digest)
        if published is None or tap.counter_after > published.ceiling:
            return Judged(Verdict.INVALID, "Relies on a limit that was never given out.")
        interval = (tap.counter_before, tap.counter_after)
        guaranteed = contains(token.claimable(now_unix_s), interval)
        others = token.overlapping(*interval)
        insort(token.claims, (tap.counter_after, tap.counter_before, tap.id, guaranteed))
        if terminal_id in self._state.suspended:
            return Judged(Verdict.LATE, "The gateway is suspended; it will be reviewed.")
        token.observe(
            counter_before=tap.counter_before,
            counter_after=tap.counter_after,
            relied_on_issued_unix_s=published.issued_unix_s,
            guarantee=self.guarantee,
        )
        token.changed()
        gap_minor = token.renounced.pop(tap.previous_digest, 0)
        if gap_minor:
            self.write_off(token, tap.counter_before - gap_minor, tap.counter_before)
        # A counter below what was heard of before the record was issued that the card signed: two cards.
        proven = bool(others) or tap.counter_before < published.highest
        if proven:
            self.prove(token, now_unix_s)
        if guaranteed:
            self._post(token, tap, now_unix_s)
            return Judged(Verdict.POSTED, "Paid.", clone_proven=proven)
        in_time = now_unix_s <= published.stands_until_unix_s
        if proven and in_time:
            self._state.fraud_minor[tap.id] = tap.amount_minor
            return Judged(Verdict.POSTED, "Paid by the issuer: the card was copied.", True, True)
        if tap.amount_minor <= self.accounts[token.account].free_minor(now_unix_s) and not others:
            self._post(token, tap, now_unix_s)
            return Judged(Verdict.POSTED, "Paid, although late.")
        return Judged(Verdict.LATE, "Outside what the issuer still guarantees; it will be reviewed.")

    def _post(self, token: TokenBook, tap: Tap, now_unix_s: int) -> None:
        book = self.accounts[token.account]
        book.outstanding_minor += tap.amount_minor
        self._state.billed_minor[tap.id] = tap.amount_minor
        self.write_off(token, tap.counter_before, tap.counter_after)
        cut_off = now_unix_s - tap.at_unix_ms // 1000 > _AT_ONCE_S
        token.uses(now_unix_s, tap.amount_minor, cut_off=cut_off)
        self._check(token.account, now_unix_s)

    def dispute(self, token: TokenBook, tap_ids: list[int], now_unix_s: int) -> None:
        """The genuine card's counter, read by the issuer, lies below these payments' claims or its own
        log lacks them: the issuer takes them over, and the token is blocked."""
        for tap_id in tap_ids:
            amount_minor = self._state.billed_minor.pop(tap_id, 0)
            self.accounts[token.account].outstanding_minor -= amount_minor
            self._state.fraud_minor[tap_id] = self._state.fraud_minor.get(tap_id, 0) + amount_minor
        self.prove(token, now_unix_s)
        self._check(token.account, now_unix_s)

    def prove(self, token: TokenBook, now_unix_s: int) -> None:
        """Two cards claim to be this one: it may not pay any more."""
        self.proven.setdefault(token.token_key, now_unix_s)
        token.status = Status.BLOCKED

    # Backup and restore

    def back_up(self, now_unix_s: int) -> None:
        self._backup = (now_unix_s, copy.deepcopy(self._state))
        self._feed = []

    def restore(self, now_unix_s: int) -> bool:
        """From the backup: then the signer's log is replayed, and what comes from elsewhere (banks, online
        merchants, the issuer's own decisions) is fed in again. What shops presented since comes again
        when they see the new epoch."""
        if self._backup is None:
            return False
        backed_up_unix_s, self._state = self._backup
        self._backup = None
        feed, self._feed = self._feed, []
        for name, arguments in feed:
            if name == "issue_token":
                getattr(self, name)(*arguments[0], **arguments[1])
        for issued_unix_s, token_key, publication, record in self._log:
            token = self._state.tokens.get(token_key)
            if token is None or publication.digest in token.issued or issued_unix_s < backed_up_unix_s:
                continue
            self._record_publication(token, publication)
            token.sequence = max(token.sequence, record.sequence)
        until_unix_s = now_unix_s + self.policy.presentment_deadline_s
        for token in self._state.tokens.values():
            token.publications = [
                p if p.stands_until_unix_s >= until_unix_s else _standing_until(p, until_unix_s)
                for p in token.publications
                if p.stands(backed_up_unix_s)
            ]
            token.changed()
        for account, book in enumerate(self.accounts):
            over_minor = -book.free_minor(now_unix_s)
            self._excess_minor[account] = max(over_minor, 0) + 10**15
        for name, arguments in feed:
            getattr(self, name)(*arguments[0], **arguments[1])
        for account, book in enumerate(self.accounts):
            self._excess_minor[account] = max(-book.free_minor(now_unix_s), 0)
        self.epoch += 1
        return True

    def lapse(self, account: int, now_unix_s: int) -> None:
        for token in self.accounts[account].tokens:
            token.claimable(now_unix_s)
            if any(p.terminal_id is not None or not p.stands(now_unix_s) for p in token.publications):
                token.lapse(now_unix_s)
                self._free_grants(token)
                _tidy(token)
                token.changed()

    def _keep(self, name: str, *arguments: object, **named: object) -> None:
        if self._backup is not None:
            self._feed.append((name, (arguments, named)))

    def _record(self, token: TokenBook, ceiling: int) -> LimitRecord:
        return LimitRecord(
            token.token_key,
            ceiling,
            token.per_tap_cap_minor,
            token.sequence,
            token.status,
            token.assurance,
        )

    def _record_publication(self, token: TokenBook, publication: Publication) -> None:
        token.publications.append(publication)
        token.changed()
        token.issued[publication.digest] = publication
        if len(token.publications) > _TIDY_ABOVE:
            _tidy(token)

    def _check(self, account: int, now_unix_s: int) -> None:
        """The invariant, after a change: and a cut goes on as far as it lets."""
        book = self.accounts[account]
        reserve_minor = book.reserve_minor(now_unix_s)
        committed_minor = book.outstanding_minor + book.uncleared_minor + reserve_minor
        if book.limit_minor > book.target_minor:
            book.limit_minor = max(book.target_minor, min(book.limit_minor, committed_minor))
        excess_minor = self._excess_minor.get(account, 0)
        if excess_minor:
            excess_minor = max(min(excess_minor, committed_minor - book.limit_minor), 0)
            self._excess_minor[account] = excess_minor
        check_invariant(
            limit_minor=book.limit_minor + excess_minor,
            outstanding_minor=book.outstanding_minor,
            uncleared_minor=book.uncleared_minor,
            reserves_minor=[reserve_minor],
        )


def _stuck_minor(token: TokenBook, now_unix_s: int) -> int:
    return stuck_minor(token.claimable(now_unix_s), token.highest, may_pay=token.status is Status.ACTIVE)


def _standing_until(publication: Publication, until_unix_s: int) -> Publication:
    return replace(publication, stands_until_unix_s=until_unix_s)


def _tidy(token: TokenBook) -> None:
    """Drop what changes nothing any more: publications whose points are all posted, or lie in others that
    any terminal may use and that outlive them; posted points below all that stand."""
    posted = interval_set(token.posted)
    kept: list[Publication] = []
    covered: IntervalSet = ()
    for publication in sorted(
        token.publications, key=lambda p: (p.valid_until_unix_s, p.stands_until_unix_s, p.end), reverse=True
    ):
        points = subtract(((publication.highest, publication.end),), posted)
        if publication.highest >= publication.end or not subtract(points, covered):
            continue
        kept.append(publication)
        if publication.terminal_id is None:
            covered = union(covered, points)
    token.publications = kept
    lowest = min((p.highest for p in kept), default=token.highest)
    token.posted = [interval for interval in posted if interval[1] > lowest]
