"""This project on the history: real judgement in the shops, the reserve principle in the books, cards on
their counter lines, and an onlooker who checks what is promised."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.authorization.decision import Decline
from pos_gateway.authorization.policy import Policy as GatewayPolicy
from pos_gateway.authorization.reasons import Reason
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import previous_digest
from pos_gateway.lab.simulator import history as h
from pos_gateway.lab.simulator.books import Books, Issued, Judged, Tap, TokenBook
from pos_gateway.lab.simulator.cards import Card
from pos_gateway.lab.simulator.chance import seeded_bytes, stream
from pos_gateway.lab.simulator.debts import Debts
from pos_gateway.lab.simulator.load import Load
from pos_gateway.lab.simulator.measures import Measures
from pos_gateway.lab.simulator.shops import Asked, Gateway
from pos_gateway.lab.simulator.town import DAY_S, Size, Town
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.reserve import PublicationKind
from pos_gateway.limits.builder import build_snapshot
from pos_gateway.limits.header import SnapshotTerms
from pos_gateway.limits.layers import Layers
from pos_gateway.limits.record import NONCE_BYTES, TOKEN_KEY_BYTES, LimitRecord, Status
from pos_gateway.limits.single import Kind, SingleLimit
from pos_gateway.limits.snapshot import Snapshot

_ISSUER: Final = "Simulated Bank"
_ONLINE_SHOP: Final = "ONLINE"
_NO_LINE: Final = "over_ceiling_without_line"
_RESERVED_ELSEWHERE: Final = "reserved_elsewhere"


@dataclass(slots=True)
class _Approval:
    """Goods handed over at a shop. `guaranteed`: all that the guarantee asks of the tap itself holds."""

    account: int
    amount_minor: int
    at_unix_ms: int
    guaranteed: bool
    clone: int | None
    token_key: bytes
    refused: bool = False
    presented: bool = False


@dataclass(slots=True)
class _Clone:
    made: h.CloneMade
    card: Card
    copied_at: int
    """The counter when it was made."""
    terminals: dict[str, None] = field(default_factory=dict)
    highest_ceiling: int = 0
    used: bool = False


class Ours:
    """Handles one happening after the other; `finish` at the end."""

    def __init__(
        self,
        size: Size,
        town: Town,
        load: Load,
        policy: Policy,
        gateway_policy: GatewayPolicy,
    ) -> None:
        self.measures = Measures(Debts(cuts_by_themselves=False))
        self._size = size
        self._town = town
        self._load = load
        self._policy = policy
        self._tolerance_s = policy.clock_tolerance_s
        self._deadline_ms = 1000 * policy.presentment_deadline_s
        self._nonces = 0
        self.books = Books(policy, self._nonce)
        self._limit_key = Ed25519PrivateKey.from_private_bytes(seeded_bytes(32, size.seed, "limit key"))
        online_key = Ed25519PrivateKey.from_private_bytes(seeded_bytes(32, size.seed, "online key"))
        self._online = policy.online.terms([online_key.public_key().public_bytes_raw()])
        self._shops = [Gateway(f"T{number:07d}", gateway_policy) for number in range(town.shops)]
        self._shop_numbers = {shop.terminal_id: number for number, shop in enumerate(self._shops)}
        self._cards: dict[tuple[int, bool], Card] = {}
        self._lost: dict[tuple[int, bool], None] = {}
        self._returns: dict[bytes, list[tuple[int, int]]] = {}
        self._wallet_epoch: dict[bytes, int] = {}
        self._base_minor = [c.limit_minor for c in town.customers]
        self._vault_minor = [0] * len(town.customers)
        self._clones: dict[int, _Clone] = {}
        self._copied: dict[bytes, int] = {}
        self._dishonest: dict[int, None] = {}
        self._approvals: dict[int, _Approval] = {}
        self._releases: list[tuple[int, int]] = []
        self._due: list[tuple[int, int, h.Happening]] = []
        self._told: dict[bytes, None] = {}
        self._online_taps: list[tuple[int, Tap]] = []
        self._sale = 0
        self._version = 0
        self._whole: Snapshot | None = None
        self._latest: Layers | None = None
        self._changed: list[TokenBook] = []
        self._open_accounts()

    # The history

    def handle(self, at_unix_ms: int, event: h.Happening) -> None:
        while self._due and self._due[0][0] <= at_unix_ms:
            due_ms, _, due = heappop(self._due)
            self._do(due_ms, due)
        while self._releases and self._releases[0][0] + 999 < at_unix_ms:
            _, tap_id = heappop(self._releases)
            if not self._approvals[tap_id].presented:
                self.measures.debts.released(tap_id)
        self._do(at_unix_ms, event)

    def _do(self, at_unix_ms: int, event: h.Happening) -> None:
        now_unix_s = at_unix_ms // 1000
        match event:
            case h.Purchase():
                self._purchase(at_unix_ms, event)
            case h.OnlinePurchase(customer, amount_minor):
                self._buys_online(at_unix_ms, customer, amount_minor)
            case h.Refresh(customer):
                card = self._phone(customer)
                if card is not None:
                    self._refresh(now_unix_s, card)
            case h.Repay():
                self._repay(now_unix_s, event)
            case h.RepaymentFinal(customer, reference, bounces):
                self.books.repayment_final(customer, reference, now_unix_s, bounces=bounces)
                self.measures.debts.repayment_final(customer, reference, bounces=bounces)
                self._limit_in_force(customer)
            case h.SetLimit(customer, limit_minor):
                self._base_minor[customer] = limit_minor
                self._set_limit(now_unix_s, customer)
            case h.Vault(customer, amount_minor):
                self._vault_minor[customer] += amount_minor
                self._set_limit(now_unix_s, customer)
            case h.Block(customer, phone):
                self._block(at_unix_ms, customer, phone)
            case h.Replace(customer, phone):
                self._replace(customer, phone)
            case h.LineDown(shop):
                self._catch_up(self._shops[shop])
                self._shops[shop].line = self._shops[shop].synchronised = False
            case h.LineUp(shop):
                self._shops[shop].line = not self._shops[shop].stolen
            case h.Synchronise(shop, carried):
                self._synchronise(at_unix_ms, self._shops[shop], carried=carried)
            case h.Clock(shop, skew_s):
                self._shops[shop].skew_s = skew_s
                self._shops[shop].high_water_unix_ms = 0
            case h.Stolen(shop):
                gateway = self._shops[shop]
                self._catch_up(gateway)
                gateway.frozen_unix_ms = at_unix_ms
                gateway.line = gateway.synchronised = False
            case h.StolenTap():
                self._stolen_tap(at_unix_ms, event)
            case h.StolenReported(shop):
                self.books.suspend(self._shops[shop].terminal_id)
            case h.StolenPresents(shop):
                self._present(at_unix_ms, self._shops[shop])
            case h.Publish():
                self._publish(now_unix_s)
            case h.Backup():
                self.books.back_up(now_unix_s)
            case h.Restore():
                self._restore(at_unix_ms)
            case h.CloneMade():
                self._make_clone(event)
            case h.CloneTap():
                self._clone_taps(at_unix_ms, event)
            case h.Dispute(customer):
                self._dispute(at_unix_ms, customer)
            case h.EndOfDay():
                self._end_day(at_unix_ms)

    def finish(self) -> None:
        """All shops tell what they have, all customers read their bills; then the sums."""
        end_ms = 1000 * self._size.end_unix_s
        for shop in self._shops:
            if not shop.stolen:
                self._synchronise(end_ms, shop, carried=True)
        for clone in self._clones.values():
            self._dispute(end_ms, clone.made.customer)
        self._sum_clones()

    # Customers in shops

    def _purchase(self, at_unix_ms: int, event: h.Purchase) -> None:
        shop, tally = self._shops[event.shop], self.measures.taps
        if (event.customer, event.by_phone) in self._lost or shop.stolen:
            return
        card = self._cards[event.customer, event.by_phone]
        room = event.amount_minor <= self.measures.debts.room_minor(event.customer)
        likes = self._load.phones
        reach = likes.network_elsewhere if shop.line else likes.network_at_cut_off_shop
        network = card.is_phone and event.network < reach
        if network and event.opened:
            self._refresh(at_unix_ms // 1000, card)
        cause = self._tap(at_unix_ms, shop, card, event)
        if cause in (_NO_LINE, Reason.NO_VALID_LIMITS.value) and network and event.asks_again:
            self._refresh(at_unix_ms // 1000, card, event.amount_minor)
            cause = self._tap(at_unix_ms, shop, card, event)
        if cause is None:
            tally.approves()
        elif cause == Reason.CARD_LEFT.value:
            tally.tears()
        else:
            tally.declines(cause, room=room)

    def _tap(self, at_unix_ms: int, shop: Gateway, card: Card, event: h.Purchase) -> str | None:
        """Why not, or None."""
        self._sale += 1
        sale, now_unix_s = self._sale, at_unix_ms // 1000
        if shop.line:
            self._catch_up(shop)
        asked = shop.ask(at_unix_ms, sale, card, event.amount_minor)
        if isinstance(asked, Decline):
            return asked.reason.value
        answer = card.generate_ac(event.amount_minor, asked.ask.ceiling, asked.signed)
        if answer.kind is CryptogramKind.ARQC:
            if not shop.line:
                return _NO_LINE
            grant = self._grant(at_unix_ms, shop, card, asked, event.amount_minor)
            if grant is None:
                return _RESERVED_ELSEWHERE
            if event.lost:
                return "grant_lost"
            again = shop.ask_again(at_unix_ms, sale, asked, grant)
            if isinstance(again, Decline):
                return again.reason.value
            asked, answer = again, card.generate_ac(event.amount_minor, again.ask.ceiling, again.signed)
        if event.torn and not event.tapped_again:
            shop.renounce(card, asked, previous_digest(asked.signed))
            return Reason.CARD_LEFT.value
        tap = shop.take(at_unix_ms, sale, card, asked, answer)
        if isinstance(tap, Decline):
            return tap.reason.value
        self._handed_over(at_unix_ms, shop, tap, asked, event.customer, None)
        if shop.line and shop.synchronised:
            self._present(at_unix_ms, shop)
            self._write_note(now_unix_s, card)
        return None

    def _grant(
        self, at_unix_ms: int, shop: Gateway, card: Card, asked: Asked, amount_minor: int
    ) -> SingleLimit | None:
        token, now_unix_s = self.books.token(card.token_key), at_unix_ms // 1000
        if not self.books.hear(token, card.counter, asked.digest, now_unix_s):
            self._two_cards(at_unix_ms, token)
            return None
        issued = self.books.grant(token, shop.terminal_id, amount_minor, now_unix_s)
        return None if issued is None else self._single(issued)

    def _write_note(self, now_unix_s: int, card: Card) -> None:
        """At the end of a tap with the line up, the card's counter being known."""
        token = self.books.token(card.token_key)
        if token.highest == card.counter and token.status is Status.ACTIVE:
            issued = self.books.note(token, now_unix_s)
            if issued is not None:
                card.note = self._single(issued)

    def _handed_over(
        self,
        at_unix_ms: int,
        shop: Gateway,
        tap: Tap,
        asked: Asked,
        account: int,
        clone: int | None,
    ) -> None:
        clock_is_right = abs(shop.skew_s) <= self._tolerance_s and not shop.stolen
        approval = _Approval(account, tap.amount_minor, at_unix_ms, clock_is_right, clone, tap.token_key)
        self._approvals[tap.id] = approval
        self._limit_in_force(account)
        if clock_is_right and clone is None and account not in self._dishonest:
            self.measures.debts.buys(account, tap.amount_minor, tap.id)
            # Nobody can ask for it any more once nothing stands that it relied on.
            gone_s = asked.valid_until_unix_s + self._tolerance_s + self._policy.presentment_deadline_s
            heappush(self._releases, (1000 * gone_s, tap.id))
        if tap.token_key in self._copied:
            for each in self._clones.values():
                if each.card.token_key == tap.token_key:
                    each.terminals[shop.terminal_id] = None
                    each.highest_ceiling = max(each.highest_ceiling, asked.ask.ceiling)

    # Phones

    def _phone(self, customer: int) -> Card | None:
        return None if (customer, True) in self._lost else self._cards.get((customer, True))

    def _refresh(self, now_unix_s: int, card: Card, needed_minor: int = 0) -> None:
        """The wallet shows its counter, returns what the issuer wants back, and takes a note."""
        token = self.books.token(card.token_key)
        self._present_returns(card, token)
        if token.status is not Status.ACTIVE:
            return
        relied_on = card.note.digest if card.note is not None else b""
        if not self.books.hear(token, card.counter, relied_on, now_unix_s):
            self._two_cards(1000 * now_unix_s, token)
            return
        surplus_minor = self.books.surplus_minor(token, now_unix_s)
        if surplus_minor > self._town.customers[card.account].limit_minor // 50:
            before = card.counter
            card.counter = self.books.return_all(token, card.counter, now_unix_s)
            self._returns.setdefault(card.token_key, []).append((before, card.counter))
        issued = self.books.note(token, now_unix_s, needed_minor)
        if issued is not None:
            card.note = self._single(issued)
        self._limit_in_force(card.account)

    def _present_returns(self, card: Card, token: TokenBook) -> None:
        """A ledger that was restored has forgotten what the wallet gave back since."""
        if self._wallet_epoch.get(card.token_key, 0) == self.books.epoch:
            return
        self._wallet_epoch[card.token_key] = self.books.epoch
        for before, after in self._returns.get(card.token_key, ()):
            self.books.write_off(token, before, after)
            token.highest = max(token.highest, after)

    def _buys_online(self, at_unix_ms: int, customer: int, amount_minor: int) -> None:
        now_unix_s, debts = at_unix_ms // 1000, self.measures.debts
        tally = self.measures.online(self._town.customers[customer].has_phone)
        room = amount_minor <= debts.room_minor(customer)
        card = self._phone(customer)
        if card is not None and self.books.token(card.token_key).status is Status.ACTIVE:
            self._refresh(now_unix_s, card, amount_minor)
            note: SingleLimit | None = card.note
            self._sale += 1
            signed = b"%d/%d/online/" % (self._sale, amount_minor)
            if note is None or note.valid_until_unix_s <= now_unix_s:
                return tally.declines("no_valid_limits", room=room)
            answer = card.generate_ac(amount_minor, note.record.ceiling, signed + note.digest)
            if answer.kind is not CryptogramKind.TC:
                capped = answer.kind is CryptogramKind.AAC
                cause = Reason.OVER_TAP_CAP.value if capped else _RESERVED_ELSEWHERE
                return tally.declines(cause, room=room)
            tap = Tap(
                self._sale,
                card.token_key,
                amount_minor,
                answer.counter_before,
                answer.counter,
                note.digest,
                at_unix_ms,
                answer.iad.previous_digest,
            )
            self._approvals[tap.id] = _Approval(
                customer, amount_minor, at_unix_ms, True, None, card.token_key
            )
            if customer not in self._dishonest:
                debts.buys(customer, amount_minor, tap.id)
            (judged,) = self.books.present(_ONLINE_SHOP, [tap], [], 0, now_unix_s)
            self._judged(at_unix_ms, tap, judged)
            self._online_taps.append((at_unix_ms, tap))
            return tally.approves()
        if not self.books.debit(customer, amount_minor, now_unix_s):
            return tally.declines(_RESERVED_ELSEWHERE, room=room)
        debts.buys(customer, amount_minor)
        return tally.approves()

    # Accounts

    def _repay(self, now_unix_s: int, event: h.Repay) -> None:
        book = self.books.accounts[event.customer]
        amount_minor = int(book.outstanding_minor * event.part)
        if book.outstanding_minor <= book.limit_minor * event.above or amount_minor <= 0:
            return
        final = event.final_after_s == 0
        self.books.repay(event.customer, event.reference, amount_minor, now_unix_s, final=final)
        self.measures.debts.repays(event.customer, event.reference, amount_minor, final=final)
        self._limit_in_force(event.customer)

    def _set_limit(self, now_unix_s: int, customer: int) -> None:
        limit_minor = self._base_minor[customer] + self._vault_minor[customer]
        self.books.set_limit(customer, limit_minor, now_unix_s)
        self._limit_in_force(customer)

    def _limit_in_force(self, customer: int) -> None:
        """A cut goes on step by step, never back: the onlooker holds the books to that."""
        target_minor = self._base_minor[customer] + self._vault_minor[customer]
        in_force_minor = self.books.accounts[customer].limit_minor
        allowed_minor = self.measures.debts.of(customer).allowed_minor
        if in_force_minor > max(target_minor, allowed_minor):
            raise AssertionError(f"the limit of account {customer} rose during a cut")
        self.measures.debts.limit_is(customer, target_minor, in_force_minor)

    def _block(self, at_unix_ms: int, customer: int, phone: bool) -> None:
        self._lost[customer, phone] = None
        token = self.books.token(self._cards[customer, phone].token_key)
        self.books.set_status(token.token_key, Status.BLOCKED)
        self._urgent(at_unix_ms, token)

    def _replace(self, customer: int, phone: bool) -> None:
        card = self._cards[customer, phone]
        self.books.set_status(card.token_key, Status.BLOCKED)
        self._lost.pop((customer, phone), None)
        self._new_card(customer, phone)

    def _two_cards(self, at_unix_ms: int, token: TokenBook) -> None:
        """A contradiction has proven that a token was copied: blocked, told to every shop, replaced."""
        if token.token_key in self._told:
            return
        self._told[token.token_key] = None
        self.books.prove(token, at_unix_ms // 1000)
        self._urgent(at_unix_ms, token)
        for key, card in self._cards.items():
            if card.token_key == token.token_key:
                replaced_ms = at_unix_ms + int(self._load.decisions.replaced_after_days * DAY_S * 1000)
                heappush(self._due, (replaced_ms, len(self._due), h.Replace(*key)))

    # Shops and the ledger

    def _catch_up(self, shop: Gateway) -> None:
        if shop.line and self._latest is not None:
            shop.layers = self._latest

    def _synchronise(self, at_unix_ms: int, shop: Gateway, *, carried: bool) -> None:
        if shop.stolen or (not carried and not shop.line):
            return
        self._present(at_unix_ms, shop)
        shop.layers = self._latest
        if not carried:
            shop.synchronised = True

    def _present(self, at_unix_ms: int, shop: Gateway) -> None:
        if shop.epoch != self.books.epoch:
            shop.epoch = self.books.epoch
            again = [tap for _, tap in shop.kept]
            told = self.books.present(shop.terminal_id, again, [], 0, at_unix_ms // 1000)
            for tap, judged in zip(again, told, strict=True):
                self._judged(at_unix_ms, tap, judged)
        taps = list(shop.queue)
        complete_until_unix_ms = shop.now_unix_ms(at_unix_ms) - 1
        verdicts = self.books.present(
            shop.terminal_id, taps, shop.renounced, complete_until_unix_ms, at_unix_ms // 1000
        )
        for tap, judged in zip(taps, verdicts, strict=True):
            self._judged(at_unix_ms, tap, judged)
        shop.acknowledged(at_unix_ms, self._deadline_ms)

    def _judged(self, at_unix_ms: int, tap: Tap, judged: Judged) -> None:
        """A verdict has come: held against what the shop was promised, and what the customer owes."""
        approval = self._approvals[tap.id]
        debts, account = self.measures.debts, approval.account
        in_time = at_unix_ms - approval.at_unix_ms <= self._deadline_ms
        if not approval.presented:
            approval.guaranteed &= in_time
            self.measures.guaranteed += approval.guaranteed
        approval.presented = True
        paid = judged.verdict.paid
        if not paid and not approval.refused:
            approval.refused = True
            self.measures.unpaid_minor += approval.amount_minor
            self.measures.guaranteed_unpaid += approval.amount_minor if approval.guaranteed else 0
        billed = tap.id in self.books.billed_minor
        if debts.knows(tap.id) and not billed:
            debts.released(tap.id)
        elif billed and not debts.knows(tap.id) and approval.clone is None:
            debts.buys(account, approval.amount_minor, tap.id)
        if judged.clone_proven:
            self._two_cards(at_unix_ms, self.books.token(tap.token_key))

    def _publish(self, now_unix_s: int) -> None:
        terms = self._terms(now_unix_s, None)
        records = self.books.publish(now_unix_s, terms.nonce, terms.valid_until_unix_s)
        self._whole = self._open(records, terms)
        self._latest = Layers(self._whole)
        self._changed = []
        for shop in self._shops:
            if self._version == 1:
                shop.layers = self._latest
        for customer in range(len(self._town.customers)):
            self._limit_in_force(customer)

    def _urgent(self, at_unix_ms: int, token: TokenBook) -> None:
        """A small delta at once: what changed since the last whole snapshot that nobody may wait for."""
        if self._whole is None:
            return
        if token not in self._changed:
            self._changed.append(token)
        terms = self._terms(at_unix_ms // 1000, self._whole.header.version)
        records = self.books.publish(at_unix_ms // 1000, terms.nonce, terms.valid_until_unix_s, self._changed)
        self._latest = Layers(self._whole, self._open(records, terms))

    def _terms(self, now_unix_s: int, base: int | None) -> SnapshotTerms:
        self._version += 1
        return SnapshotTerms(
            issuer=_ISSUER,
            currency="CNY",
            version=self._version,
            nonce=self._nonce(),
            valid_from_unix_s=now_unix_s,
            refresh_after_unix_s=now_unix_s + min(self._policy.refresh_after_s, self._policy.valid_s),
            valid_until_unix_s=now_unix_s + self._policy.valid_s,
            token_key_epoch=1,
            policy=self._policy.risk_policy(),
            base_version=base,
            online=self._online,
        )

    def _open(self, records: list[LimitRecord], terms: SnapshotTerms) -> Snapshot:
        file = io.BytesIO()
        build_snapshot(file.write, records, terms, {"limits": self._limit_key})
        data = file.getvalue()

        def read_at(offset: int, length: int) -> bytes:
            return data[offset : offset + length]

        keys = {"limits": self._limit_key.public_key()}
        return Snapshot.open(read_at, len(data), keys, 1)

    def _restore(self, at_unix_ms: int) -> None:
        if not self.books.restore(at_unix_ms // 1000):
            return
        # How far cuts had come since the backup is forgotten too; nothing new is given out meanwhile.
        for customer, book in enumerate(self.books.accounts):
            target_minor = self._base_minor[customer] + self._vault_minor[customer]
            self.measures.debts.limit_is(customer, target_minor, book.limit_minor)
        # Online merchants hear of the new epoch at once.
        kept_ms = at_unix_ms - self._deadline_ms
        self._online_taps = [(at, tap) for at, tap in self._online_taps if at > kept_ms]
        taps = [tap for _, tap in self._online_taps]
        verdicts = self.books.present(_ONLINE_SHOP, taps, [], 0, at_unix_ms // 1000)
        for tap, judged in zip(taps, verdicts, strict=True):
            self._judged(at_unix_ms, tap, judged)

    def _single(self, issued: Issued) -> SingleLimit:
        return SingleLimit(
            kind=Kind.GRANT if issued.kind is PublicationKind.GRANT else Kind.NOTE,
            record=issued.record,
            nonce=issued.nonce,
            issued_unix_s=issued.issued_unix_s,
            valid_until_unix_s=issued.valid_until_unix_s,
            terminal_id=issued.terminal_id or "",
        )

    def _nonce(self) -> bytes:
        self._nonces += 1
        return seeded_bytes(NONCE_BYTES, self._size.seed, "nonce", self._nonces)

    # Thieves

    def _stolen_tap(self, at_unix_ms: int, event: h.StolenTap) -> None:
        shop, card = self._shops[event.shop], self._cards[event.customer, self._main(event.customer)]
        if self._lost.keys() & {(event.customer, card.is_phone)}:
            return
        self._sale += 1
        asked = shop.ask(at_unix_ms, self._sale, card, event.amount_minor)
        if isinstance(asked, Decline):
            return
        answer = card.generate_ac(event.amount_minor, asked.ask.ceiling, asked.signed)
        tap = shop.take(at_unix_ms, self._sale, card, asked, answer)
        if not isinstance(tap, Decline):
            self._handed_over(at_unix_ms, shop, tap, asked, event.customer, None)

    def _make_clone(self, event: h.CloneMade) -> None:
        card = self._cards[event.customer, self._main(event.customer)].copied()
        self._clones[event.clone] = _Clone(event, card, card.counter)
        self._copied[card.token_key] = event.clone
        if event.rolled_back:
            self._dishonest[event.customer] = None

    def _clone_taps(self, at_unix_ms: int, event: h.CloneTap) -> None:
        clone, shop = self._clones[event.clone], self._shops[event.shop]
        if shop.stolen:
            return
        self._sale += 1
        if shop.line:
            self._catch_up(shop)
        asked = shop.ask(at_unix_ms, self._sale, clone.card, event.amount_minor)
        if isinstance(asked, Decline):
            return
        answer = clone.card.generate_ac(event.amount_minor, asked.ask.ceiling, asked.signed)
        if answer.kind is CryptogramKind.ARQC and shop.line:
            grant = self._grant(at_unix_ms, shop, clone.card, asked, event.amount_minor)
            again = None if grant is None else shop.ask_again(at_unix_ms, self._sale, asked, grant)
            if again is None or isinstance(again, Decline):
                return
            asked = again
            answer = clone.card.generate_ac(event.amount_minor, asked.ask.ceiling, asked.signed)
        tap = shop.take(at_unix_ms, self._sale, clone.card, asked, answer)
        if isinstance(tap, Decline):
            return
        clone.used = True
        self._handed_over(at_unix_ms, shop, tap, asked, clone.made.customer, event.clone)
        if shop.line and shop.synchronised:
            self._present(at_unix_ms, shop)
            self._write_note(at_unix_ms // 1000, clone.card)

    def _dispute(self, at_unix_ms: int, customer: int) -> None:
        """What the customer is billed and did not buy: the issuer reads the genuine card, and pays it."""
        if customer in self._dishonest:
            return
        for clone in self._clones.values():
            if clone.made.customer != customer:
                continue
            strange = [
                tap_id for tap_id in self._cloned_taps(clone.made.clone) if tap_id in self.books.billed_minor
            ]
            if strange:
                token = self.books.token(clone.card.token_key)
                self.books.dispute(token, strange, at_unix_ms // 1000)
                self._two_cards(at_unix_ms, token)

    def _cloned_taps(self, clone: int) -> list[int]:
        return [tap_id for tap_id, approval in self._approvals.items() if approval.clone == clone]

    def _sum_clones(self) -> None:
        measures, fraud_minor = self.measures, self.books.fraud_minor
        losses: dict[bytes, int] = {}
        for tap_id, amount_minor in fraud_minor.items():
            token_key = self._approvals[tap_id].token_key
            losses[token_key] = losses.get(token_key, 0) + amount_minor
        bounds = []
        for clone in self._clones.values():
            if not clone.used:
                continue
            measures.clones_used += 1
            measures.clones_proven += clone.card.token_key in self.books.proven
            bound_minor = len(clone.terminals) * max(clone.highest_ceiling - clone.copied_at, 0)
            bounds.append(bound_minor)
            loss_minor = losses.get(clone.card.token_key, 0)
            measures.clone_loss_minor += loss_minor
            measures.largest_clone_loss_minor = max(measures.largest_clone_loss_minor, loss_minor)
            measures.clone_loss_over_bound += loss_minor > bound_minor
        measures.clone_bound_minor = max(bounds, default=0)
        measures.billed_for_clones_minor = sum(
            amount_minor
            for tap_id, amount_minor in self.books.billed_minor.items()
            if (approval := self._approvals[tap_id]).clone is not None
            and approval.account not in self._dishonest
        )

    # The town on its first day, and each evening

    def _open_accounts(self) -> None:
        for customer in self._town.customers:
            self.books.open_account(customer.limit_minor, customer.first_owed_minor)
            self.measures.debts.open(customer.index, customer.limit_minor, customer.first_owed_minor)
            for phone in (True, False):
                if customer.has_phone if phone else customer.has_plastic:
                    self._new_card(customer.index, phone)

    def _new_card(self, customer: int, phone: bool) -> None:
        number = len(self.books.tokens())
        token_key = seeded_bytes(TOKEN_KEY_BYTES, self._size.seed, "token", number)
        counter = stream(self._size.seed, "counter", number).randrange(1 << 40)
        self._cards[customer, phone] = Card(
            token_key, customer, phone, counter, self._policy.per_tap_cap_minor
        )
        self.books.issue_token(customer, token_key, counter, returns=phone, assurance=1)

    def _main(self, customer: int) -> bool:
        """A customer's plastic, if there is one: phones are harder to copy."""
        return not self._town.customers[customer].has_plastic

    def _end_day(self, at_unix_ms: int) -> None:
        self.measures.end_day(
            reserve_minor=sum(book.reserve_minor(at_unix_ms // 1000) for book in self.books.accounts),
            queue=sum(len(shop.queue) for shop in self._shops),
        )
