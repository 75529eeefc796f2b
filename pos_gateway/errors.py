"""The one exception tree. A decline is a value (see `authorization.reasons`); these are failures.

    PosGatewayError
    ├── InvalidInput            something we were given cannot be read: what, and where in it
    │   ├── InvalidCardData     bytes a card sent
    │   ├── InvalidSnapshot     bytes of a limit snapshot
    │   ├── InvalidMessage      an HTTP body, a batch, a journal record
    │   └── InvalidConfiguration
    ├── CardNotSupported        a card that is not ours (scheme cards among them); nothing was read
    ├── AuthenticationFailed    a signature, certificate or cryptogram does not verify: which step
    │   └── CertificateLapsed   a gateway's certificate counts no more; the gateway may ask for another
    ├── NotPermitted            whoever asks may not do this, or has not signed in
    ├── Conflict                the same id came with other content
    ├── NotFound
    ├── Unavailable             a part we depend on is not there now
    │   ├── CardLeft            the card left the field in mid-dialogue
    │   ├── ReaderUnavailable
    │   └── LedgerUnreachable
    └── OutcomeUnknown          a commit neither succeeded nor failed for certain

This module imports nothing of ours.
"""

from __future__ import annotations


class PosGatewayError(Exception):
    """Base of every failure. `reason` says what is wrong, `advice` what to do about it.

    Neither may ever hold a card number, a key or a secret: both are shown to people and logged.
    """

    def __init__(self, reason: str, *, advice: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.reason} ({self.advice})" if self.advice else self.reason


class NotPermitted(PosGatewayError):
    """Whoever asks may not do this. `signed_in`: they are known, and theirs is not the role for it.
    `retry_after_s`: too many wrong attempts; seconds until the next one counts, 0 if that is not why."""

    def __init__(
        self, reason: str, *, signed_in: bool = False, retry_after_s: int = 0, advice: str = ""
    ) -> None:
        super().__init__(reason, advice=advice)
        self.signed_in = signed_in
        self.retry_after_s = retry_after_s


class InvalidInput(PosGatewayError):
    """Input that cannot be read. `where` is the place in it: a byte offset, a tag, a field, a line."""

    def __init__(self, reason: str, *, where: str = "", advice: str = "") -> None:
        super().__init__(f"{reason} at {where}" if where else reason, advice=advice)
        self.where = where


class InvalidCardData(InvalidInput):
    """The card's bytes break the rules of their format."""


class InvalidSnapshot(InvalidInput):
    """A limit snapshot's bytes break the rules of their format."""


class InvalidMessage(InvalidInput):
    """A message or record from another program breaks the rules of its format."""


class InvalidConfiguration(InvalidInput):
    """A configuration file, key or setting is wrong."""


class CardNotSupported(PosGatewayError):
    """The card carries no application of ours. `scheme` names the scheme its AID belongs to, if known."""

    def __init__(self, reason: str, *, scheme: str | None = None, advice: str = "") -> None:
        super().__init__(reason, advice=advice)
        self.scheme = scheme


class AuthenticationFailed(PosGatewayError):
    """Something signed does not verify. `step` is a stable name of the check that failed."""

    def __init__(self, reason: str, *, step: str, advice: str = "") -> None:
        super().__init__(f"{step}: {reason}", advice=advice)
        self.step = step


class CertificateLapsed(AuthenticationFailed):
    """A gateway's certificate has expired or was replaced. The gateway itself is still trusted: it may ask
    for another by its device key."""


class Conflict(PosGatewayError):
    """An id that was seen before came again with other content: an alarm, never a success."""


class NotFound(PosGatewayError):
    """What was asked for does not exist."""


class Unavailable(PosGatewayError):
    """A part we depend on is not there now; trying later can succeed."""


class CardLeft(Unavailable):
    """The card left the field before it had answered."""


class ReaderUnavailable(Unavailable):
    """No reader, no pcscd, or the reader stopped answering."""


class LedgerUnreachable(Unavailable):
    """The line to the ledger is down, or what answers there is not the ledger we enrolled with."""


class OutcomeUnknown(PosGatewayError):
    """A commit failed in a way that leaves open whether it reached the disk: stop, reopen, re-read."""
