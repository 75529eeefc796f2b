"""The ledger as one thing: a home folder with its identity, keys, database and published snapshots.

home/ledger.json    who issues, in which currency
home/keys/          every key, mode 0600
home/ledger.db      accounts, tokens, presentments, double entry: unless ledger.json names a PostgreSQL
home/keys/online/   those that sign grants and notes
home/keys/signing/  those of them that sign what is published; some may lie elsewhere
home/repository/    the TUF repository: what gateways fetch
home/staging/       versions that wait for their signatures
home/ceremony/      a new root that waits for its signatures
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar
from uuid import UUID, uuid4

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding

from pos_gateway.conflict import ConflictBundle
from pos_gateway.emv.authentication import CaPublicKey
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.enrolment import (
    CaKey,
    CertificateRequest,
    Enrolment,
    EnrolmentRequest,
    Merchant,
    compose_code,
    parse_code,
)
from pos_gateway.errors import (
    AuthenticationFailed,
    Conflict,
    InvalidConfiguration,
    InvalidInput,
    NotFound,
    Unavailable,
)
from pos_gateway.instalments import MAX_CLASS
from pos_gateway.ledger import (
    accounts,
    admission,
    conflicts,
    gateways,
    grants,
    issuing,
    movements,
    online,
    postings,
    reviews,
    store,
)
from pos_gateway.ledger.accounts import Account, LockedAccount, Token, TokenStatus
from pos_gateway.ledger.authority import Presented, nearly_over
from pos_gateway.ledger.books import RECEIVABLE
from pos_gateway.ledger.ceremony import Ceremony, first_root
from pos_gateway.ledger.certificates import end_of_month, modulus_bytes
from pos_gateway.ledger.config import Identity, Policy, check_costs, policy_in_force
from pos_gateway.ledger.conflicts import ConflictFound
from pos_gateway.ledger.credit_desk import CreditDesk
from pos_gateway.ledger.database import database_url, sqlite_url
from pos_gateway.ledger.evidence import Issuer
from pos_gateway.ledger.gateways import CODE_LIFE_S, Action, Gateway, GatewayAction, GatewayStatus
from pos_gateway.ledger.keys import ICC_KEY_BITS, KeyRing, generate_rsa_key, make_authority
from pos_gateway.ledger.movements import Movement, Purpose
from pos_gateway.ledger.online import OnlineKeys
from pos_gateway.ledger.publisher import (
    PreparedSnapshot,
    PublishedSnapshot,
    Publisher,
    online_terms,
    to_take_back,
)
from pos_gateway.ledger.repository import Repository, utc
from pos_gateway.ledger.reviews import Review
from pos_gateway.ledger.settlement import AlarmKind, Examined, RecordVerdict
from pos_gateway.ledger.signer_log import Replayed, SignerLog
from pos_gateway.ledger.signing import KeyChest, Role, new_signing_key
from pos_gateway.ledger.store import Store
from pos_gateway.ledger.verification import Verifier
from pos_gateway.limits.header import OnlineTerms
from pos_gateway.limits.record import token_key
from pos_gateway.money import currency as currency_of
from pos_gateway.records import Record, Verdict

_T = TypeVar("_T")

_CA_LIFE_YEARS: Final = 12
_ISSUER_LIFE_YEARS: Final = 10
_CARD_LIFE_YEARS: Final = 4


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A new token, and what is to be written into its card. The latter is kept nowhere."""

    token: Token
    personalisation: Personalisation = field(repr=False)


@dataclass(frozen=True, slots=True)
class Payment:
    """One posted payment, or what was given back of one: its amount is negative then.

    `kind` is `payment`, `reversal` or `refund`."""

    record_id: UUID
    account_id: str
    token_id: str
    gateway_id: str
    amount_minor: int
    tapped_unix_ms: int
    posted_unix_ms: int
    kind: str


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that somebody must look at."""

    kind: AlarmKind
    gateway_id: str
    record_id: str
    account_id: str | None
    detail: str
    raised_unix_ms: int


class Ledger:
    """Open with `Ledger.open`, make with `Ledger.create`; close it, or use it as a context manager.

    Safe to share between threads; several processes may open the same home, on several machines if the
    books are in a PostgreSQL. `clock` tells unix seconds.
    """

    def __init__(
        self,
        home: Path,
        *,
        database: str | None = None,
        restoring: bool = False,
        verifiers: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.home = home
        self.identity = Identity.load(home / "ledger.json")
        self.currency = currency_of(self.identity.currency)
        self.keys = KeyRing.load(home / "keys")
        self._database = Store.open(database_url(database or self.identity.database, home))
        self._log = SignerLog(home / "keys" / "publications")
        self._revoked = home / "keys" / "revoked"
        self.online_keys = OnlineKeys(home / "keys" / online.FOLDER)
        self.repository = Repository(home / "repository")
        self._publisher = Publisher(self._database, self.repository, home / "staging", self._log)
        if not restoring:
            self._check_remembers()
        self._clock = clock
        self._verifier = Verifier(self.issuer, verifiers)
        self.ceremony = Ceremony(
            self.repository,
            home / "keys" / "signing",
            home / "ceremony",
            now=lambda: utc(self._clock()),
            lives=lambda: self.policy.metadata_lives,
        )
        self._release_pending()

    @classmethod
    def create(
        cls,
        home: Path,
        *,
        issuer: str,
        currency: str = "CNY",
        country_numeric: int = 156,
        policy: Policy | None = None,
        limit_keys: int = 1,
        limit_threshold: int = 1,
        database: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Ledger:
        """Make a ledger: keys, certificates, an empty database. All or nothing.

        `database`: the URL of an empty PostgreSQL database, without a password (see `database_url`);
        SQLite in the home if not said.

        Raises:
            InvalidConfiguration: the home exists already and is not empty, or the URL is wrong.
            Conflict: the database is not empty.
            InvalidInput: an unknown currency, or a threshold that the keys cannot reach.
        """
        currency_of(currency)
        check_costs(policy or Policy())
        signing = {role: [new_signing_key(role)] for role in Role}
        signing[Role.LIMITS] = [new_signing_key(Role.LIMITS) for _ in range(limit_keys)]
        lives = (policy or Policy()).metadata_lives
        root = first_root(
            signing, {Role.LIMITS: limit_threshold}, utc(clock()) + timedelta(seconds=lives.root_s)
        )
        home = home.absolute()
        if home.exists() and (not home.is_dir() or any(home.iterdir())):
            raise InvalidConfiguration(
                "something is there already", where=str(home), advice="choose an empty folder"
            )
        url = database_url(database, home)
        home.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
        try:
            now = datetime.fromtimestamp(clock(), UTC)
            keys = KeyRing.generate(staging / "keys", now=now, issuer=issuer)
            certificate = issuing.certify_own_key(
                keys, expires=_years_on(now.date(), _ISSUER_LIFE_YEARS), serial=issuing.new_serial()
            )
            identity = Identity(
                issuer=issuer,
                currency=currency.upper(),
                country_numeric=country_numeric,
                ca_expires=_years_on(now.date(), _CA_LIFE_YEARS),
                issuer_expires=_years_on(now.date(), _ISSUER_LIFE_YEARS),
                issuer_certificate_hex=certificate.certificate.hex(),
                issuer_remainder_hex=certificate.remainder.hex(),
                database=database,
            )
            (staging / "ledger.json").write_text(identity.model_dump_json(indent=1) + "\n")
            for keys_of_role in signing.values():
                for key in keys_of_role:
                    key.write(staging / "keys" / "signing")
            OnlineKeys(staging / "keys" / online.FOLDER).create()
            chest = KeyChest.open(staging / "keys" / "signing")
            Repository.create(staging / "repository", root, chest, utc(clock()), lives)
            (staging / "staging").mkdir()
            _create_books(
                url if database else sqlite_url(staging / "ledger.db"),
                policy or Policy(),
                int(clock() * 1000),
                then=lambda: os.rename(staging, home),
            )
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return cls(home, clock=clock)

    @classmethod
    def open(
        cls,
        home: Path,
        *,
        database: str | None = None,
        verifiers: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> Ledger:
        """`database`: another way to the same books than `ledger.json` names. `verifiers`: in how many
        processes presentments are verified; with 0, in this one.

        Raises:
            InvalidConfiguration: no ledger there, a file of it is missing, damaged or open to others, or
                its tables are of another version.
            Unavailable: its database is not to be had.
        """
        return cls(home.absolute(), database=database, verifiers=verifiers, clock=clock)

    @classmethod
    def migrate(cls, home: Path, to: str = "head") -> tuple[str | None, str | None]:
        """Bring the tables of the ledger in `home` to another version, by default this program's.

        Returns the version before and after.

        Raises:
            InvalidConfiguration: no ledger there, or no such version.
            Unavailable: its database is not to be had.
        """
        home = home.absolute()
        identity = Identity.load(home / "ledger.json")
        url = database_url(identity.database, home)
        with closing(Store.connect(url)) as books:
            # A ledger from before it was a certificate authority: its gateways enrol again.
            make_authority(home / "keys", now=datetime.now(UTC), issuer=identity.issuer)
            return books.migrate(to)

    @classmethod
    def restored(cls, home: Path, *, clock: Callable[[], float] = time.time) -> Replayed:
        """Say that the database was restored from a backup, with no replica running: the signer's log is
        replayed, gateways revoked since are revoked again, and a new epoch makes every gateway present
        again what it still keeps.

        Raises:
            InvalidConfiguration, Unavailable: see `open`.
        """
        with cls(home.absolute(), restoring=True, clock=clock) as ledger:
            with ledger._database.write() as connection:
                replayed = ledger._log.replay(connection)
                gateways.replay_revoked(connection, ledger._revoked, ledger.now_unix_ms())
                accounts.extend_standing(
                    connection,
                    ledger._now_unix_s() + policy_in_force(connection).guarantee.presentment_deadline_s,
                )
                number = connection.scalar(sa.select(sa.func.max(store.epochs.c.number))) or 0
                connection.execute(
                    store.epochs.insert().values(
                        number=number + 1, id=uuid4(), since_unix_ms=ledger.now_unix_ms()
                    )
                )
            return replayed

    def _check_remembers(self) -> None:
        """Shops may rely on every publication that was logged: nothing may be given out without them."""
        logged = (self._log.versions() or [0])[-1]
        with self._database.read() as connection:
            columns = store.snapshots.c
            complete = sa.select(sa.func.max(columns.version)).where(columns.record_count >= 0)
            known = connection.scalar(complete) or 0
            forgotten = self._log.has_forgotten(connection)
        if known >= logged and not forgotten:
            return
        self._database.close()
        raise InvalidConfiguration(
            "the database does not know the last grant that was given out"
            if forgotten
            else f"the database knows of {known} snapshots, and {logged} were published",
            where="database",
            advice="if it was restored from a backup, run `pos-gateway ledger restored`",
        )

    def close(self) -> None:
        self._verifier.close()
        self._database.close()

    @property
    def database(self) -> Store:
        """The books themselves."""
        return self._database

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def now_unix_ms(self) -> int:
        return int(self._clock() * 1000)

    @property
    def epoch(self) -> UUID:
        """Which life of this ledger it is: another one after a restore from a backup."""
        with self._database.read() as connection:
            return store.current_epoch(connection)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        with self._database.read() as connection:
            return policy_in_force(connection)

    def set_policy(self, policy: Policy) -> None:
        """Takes effect with the next snapshot.

        Raises:
            InvalidInput: an offer costs more than the policy's cap.
        """
        check_costs(policy)
        with self._database.write() as connection:
            _add_policy(connection, policy, self.now_unix_ms())

    def open_account(
        self,
        *,
        holder: str,
        limit_minor: int,
        account_id: str | None = None,
        time_zone: str | None = None,
        closing_day: int | None = None,
    ) -> Account:
        """`time_zone` and `closing_day` are the policy's if not said.

        Raises:
            InvalidInput, Conflict: see `accounts.open_account`.
        """
        account_id = account_id or accounts.new_id("acc")
        terms = self.policy.credit
        with self._database.write() as connection:
            accounts.open_account(
                connection,
                account_id=account_id,
                holder=holder,
                currency=self.currency.code,
                limit_minor=limit_minor,
                now_unix_ms=self.now_unix_ms(),
                time_zone=time_zone or terms.time_zone,
                closing_day=terms.closing_day if closing_day is None else closing_day,
            )
        return self.account(account_id)

    def account(self, account_id: str) -> Account:
        """
        Raises:
            NotFound: no such account.
        """
        with self._database.read() as connection:
            return accounts.read_account(connection, account_id, self._now_unix_s())

    def accounts(self) -> tuple[Account, ...]:
        """Every account, in the order of their opening."""
        columns = store.accounts.c
        with self._database.read() as connection:
            ids = connection.scalars(sa.select(columns.id).order_by(columns.opened_unix_ms, columns.id)).all()
            return tuple(accounts.read_account(connection, i, self._now_unix_s()) for i in ids)

    def issue_token(
        self,
        account_id: str,
        *,
        per_tap_cap_minor: int | None = None,
        expires: date | None = None,
        assurance: int = 1,
        instalment_class: int = 0,
        holder_verified_on_device: bool = False,
        icc_key: rsa.RSAPrivateKey | None = None,
    ) -> IssuedToken:
        """A new token of the account with everything its card needs. It has no ceiling before the next
        snapshot. `icc_key`: made beforehand, or made here.

        Raises:
            NotFound: no such account.
            InvalidInput: it would outlive the issuer's certificate, or a cap no limit record can hold.
        """
        policy, today = self.policy, self._today()
        cap_minor = policy.per_tap_cap_minor if per_tap_cap_minor is None else per_tap_cap_minor
        if not 0 < cap_minor < 1 << 32:
            raise InvalidInput("must be 1 to 4294967295 minor units", where="per-tap cap")
        if not 0 <= assurance <= 0xFF:
            raise InvalidInput("must be 0 to 255", where="assurance")
        if not 0 <= instalment_class <= MAX_CLASS:
            raise InvalidInput(f"must be 0 to {MAX_CLASS}", where="instalment class")
        expires = end_of_month(expires or _years_on(today, _CARD_LIFE_YEARS))
        if not today < expires <= self.identity.issuer_expires:
            raise InvalidInput(
                f"must be after today and not after {self.identity.issuer_expires}", where="expires"
            )
        profile = issuing.CardProfile(
            pan=self._free_pan(),
            psn=1,
            # A shop may be a time zone behind.
            effective=today - timedelta(days=1),
            expires=expires,
            currency_numeric=self.currency.numeric,
            country_numeric=self.identity.country_numeric,
            per_tap_cap_minor=cap_minor,
            cumulative_cap_minor=policy.card_cumulative_cap_minor,
            tc_rate_limit=policy.card_tc_rate_limit,
            start_counter=issuing.new_start_counter(),
            holder_verified_on_device=holder_verified_on_device,
        )
        personalisation = issuing.personalise(
            profile,
            icc_key=icc_key or generate_rsa_key(ICC_KEY_BITS),
            serial=issuing.new_serial(),
            issuer_certificate=self.identity.issuer_certificate,
            keys=self.keys,
        )
        token_id = accounts.new_id("tok")
        with self._database.write() as connection:
            if account_id not in accounts.lock_accounts(connection, [account_id]):
                raise NotFound(f"there is no account {account_id}")
            connection.execute(
                store.tokens.insert().values(
                    id=token_id,
                    account_id=account_id,
                    token_key=self._token_key(profile.pan, profile.psn),
                    last4=profile.pan[-4:],
                    psn=profile.psn,
                    expires=expires,
                    status=TokenStatus.ACTIVE.value,
                    per_tap_cap_minor=cap_minor,
                    assurance=assurance,
                    instalment_class=instalment_class,
                    highest_counter=profile.start_counter,
                    record_sequence=0,
                    issued_unix_ms=self.now_unix_ms(),
                )
            )
        return IssuedToken(self.token(token_id), personalisation)

    def token(self, token_id: str) -> Token:
        """
        Raises:
            NotFound: no such token.
        """
        with self._database.read() as connection:
            account_id = connection.scalar(sa.select(store.tokens.c.account_id).filter_by(id=token_id))
            if account_id is None:
                raise NotFound(f"there is no token {token_id}")
            account = accounts.read_account(connection, account_id, self._now_unix_s())
        return next(token for token in account.tokens if token.id == token_id)

    def set_token_status(self, token_id: str, status: TokenStatus) -> Token:
        """
        Raises:
            NotFound, Conflict: see `accounts.set_token_status`.
        """
        with self._database.write() as connection:
            accounts.set_token_status(connection, token_id, status)
        return self.token(token_id)

    def replace_token(self, token_id: str, *, icc_key: rsa.RSAPrivateKey | None = None) -> IssuedToken:
        """Close a token for ever and issue another one like it to the same account. What is still out for
        the old one stays reserved until it lapses; the new one gets what is free.

        Raises:
            NotFound: no such token.
            Conflict: it is closed already.
        """
        old = self.token(token_id)
        if old.status is TokenStatus.CLOSED:
            raise Conflict(f"token {token_id} is closed already", advice="issue a new one")
        self.set_token_status(token_id, TokenStatus.CLOSED)
        return self.issue_token(old.account_id, per_tap_cap_minor=old.per_tap_cap_minor, icc_key=icc_key)

    def set_line(self, account_id: str, line_minor: int) -> Account:
        """Another limit, funds in the vault apart: more at once, less as far as nothing owed or reserved
        needs it; the rest of a cut completes by itself.

        Raises:
            NotFound: no such account.
            InvalidInput: below zero.
        """
        self._with_account(
            account_id,
            lambda connection, account: movements.set_line(
                connection, account, line_minor, self.now_unix_ms()
            ),
        )
        return self.account(account_id)

    def receive(self, account_id: str, purpose: Purpose, *, reference: str, amount_minor: int) -> Movement:
        """A repayment, funds into the vault, or funds asked back from it; see `movements.receive`. The same
        reference again is the same movement.

        Raises:
            NotFound: no such account.
            InvalidInput, Conflict: see `movements.receive`.
        """
        return self._with_account(
            account_id,
            lambda connection, account: movements.receive(
                connection,
                account,
                purpose=purpose,
                reference=reference,
                amount_minor=amount_minor,
                now_unix_ms=self.now_unix_ms(),
            ),
        )

    def settle_movement(self, account_id: str, reference: str, *, final: bool) -> Movement:
        """What became of money that came in: here to stay, or taken back.

        Raises:
            NotFound, Conflict: see `movements.settle`.
        """
        return self._with_account(
            account_id,
            lambda connection, account: movements.settle(
                connection, account, reference, final=final, now_unix_ms=self.now_unix_ms()
            ),
        )

    def movements(self, account_id: str) -> tuple[Movement, ...]:
        """Oldest first."""
        with self._database.read() as connection:
            return movements.movements_of(connection, account_id)

    def reviews(self) -> tuple[Review, ...]:
        """Payments that wait for a decision, the longest first."""
        with self._database.read() as connection:
            return reviews.waiting(connection)

    def review(self, gateway_id: str, record_id: UUID, *, release: bool, note: str) -> Verdict:
        """Decide about a payment that was held.

        Raises:
            NotFound: none was held under that id.
            Conflict: see `reviews.decide`.
        """
        with self._database.read() as connection:
            account_id = reviews.find(connection, gateway_id, record_id).account_id

        def decide(connection: sa.Connection, account: LockedAccount) -> Verdict:
            return reviews.decide(
                connection,
                account,
                reviews.find(connection, gateway_id, record_id),
                release=release,
                note=note,
                now_unix_ms=self.now_unix_ms(),
            )

        return self._with_account(account_id, decide)

    def conflicts(self) -> tuple[ConflictFound, ...]:
        """Clones that were proven, oldest first."""
        with self._database.read() as connection:
            return conflicts.every(connection)

    def conflict_bundle(self, conflict_id: UUID) -> ConflictBundle:
        """The evidence of a clone, to be verified with public keys alone. It holds the full token number.

        Raises:
            NotFound: see `conflicts.bundle`.
        """
        with self._database.read() as connection:
            return conflicts.bundle(
                connection,
                conflict_id,
                issuer=self.issuer,
                issuer_name=self.identity.issuer,
                ca_keys=self.ca_keys,
            )

    def publish_urgent(self, *, done: Callable[[str], None] = lambda step: None) -> PublishedSnapshot | None:
        """Take back at once what tokens may not use any more that were blocked or closed since the last
        snapshot, and change nothing else: no new ceilings, no longer validity. None if there are none.
        `done` is told of each step.

        Raises:
            Unavailable: see `publish`.
        """
        with self._database.read() as connection:
            if not to_take_back(connection):
                return None
        with self.repository.exclusive():
            try:
                prepared = self._publisher.prepare_urgent(self.policy.delta_bases, done)
            except Conflict:
                # After one that was interrupted only a whole new version will do.
                prepared = self._prepare(automatic=True, done=done)
            published = None if prepared is None else self._release(prepared.version)
            done("release")
            return published

    def _with_account(self, account_id: str, work: Callable[[sa.Connection, LockedAccount], _T]) -> _T:
        """`work` in one durable transaction that holds the account."""
        return self._database.transact(
            lambda connection: work(
                connection, accounts.lock_account(connection, account_id, self._now_unix_s())
            )
        )

    def publish(self, *, done: Callable[[str], None] = lambda step: None) -> PublishedSnapshot:
        """Publish the next snapshot at once: for a ledger that has all the keys; see `publisher`. `done` is
        told of each step.

        Raises:
            Unavailable: signatures are missing that only another machine can give. The version is
                prepared all the same, and waits for them.
        """
        with self.repository.exclusive():
            published = self._release(self._prepare(automatic=True, done=done).version)
            done("release")
            return published

    def prepare_snapshot(self) -> PreparedSnapshot:
        """Decide and record the next snapshot and build its files; it waits for its signatures."""
        with self.repository.exclusive():
            return self._prepare(automatic=False)

    def release_snapshot(self) -> PublishedSnapshot:
        """Release the snapshot that waits, once it is signed.

        Raises:
            NotFound: none waits.
            Unavailable: signatures are missing; says which.
        """
        with self.repository.exclusive():
            version = self._publisher.pending()
            if version is None:
                raise NotFound(
                    "no snapshot waits for its release", advice="`pos-gateway ledger snapshot prepare`"
                )
            return self._release(version)

    def latest_snapshot(self) -> PublishedSnapshot:
        """
        Raises:
            NotFound: nothing was published yet.
        """
        return self._publisher.latest()

    def snapshot(self, version: int) -> PublishedSnapshot:
        """
        Raises:
            NotFound: no such version.
        """
        return self._publisher.find(version)

    def invite(self, merchant: Merchant, *, life_s: int = CODE_LIFE_S) -> str:
        """A one-time code by which one gateway of this merchant can enrol. It is shown once.

        Raises:
            Conflict: the merchant id stands for another name or category.
        """
        with self._database.write() as connection:
            secret = gateways.invite(connection, merchant, now_unix_ms=self.now_unix_ms(), life_s=life_s)
        return compose_code(secret, self.keys.authority.fingerprint)

    def enrol(self, request: EnrolmentRequest) -> Enrolment:
        """A gateway enters, with its first certificate. Asked again by the same gateway, with the same
        code, it is the same gateway with a new certificate.

        Raises:
            InvalidMessage: no code, no public key, or no certificate request (see `read_request`).
            AuthenticationFailed: steps `enrolment code`, `device signature`.
            Conflict: the gateway key is enrolled already.
        """
        secret, fingerprint = parse_code(request.code)
        if fingerprint != self.keys.authority.fingerprint:
            raise AuthenticationFailed("it was given out by another ledger", step="enrolment code")
        request.verify()
        policy, now_unix_ms = self.policy, self.now_unix_ms()
        with self._database.write() as connection:
            gateway = gateways.enrol(connection, secret, request.public_key, now_unix_ms=now_unix_ms)
            certificate = admission.certify(
                connection, self.keys.authority, gateway, request.request, policy, now_unix_ms
            )
        return self._enrolment(gateway, certificate.public_bytes(Encoding.DER))

    def _enrolment(self, gateway: Gateway, certificate: bytes) -> Enrolment:
        """All that a gateway is given: whom it pays, whose keys it trusts. Holds the token key secret."""
        return Enrolment(
            gateway_id=gateway.id,
            terminal_id=gateway.terminal_id,
            merchant=gateway.merchant,
            issuer=self.identity.issuer,
            currency=self.currency.code,
            country_numeric=self.identity.country_numeric,
            enrolled_unix_s=self._now_unix_s(),
            trusted_root=self.repository.root_bytes(),
            token_key_epoch=self.keys.token_key.epoch,
            token_key_secret=self.keys.token_key.secret,
            ca_keys=tuple(
                CaKey(
                    rid=key.rid,
                    index=key.index,
                    modulus=modulus_bytes(key.modulus),
                    exponent=key.exponent,
                    expires=key.expires.isoformat() if key.expires else None,
                )
                for key in self.ca_keys
            ),
            sealing_key=self.keys.sealing.public_key().public_bytes_raw(),
            authority=self.keys.authority.certificate.public_bytes(Encoding.DER),
            certificate=certificate,
        )

    def certify(self, request: CertificateRequest) -> bytes:
        """The next certificate of a gateway, X.509, DER.

        Raises:
            AuthenticationFailed, InvalidMessage, Unavailable: see `admission.renew`.
        """
        policy, now_unix_ms = self.policy, self.now_unix_ms()
        certificate = self._database.transact(
            lambda c: admission.renew(c, self.keys.authority, request, policy, now_unix_ms)
        )
        return certificate.public_bytes(Encoding.DER)

    def admit(self, certificate: bytes) -> Gateway:
        """Which gateway shows this client certificate (DER), which TLS has found to be of our authority.

        Raises:
            AuthenticationFailed, CertificateLapsed: see `admission.admit`.
        """
        presented = Presented.read(certificate)
        with self._database.read() as connection:
            gateway, first = admission.admit(connection, presented, self.now_unix_ms())
        if first:
            now_unix_ms = self.now_unix_ms()
            self._database.transact(lambda c: admission.first_use(c, presented, now_unix_ms))
        return gateway

    def act_on_gateway(self, gateway_id: str, action: Action, *, by: str, reason: str) -> Gateway:
        """Suspend, revoke or reinstate a gateway; every replica knows at its next request.

        Raises:
            NotFound, Conflict, InvalidInput: see `gateways.act`.
        """
        with self._database.write() as connection:
            gateways.act(connection, gateway_id, action, by=by, reason=reason, now_unix_ms=self.now_unix_ms())
            if action is Action.REVOKE:
                gateways.remember_revoked(self._revoked, gateway_id, by=by, reason=reason)
        return self.gateway(gateway_id)

    def gateway_actions(self, gateway_id: str) -> tuple[GatewayAction, ...]:
        """Who decided what about a gateway, and why; oldest first."""
        with self._database.read() as connection:
            return gateways.actions(connection, gateway_id)

    def renew_tls(self, *, now: bool = False) -> bool:
        """Give the server a new key and certificate when less than a third of the old one's life is left, or
        `now`. Every replica takes them up within a minute. Gateways notice nothing: they ask for the
        authority alone."""
        at = datetime.fromtimestamp(self._clock(), UTC)
        if not now and not nearly_over(self.keys.tls_certificate, at):
            return False
        self.keys.renew_tls(at)
        return True

    def gateways(self) -> tuple[Gateway, ...]:
        """Every enrolled gateway, oldest first."""
        with self._database.read() as connection:
            return gateways.every(connection)

    def gateway(self, gateway_id: str) -> Gateway:
        """
        Raises:
            AuthenticationFailed: step `gateway`: not enrolled here.
        """
        with self._database.read() as connection:
            return gateways.find(connection, gateway_id)

    @cached_property
    def ca_keys(self) -> tuple[CaPublicKey, ...]:
        return (issuing.ca_public_key(self.keys, self.identity.ca_expires),)

    def present(self, gateway_id: str, body: bytes, signature: bytes) -> list[RecordVerdict]:
        """Take a batch; see `postings.present`. The verdicts are durable when this returns."""
        return postings.present(
            self._database, self._verifier, self.currency, gateway_id, body, signature, self.now_unix_ms
        )

    def adopt(self, presenter_id: str, body: bytes, signature: bytes) -> list[RecordVerdict]:
        """Take a dead gateway's records from another one of its merchant; see `postings.adopt`."""
        return postings.adopt(
            self._database, self._verifier, self.currency, presenter_id, body, signature, self.now_unix_ms
        )

    def present_records(self, gateway_id: str, records: Sequence[Record]) -> list[RecordVerdict]:
        """Take records from a gateway's journal that was brought to the issuer; each stands by itself."""
        return postings.present_records(
            self._database,
            self._verifier,
            self.currency,
            gateway_id,
            [record.to_wire() for record in records],
            self.now_unix_ms,
        )

    def examine(self, gateway: Gateway, body: bytes) -> list[Examined]:
        """What a batch says before the database is asked; see `postings.examine`."""
        return postings.examine(self._verifier, gateway, body)

    def online_terms(self) -> OnlineTerms:
        """What the limits in force let online keys do."""
        with self._database.read() as connection:
            return online_terms(connection)

    def grant(self, gateway_id: str, body: bytes, signature: bytes) -> str:
        """Answer a shop whose card wants its issuer asked; see `grants`."""
        self.gateway(gateway_id).require(GatewayStatus.ACTIVE)
        return self._desk.grant(gateway_id, body, signature)

    def note(self, gateway_id: str, body: bytes, signature: bytes) -> str:
        """A note for the card that a shop has just served; see `grants`."""
        self.gateway(gateway_id).require(GatewayStatus.ACTIVE)
        return self._desk.note(gateway_id, body, signature)

    def wallet_challenge(self) -> str:
        """What a phone's card must sign to be answered; see `grants`."""
        return self._desk.challenge()

    def wallet_note(self, body: bytes) -> str:
        """A note for a phone that asks by itself; see `grants`."""
        return self._desk.wallet_note(body)

    def wallet_return(self, body: bytes) -> str:
        """Take unused allowance back from a phone; see `grants`."""
        return self._desk.wallet_return(body)

    def payments(self, account_id: str | None = None) -> tuple[Payment, ...]:
        """What was posted, in that order; of one account or of all."""
        transfers, entries = store.transfers.c, store.entries.c
        query = (
            sa.select(store.transfers, entries.amount_minor)
            .join(
                store.entries,
                sa.and_(entries.account_id == transfers.account_id, entries.transfer_id == transfers.id),
            )
            .where(entries.book == RECEIVABLE, transfers.gateway_id.is_not(None))
            .order_by(transfers.posted_unix_ms, transfers.record_id)
        )
        if account_id is not None:
            query = query.where(transfers.account_id == account_id)
        with self._database.read() as connection:
            return tuple(
                Payment(
                    record_id=row.record_id,
                    account_id=row.account_id,
                    token_id=row.token_id,
                    gateway_id=row.gateway_id,
                    amount_minor=row.amount_minor,
                    tapped_unix_ms=row.tapped_unix_ms,
                    posted_unix_ms=row.posted_unix_ms,
                    kind=row.kind,
                )
                for row in connection.execute(query)
            )

    def verdicts(self) -> dict[Verdict, int]:
        """How many presented records stand at which verdict."""
        column = store.presentments.c.verdict
        with self._database.read() as connection:
            rows = connection.execute(sa.select(column, sa.func.count()).group_by(column))
            return {Verdict(verdict): int(count) for verdict, count in rows}

    def alarms(self) -> tuple[Alarm, ...]:
        """Oldest first."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(store.alarms).order_by(store.alarms.c.raised_unix_ms))
            return tuple(
                Alarm(
                    AlarmKind(row.kind),
                    row.gateway_id,
                    row.record_id,
                    row.account_id,
                    row.detail,
                    row.raised_unix_ms,
                )
                for row in rows
            )

    def trial_balance(self) -> dict[str, int]:
        """Total per book in minor units; they sum to zero."""
        with self._database.read() as connection:
            return postings.trial_balance(connection)

    def check_books(self) -> None:
        """Hold every transfer to double entry and every account to the reserve invariant.

        Raises:
            AuthenticationFailed: step `double entry`.
            InvariantBroken: an account owes and reserves more than its limit.
        """
        with self._database.read() as connection:
            postings.check_books(connection)
            accounts.check_publications(connection)
            ids = connection.scalars(sa.select(store.accounts.c.id)).all()
            accounts.check_accounts(connection, ids, self._now_unix_s())

    def _prepare(
        self, *, automatic: bool, done: Callable[[str], None] = lambda step: None
    ) -> PreparedSnapshot:
        return self._publisher.prepare(
            self.identity,
            self.policy,
            self.keys.token_key.epoch,
            self._now_unix_s,
            automatic=automatic,
            online_keys=[key.public for key in self.online_keys.all()],
            done=done,
        )

    def _release(self, version: int) -> PublishedSnapshot:
        policy, chest = self.policy, self.ceremony.chest
        self._publisher.sign(version, chest, policy.delta_bases)
        return self._publisher.release(version, chest, utc(self._clock()), policy.metadata_lives)

    def _release_pending(self) -> None:
        """After a crash: release what was committed and meant to go out at once."""
        version = self._publisher.pending()
        if version is None or not self._publisher.is_automatic(version):
            return
        with self.repository.exclusive(wait=False) as free:
            # Not free: whoever published it is still at it. Not signed: it waits for other machines.
            if free:
                with contextlib.suppress(Unavailable, Conflict):
                    self._release(version)

    @cached_property
    def credit(self) -> CreditDesk:
        """Bills, plans, loans, evaluations."""
        return CreditDesk(self._database, self.now_unix_ms)

    @cached_property
    def _desk(self) -> grants.Desk:
        return grants.Desk(
            self._database, self.issuer, self.online_keys, self._log, lambda: self.policy, self.now_unix_ms
        )

    @cached_property
    def issuer(self) -> Issuer:
        """What evidence is checked with. Holds keys."""
        return Issuer(
            currency=self.currency,
            country_numeric=self.identity.country_numeric,
            ca_keys=self.ca_keys,
            master=self.keys.master,
            token_key=self.keys.token_key,
            sealing=self.keys.sealing,
        )

    def _now_unix_s(self) -> int:
        return int(self._clock())

    def _today(self) -> date:
        return datetime.fromtimestamp(self._clock(), UTC).date()

    def _token_key(self, pan: str, psn: int) -> bytes:
        return token_key(self.keys.token_key.secret, pan, psn)

    def _free_pan(self) -> str:
        """A number no token has; should two callers draw the same one, the second insert fails."""
        with self._database.read() as connection:
            while True:
                pan = issuing.new_pan()
                taken = sa.select(store.tokens.c.id).filter_by(token_key=self._token_key(pan, 1))
                if connection.execute(taken).first() is None:
                    return pan


def _create_books(url: sa.URL, policy: Policy, now_unix_ms: int, *, then: Callable[[], object]) -> None:
    with closing(Store.create(url)) as books:
        try:
            with books.write() as connection:
                _add_policy(connection, policy, now_unix_ms)
            then()
        except BaseException:
            books.migrate("base")
            raise


def _add_policy(connection: sa.Connection, policy: Policy, now_unix_ms: int) -> None:
    last: Any = connection.scalar(sa.select(sa.func.max(store.policies.c.version)))
    connection.execute(
        store.policies.insert().values(
            version=(last or 0) + 1, body=policy.model_dump_json(), since_unix_ms=now_unix_ms
        )
    )


def _years_on(day: date, years: int) -> date:
    """The end of that month so many years on."""
    return end_of_month(day.replace(year=day.year + years, day=1))
