"""Answered on the spot: grants for a shop, notes for a card, returns from a phone.

    proof ─► is it the card's (no database) ─► one transaction: evidence, policy, `issue`, the answer kept
          ─► commit ─► signer's log ─► out

The same question gets the same answer, by asker, sale and token; the same sale with other content is an
alarm. A phone has no certificate: its card's cryptogram over a challenge of ours, minutes old at most, says
who it is. Nothing here moves money.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.authorization.reasons import Reason
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import (
    ISSUER_MERCHANT,
    ISSUER_TERMINAL,
    TRANSACTION_TYPE_INQUIRY,
    TRANSACTION_TYPE_PURCHASE,
    TRANSACTION_TYPE_RETURN,
)
from pos_gateway.emv.note import put_note_data
from pos_gateway.emv.transcript import Transcript
from pos_gateway.errors import AuthenticationFailed, Conflict, InvalidMessage
from pos_gateway.inquiry import (
    Inquiry,
    NoteToWrite,
    OnlineAnswer,
    OwnLimit,
    Refusal,
    wallet_transcript,
)
from pos_gateway.ledger import accounts, gateways, habits, store
from pos_gateway.ledger.accounts import LockedAccount, TokenLine, TokenStatus
from pos_gateway.ledger.batch import AlarmKind
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.evidence import Issuer
from pos_gateway.ledger.issue import Issued, issue
from pos_gateway.ledger.online import OnlineKey, OnlineKeys
from pos_gateway.ledger.publisher import online_terms
from pos_gateway.ledger.reserve import (
    InvariantBroken,
    PublicationKind,
    contains,
    next_ceiling,
)
from pos_gateway.ledger.shown import Shown, read_shown
from pos_gateway.ledger.signer_log import SignerLog
from pos_gateway.ledger.store import Store
from pos_gateway.ledger.use import ceiling_for
from pos_gateway.limits.header import OnlineTerms
from pos_gateway.limits.note import NONCE_BYTES as SEAL_NONCE_BYTES
from pos_gateway.limits.note import seal_note
from pos_gateway.limits.record import NONCE_BYTES
from pos_gateway.limits.single import ANY_TERMINAL, Kind, SingleLimit
from pos_gateway.records import open_proof, verify_batch

WALLET: Final = "wallet"
CHALLENGE_LIFE_S: Final = 120

_CHALLENGE_DOMAIN: Final = b"pos-gateway wallet challenge 1\0"
_TIME_BYTES: Final = 4
_RANDOM_BYTES: Final = 4
_MAC_BYTES: Final = 8
_WHOLE: Final = 100


@dataclass(frozen=True, slots=True)
class _Question:
    """One cryptogram with who brought it and what is wanted."""

    shown: Shown
    asker: str
    purpose: str
    content: bytes = field(repr=False)


@dataclass(slots=True)
class _Case:
    """A question inside its transaction."""

    connection: sa.Connection
    question: _Question
    account: LockedAccount
    line: TokenLine
    policy: Policy
    terms: OnlineTerms
    signer: OnlineKey | None
    issued: list[Issued] = field(default_factory=list)

    @property
    def shown(self) -> Shown:
        return self.question.shown

    @property
    def per_tap_cap_minor(self) -> int:
        """As the token's limit records say it."""
        row = self.line.row
        return self.policy.allowance.per_tap_cap_minor(row.assurance, row.per_tap_cap_minor)


class Desk:
    """Answers for one ledger. Safe to share between threads."""

    def __init__(
        self,
        database: Store,
        issuer: Issuer,
        keys: OnlineKeys,
        log: SignerLog,
        policy: Callable[[], Policy],
        now_unix_ms: Callable[[], int],
    ) -> None:
        self._database = database
        self._issuer = issuer
        self._keys = keys
        self._log = log
        self._policy = policy
        self._now_unix_ms = now_unix_ms

    def grant(self, gateway_id: str, body: bytes, signature: bytes) -> str:
        """Answer an ARQC: a grant for that terminal, with a note for the card when there is credit for one,
        or a refusal. JSON of `OnlineAnswer`.

        Raises:
            AuthenticationFailed: not this gateway's, or not a genuine ARQC for this sale there.
            InvalidInput: the body or the proof cannot be read.
            Conflict: this sale was asked about before with other content.
            Unavailable, OutcomeUnknown: see `Store.write`; the same can be asked again.
        """
        shown = self._from_gateway(gateway_id, body, signature)
        if shown.kind is not CryptogramKind.ARQC:
            raise AuthenticationFailed("a grant answers an ARQC", step="cryptogram kind")
        return self._answer(_Question(shown, gateway_id, "grant", body), self._decide_grant)

    def note(self, gateway_id: str, body: bytes, signature: bytes) -> str:
        """A note for the card that has just paid or asked at this gateway; raises as `grant`."""
        shown = self._from_gateway(gateway_id, body, signature)
        return self._answer(_Question(shown, gateway_id, "note", body), self._decide_note)

    def challenge(self) -> str:
        """Sixteen bytes in hex, to be bound as sale id; good for two minutes at any replica."""
        at = int(self._now_unix_ms() / 1000).to_bytes(_TIME_BYTES, "big") + secrets.token_bytes(_RANDOM_BYTES)
        return (at + self._challenge_mac(at)).hex()

    def wallet_note(self, body: bytes) -> str:
        """A note for a phone: an ARQC addressed to the issuer over a fresh challenge.

        Raises:
            AuthenticationFailed: no such ARQC, or no fresh challenge of ours.
            Others as `grant`.
        """
        shown = self._from_wallet(body, CryptogramKind.ARQC, TRANSACTION_TYPE_INQUIRY)
        return self._answer(_Question(shown, WALLET, "note", body), self._decide_note)

    def wallet_return(self, body: bytes) -> str:
        """Take unused allowance back: a TC addressed to the issuer claims the points, no money is owed for
        them, and nobody else can claim them any more. Raises as `wallet_note`."""
        shown = self._from_wallet(body, CryptogramKind.TC, TRANSACTION_TYPE_RETURN)
        return self._answer(_Question(shown, WALLET, "return", body), self._decide_return)

    def _from_gateway(self, gateway_id: str, body: bytes, signature: bytes) -> Shown:
        with self._database.read() as connection:
            gateway = gateways.find(connection, gateway_id)
        verify_batch(body, signature, gateway.key)
        inquiry = Inquiry.from_body(body)
        if inquiry.gateway_id != gateway_id:
            raise InvalidMessage("another gateway's inquiry", where="gateway_id")
        transcript = Transcript.from_bytes(open_proof(inquiry.proof, self._issuer.sealing))
        shown = read_shown(transcript, self._issuer, self._now_unix_ms())
        for what, signed, expected in (
            ("sale", shown.sale_id, inquiry.sale_id),
            ("terminal", shown.terminal_id, gateway.terminal_id),
            ("merchant", shown.merchant_id, gateway.merchant.id),
            ("transaction type", shown.transaction_type, TRANSACTION_TYPE_PURCHASE),
        ):
            if signed != expected:
                raise AuthenticationFailed(f"the {what} is not the one that was signed for", step="facts")
        return shown

    def _from_wallet(self, body: bytes, kind: CryptogramKind, transaction_type: int) -> Shown:
        transcript = Transcript.from_bytes(wallet_transcript(body))
        shown = read_shown(transcript, self._issuer, self._now_unix_ms())
        addressed = (shown.terminal_id, shown.merchant_id, shown.transaction_type)
        if addressed != (ISSUER_TERMINAL, ISSUER_MERCHANT, transaction_type):
            raise AuthenticationFailed("not addressed to the issuer for this", step="facts")
        if shown.kind is not kind:
            raise AuthenticationFailed(f"must be {kind.name}", step="cryptogram kind")
        at, mac = shown.sale_id.bytes[:-_MAC_BYTES], shown.sale_id.bytes[-_MAC_BYTES:]
        age_s = self._now_unix_ms() / 1000 - int.from_bytes(at[:_TIME_BYTES], "big")
        if not hmac.compare_digest(mac, self._challenge_mac(at)) or not -1 <= age_s <= CHALLENGE_LIFE_S:
            raise AuthenticationFailed("it signs no fresh challenge of ours", step="challenge")
        return shown

    def _challenge_mac(self, at: bytes) -> bytes:
        return hmac.digest(self._challenge_key, at, "sha256")[:_MAC_BYTES]

    @cached_property
    def _challenge_key(self) -> bytes:
        # From a secret that no gateway has, and every replica.
        return hmac.digest(self._issuer.sealing.private_bytes_raw(), _CHALLENGE_DOMAIN, "sha256")

    def _answer(self, question: _Question, decide: Callable[[_Case], OnlineAnswer]) -> str:
        policy = self._policy()
        outcome = self._database.transact(
            lambda connection: self._settle(connection, question, policy, decide)
        )
        if isinstance(outcome, Conflict):
            raise outcome
        answer, rows = outcome
        # On disk before anybody can rely on it; again with the same answer, should a crash have come before.
        for row in rows:
            self._log.record_single(row, int(row["issued_unix_s"]))
        return answer

    def _settle(
        self,
        connection: sa.Connection,
        question: _Question,
        policy: Policy,
        decide: Callable[[_Case], OnlineAnswer],
    ) -> tuple[str, list[dict[str, Any]]] | Conflict:
        token = connection.execute(
            sa.select(store.tokens.c.id, store.tokens.c.account_id).filter_by(
                token_key=question.shown.token_key
            )
        ).first()
        if token is None:
            return _refuse(Reason.UNKNOWN_TOKEN).to_json(), []
        account = accounts.lock_account(connection, token.account_id, self._now_unix_ms() // 1000)
        content_digest = hashlib.sha256(question.content).digest()
        mine = {
            "token_id": token.id,
            "asker": question.asker,
            "sale_id": question.shown.sale_id,
            "purpose": question.purpose,
        }
        known = connection.execute(sa.select(store.online_answers).filter_by(**mine)).first()
        if known is not None and known.content_digest == content_digest:
            return known.answer, self._rows_of(connection, token.id, known.answer)
        if known is not None:
            reason = "this sale was asked about before with other content"
            self._alarm(connection, AlarmKind.CHANGED_CONTENT, question, token.account_id, reason)
            return Conflict(reason)
        before_minor = {account.id: account.committed_minor}
        terms = online_terms(connection)
        case = _Case(
            connection=connection,
            question=question,
            account=account,
            line=account.line(token.id),
            policy=policy,
            terms=terms,
            signer=self._keys.signer(terms.keys),
        )
        answer = self._decide(case, decide).to_json()
        accounts.check_accounts(connection, [account.id], account.now_unix_s, before_minor)
        connection.execute(
            store.online_answers.insert().values(
                **mine,
                account_id=account.id,
                content_digest=content_digest,
                answer=answer,
                answered_unix_ms=self._now_unix_ms(),
            )
        )
        return answer, [issued.row for issued in case.issued]

    def _decide(self, case: _Case, decide: Callable[[_Case], OnlineAnswer]) -> OnlineAnswer:
        shown, line = case.shown, case.line
        if shown.counter_after < line.highest and shown.kind is CryptogramKind.ARQC:
            reason = "the card shows a counter below one it has shown before"
            self._alarm(case.connection, AlarmKind.COUNTER_BEHIND, case.question, case.account.id, reason)
            return _refuse(Reason.AUTHENTICATION_FAILED, reason)
        _observe(case)
        if line.status is not TokenStatus.ACTIVE:
            blocked = line.status is TokenStatus.BLOCKED
            return _refuse(Reason.BLOCKED if blocked else Reason.CLOSED)
        return decide(case)

    def _decide_grant(self, case: _Case) -> OnlineAnswer:
        shown, policy = case.shown, case.policy
        cap_minor = min(case.per_tap_cap_minor, case.terms.per_tap_cap_minor)
        if shown.amount_minor > cap_minor:
            return _refuse(Reason.OVER_TAP_CAP, f"cap {cap_minor}")
        if case.signer is None or case.terms.grant_life_s <= 0:
            return _refuse(Reason.OVER_CEILING, "the limits in force allow no grants")
        claim = case.line.claimable(case.account.now_unix_s)
        room_minor = max(case.account.free_minor, 0) * policy.online.grant_room_percent // _WHOLE
        needed = shown.counter_after + shown.amount_minor
        ceiling = max(needed, next_ceiling(claim, case.line.highest, room_minor))
        terminal_id = shown.terminal_id
        try:
            granted = self._issue(case, Kind.GRANT, ceiling, case.terms.grant_life_s, terminal_id)
        except InvariantBroken:
            return _refuse(Reason.OVER_CEILING, "the credit that is left does not suffice")
        grant = granted.sign(case.signer.private)
        note, _ = self._make_note(case, case.signer)
        return OnlineAnswer(grant=grant, note=note)

    def _decide_note(self, case: _Case) -> OnlineAnswer:
        if case.signer is None or case.terms.note_life_s <= 0:
            return _refuse(Reason.OVER_CEILING, "the limits in force allow no notes")
        note, limit = self._make_note(case, case.signer)
        # A shop hears nothing about the customer's credit that it would not see in a record anyway.
        return OnlineAnswer(note=note, limit=limit if case.question.asker == WALLET else None)

    def _decide_return(self, case: _Case) -> OnlineAnswer:
        shown, line = case.shown, case.line
        interval = (shown.counter_before, shown.counter_after)
        if not contains(line.claimable(case.account.now_unix_s), interval):
            reason = "these points are not the card's to return any more"
            self._alarm(case.connection, AlarmKind.OVERLAP, case.question, case.account.id, reason)
            return _refuse(Reason.INTERVAL_OVERLAP, reason)
        case.connection.execute(
            store.claims.insert().values(
                account_id=case.account.id,
                token_id=line.id,
                counter_after=shown.counter_after,
                cryptogram=shown.cryptogram,
                counter_before=shown.counter_before,
                atc=shown.atc,
                gateway_id=WALLET,
                record_id=shown.sale_id,
                posted=True,
                previous_digest=shown.previous_digest,
            )
        )
        line.posted.append(interval)
        line.post(interval)
        run_start, run_end = line.run
        case.connection.execute(
            store.tokens.update().filter_by(id=line.id).values(run_start=run_start, run_end=run_end)
        )
        return OnlineAnswer()

    def _make_note(self, case: _Case, signer: OnlineKey) -> tuple[NoteToWrite | None, OwnLimit | None]:
        """As far as the policy lets one note go; none if it lets none."""
        ceiling = _note_ceiling(case)
        if case.terms.note_life_s <= 0 or ceiling <= case.line.highest:
            return None, None
        single = self._issue(case, Kind.NOTE, ceiling, case.terms.note_life_s, ANY_TERMINAL)
        sealed = seal_note(
            single.sign(signer.private),
            token_key_secret=self._issuer.token_key.secret,
            token_key=case.shown.token_key,
            nonce=secrets.token_bytes(SEAL_NONCE_BYTES),
        )
        sequence = single.record.sequence
        data = put_note_data(case.shown.note_key, sequence, sealed)
        limit = OwnLimit(ceiling, single.digest, single.valid_until_unix_s)
        return NoteToWrite(sequence, single.valid_until_unix_s, data), limit

    def _issue(self, case: _Case, kind: Kind, ceiling: int, life_s: int, terminal_id: str) -> SingleLimit:
        """On record, and in the signed form that goes out once it is logged.

        Raises:
            InvariantBroken: there is not so much credit.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)
        issued = issue(
            case.connection,
            case.account,
            case.line,
            kind=PublicationKind.GRANT if kind is Kind.GRANT else PublicationKind.NOTE,
            ceiling=ceiling,
            valid_until_unix_s=case.account.now_unix_s + life_s,
            nonce=nonce,
            guarantee=case.policy.guarantee,
            terminal_id=terminal_id or None,
            per_tap_cap_minor=case.per_tap_cap_minor,
        )
        case.issued.append(issued)
        return SingleLimit(
            kind=kind,
            record=issued.record,
            nonce=nonce,
            issued_unix_s=issued.issued_unix_s,
            valid_until_unix_s=issued.valid_until_unix_s,
            terminal_id=terminal_id,
        )

    def _rows_of(self, connection: sa.Connection, token_id: str, answer: str) -> list[dict[str, Any]]:
        """The publications that an answer given before has let out."""
        told = OnlineAnswer.from_json(answer)
        if told.grant is None and told.note is None:
            return []
        columns = store.publications.c
        # Whatever was issued to this token in that moment; to log one too many does no harm.
        answered = sa.select(store.online_answers.c.answered_unix_ms).filter_by(
            token_id=token_id, answer=answer
        )
        at_unix_s = int(connection.scalar(answered) or 0) // 1000
        query = sa.select(store.publications).where(
            columns.token_id == token_id,
            columns.kind != PublicationKind.SNAPSHOT.value,
            columns.issued_unix_s.between(at_unix_s - 1, at_unix_s + 1),
        )
        return [row._asdict() for row in connection.execute(query)]

    def _alarm(
        self,
        connection: sa.Connection,
        kind: AlarmKind,
        question: _Question,
        account_id: str,
        detail: str,
    ) -> None:
        connection.execute(
            store.alarms.insert().values(
                id=uuid.uuid4(),
                kind=kind.value,
                gateway_id=question.asker,
                record_id=str(question.shown.sale_id),
                account_id=account_id,
                detail=detail,
                record=None,
                raised_unix_ms=self._now_unix_ms(),
            )
        )


def _observe(case: _Case) -> None:
    """Take the cryptogram for evidence of what the card had claimed by then."""
    shown, line = case.shown, case.line
    columns = store.publications.c
    relied_on = case.connection.scalar(
        sa.select(columns.issued_unix_s).filter_by(token_id=line.id, digest=shown.limit_digest)
    )
    highest = line.highest
    cut = line.observe(
        counter_before=shown.counter_before,
        counter_after=shown.counter_after,
        relied_on_issued_unix_s=int(relied_on or 0),
        guarantee=case.policy.guarantee,
    )
    if line.highest != highest:
        case.connection.execute(
            store.tokens.update().filter_by(id=line.id).values(highest_counter=line.highest)
        )
    ends = {(line.id, p.digest): p.evidence for p in cut if p.evidence is not None}
    accounts.write_evidence(case.connection, ends)


def _refuse(reason: Reason, detail: str = "") -> OnlineAnswer:
    return OnlineAnswer(refused=Refusal(reason.value, detail))


def _note_ceiling(case: _Case) -> int:
    """By use where the policy says so, else as much of the free credit as it lets one note have."""
    account, line, use = case.account, case.line, case.policy.use
    claim = line.claimable(account.now_unix_s)
    if use is None:
        room_minor = max(account.free_minor, 0) * case.policy.online.note_room_percent // _WHOLE
        return next_ceiling(claim, line.highest, room_minor)
    planned = habits.plan(
        use,
        account.lines,
        habits.spent_lately(case.connection, [account.id], use, account.now_unix_s),
        owable_minor=account.free_minor + account.reserve_minor,
        limit_minor=account.balance.limit_minor,
        now_unix_s=account.now_unix_s,
    )
    ahead_minor = planned[line.id].note_minor
    return ceiling_for(claim, line.highest, ahead_minor=ahead_minor, free_minor=account.free_minor)
