"""What a virtual card remembers when the power goes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Final

from pos_gateway.emv.note import LogEntry
from pos_gateway.errors import InvalidMessage

_ANSWERS_KEPT: Final = 8
_LOG_ENTRIES_KEPT: Final = 16


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """A TC's answer bytes, for the terminal that asked and the unpredictable number it asked with."""

    terminal: str
    unpredictable_number: bytes
    answer: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class CardState:
    """Everything that changes in a card's life. Amounts in minor units.

    `day` is the latest transaction date (9A, YYMMDD) of a TC, `tcs_that_day` how many it gave then. `note`
    is what the last PUT DATA brought, with its sequence; empty before the first.
    """

    counter: int
    atc: int = 0
    previous_digest: bytes = bytes(8)
    cumulative_minor: int = 0
    day: str = ""
    tcs_that_day: int = 0
    answers: tuple[StoredAnswer, ...] = ()
    log: tuple[LogEntry, ...] = ()
    note_sequence: int = 0
    note: bytes = b""

    def tcs_on(self, day: str) -> int:
        """TCs that count against the rate limit on `day`; an earlier day counts as the latest one, or
        turning a terminal's clock back would reset the limit."""
        return 0 if day > self.day else self.tcs_that_day

    def answer_to(self, terminal: str, unpredictable_number: bytes) -> bytes | None:
        for stored in self.answers:
            if (stored.terminal, stored.unpredictable_number) == (terminal, unpredictable_number):
                return stored.answer
        return None

    def moved(self, amount_minor: int, day: str, terminal: str) -> CardState:
        """After a TC over `amount_minor`."""
        counter = self.counter + amount_minor
        return replace(
            self,
            counter=counter,
            cumulative_minor=self.cumulative_minor + amount_minor,
            day=max(day, self.day),
            tcs_that_day=self.tcs_on(day) + 1,
            log=(*self.log, LogEntry(terminal, amount_minor, counter))[-_LOG_ENTRIES_KEPT:],
        )

    def with_answer(self, stored: StoredAnswer) -> CardState:
        return replace(self, answers=(*self.answers, stored)[-_ANSWERS_KEPT:])

    def to_json(self) -> str:
        """Byte strings are hex."""
        return json.dumps(asdict(self), default=bytes.hex)

    @classmethod
    def from_json(cls, text: str) -> CardState:
        """
        Raises:
            InvalidMessage: no state of a virtual card.
        """
        try:
            raw = json.loads(text)
            raw["previous_digest"] = bytes.fromhex(raw["previous_digest"])
            raw["note"] = bytes.fromhex(raw.get("note", ""))
            raw["answers"] = tuple(
                StoredAnswer(
                    a["terminal"], bytes.fromhex(a["unpredictable_number"]), bytes.fromhex(a["answer"])
                )
                for a in raw["answers"]
            )
            raw["log"] = tuple(LogEntry(**entry) for entry in raw["log"])
            return cls(**raw)
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidMessage(
                f"not the state of a virtual card ({type(error).__name__})", where="card state file"
            ) from None
