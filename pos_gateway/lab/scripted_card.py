"""Cards that do not behave: they leave, stall, lie and talk nonsense, by script or by seed; and cards that
say again what another said once.

Each wraps an APDU-level card and stands in for it in any field (`lab.vpcd`, `lab.udp_card`, `lab.field`).
A card leaves by raising `CardLeft` from `process`.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from pos_gateway.emv.apdu import INS_SELECT
from pos_gateway.errors import CardLeft, InvalidMessage
from pos_gateway.lab.vpcd import Card

FORMAT: Final = "pos-gateway dialogue 1"
MAX_EXCHANGES: Final = 64
_LEFT: Final = "the card left by its script"
_REFUSALS: Final = (0x6985, 0x6A82, 0x6283, 0x6700, 0x6100, 0x6C00, 0x6F00, 0x9000)


class Trick(Enum):
    """What a card does instead of answering."""

    LEAVE_BEFORE = "leave before"
    """It never sees the command."""
    LEAVE_AFTER = "leave after"
    """It acts on the command; its answer is lost."""
    STALL = "stall"
    """It answers late."""
    LIE = "lie"
    """One bit of its answer is another."""
    REFUSE = "refuse"
    """A status word and nothing else."""
    SHORT = "short"
    """Its answer is cut off."""
    NOTHING = "nothing"
    """An empty answer, without even a status word."""
    NONSENSE = "nonsense"
    """Random bytes."""
    OLD = "old"
    """The answer to an earlier command."""
    SWOLLEN = "swollen"
    """An answer as long as an APDU can be."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a script: at the `apdu_number`-th APDU since the card was made, the first being 1."""

    apdu_number: int
    trick: Trick
    delay_s: float = 0.0
    seed: int = 0


class ScriptedCard:
    """A card that plays its tricks when its script says so, and is the card beneath otherwise."""

    def __init__(self, card: Card, script: Sequence[Line]) -> None:
        self._card = card
        self._script = {line.apdu_number: line for line in script}
        self._count = 0
        self._answers: list[bytes] = []

    def power_up(self) -> None:
        self._card.power_up()

    def process(self, command: bytes) -> bytes:
        """
        Raises:
            CardLeft: it leaves.
        """
        self._count += 1
        line = self._script.get(self._count)
        if line is not None and line.trick is Trick.LEAVE_BEFORE:
            raise CardLeft(_LEFT)
        answer = self._card.process(command)
        earlier, self._answers = self._answers, [*self._answers, answer]
        if line is None:
            return answer
        return _played(line.trick, answer, earlier, random.Random(line.seed), line.delay_s)


class FuzzedCard:
    """A card that makes itself up from a seed: a dialogue at a time (they begin with a SELECT), mostly like
    the card beneath, with any trick at any point.

    `leaves` and `stall_s`: may it leave, and how long it stalls. `dialogues` counts them.
    """

    def __init__(self, card: Card, seed: int, *, leaves: bool = True, stall_s: float = 0.0) -> None:
        self._card = card
        self._seed = seed
        self._stall_s = stall_s
        self._tricks = [
            trick
            for trick in Trick
            if (leaves or trick not in (Trick.LEAVE_BEFORE, Trick.LEAVE_AFTER))
            and (stall_s or trick is not Trick.STALL)
        ]
        self.dialogues = 0
        self._answers: list[bytes] = []
        self._random = random.Random(seed)
        self._likelihood = 0.0

    def power_up(self) -> None:
        self._card.power_up()

    def process(self, command: bytes) -> bytes:
        """
        Raises:
            CardLeft: it leaves.
        """
        if command[1:2] == bytes([INS_SELECT]) and b"2PAY" not in command:
            self.dialogues += 1
            self._random = random.Random(f"{self._seed}/{self.dialogues}")
            self._likelihood = self._random.choice((0.0, 0.1, 0.3, 0.8))
        if self._random.random() >= self._likelihood:
            answer = self._card.process(command)
            self._answers = [*self._answers[-20:], answer]
            return answer
        trick = self._random.choice(self._tricks)
        if trick is Trick.LEAVE_BEFORE:
            raise CardLeft(_LEFT)
        answer = self._card.process(command)
        return _played(trick, answer, self._answers, self._random, self._stall_s)


def _played(
    trick: Trick, answer: bytes, earlier: Sequence[bytes], rng: random.Random, delay_s: float
) -> bytes:
    match trick:
        case Trick.LEAVE_BEFORE | Trick.LEAVE_AFTER:
            raise CardLeft(_LEFT)
        case Trick.STALL:
            threading.Event().wait(delay_s)
            return answer
        case Trick.LIE:
            at = rng.randrange(len(answer))
            return answer[:at] + bytes([answer[at] ^ 1 << rng.randrange(8)]) + answer[at + 1 :]
        case Trick.REFUSE:
            return rng.choice((0x6985, 0x6A82, 0x6283, 0x6700, 0x6100, 0x6C00, 0x6F00, 0x9000)).to_bytes(
                2, "big"
            )
        case Trick.SHORT:
            return answer[: rng.randrange(len(answer))]
        case Trick.NOTHING:
            return b""
        case Trick.NONSENSE:
            return rng.randbytes(rng.randrange(1, 259))
        case Trick.OLD:
            return rng.choice(earlier) if earlier else b""
        case Trick.SWOLLEN:
            return answer[:-2].ljust(256, b"\x9f")[:256] + b"\x90\x00"


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What a terminal and a card said to each other, APDU by APDU, and what it is good for again: `told`
    says where it comes from and how it ended. It holds the full token number."""

    exchanges: tuple[tuple[bytes, bytes], ...]
    told: Mapping[str, Any]

    def to_json(self) -> str:
        exchanges = [{"command": c.hex().upper(), "answer": a.hex().upper()} for c, a in self.exchanges]
        return json.dumps({"format": FORMAT, **self.told, "exchanges": exchanges}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Dialogue:
        """
        Raises:
            InvalidMessage: no dialogue.
        """
        try:
            raw = json.loads(text)
            if raw.pop("format") != FORMAT:
                raise ValueError("another format")
            exchanges = raw.pop("exchanges")
            if len(exchanges) > MAX_EXCHANGES:
                raise ValueError("too long")
            pairs = tuple((bytes.fromhex(e["command"]), bytes.fromhex(e["answer"])) for e in exchanges)
            return cls(pairs, raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidMessage(
                f"not a recorded dialogue ({type(error).__name__})", where="dialogue file"
            ) from None


class ReplayedCard:
    """A card that was recorded: it answers as it did then, in the same order, and to nothing else."""

    def __init__(self, dialogue: Dialogue) -> None:
        self._left = list(dialogue.exchanges)

    def power_up(self) -> None:
        """Nothing to forget."""

    def process(self, command: bytes) -> bytes:
        """
        Raises:
            CardLeft: the recording ends here.
        """
        if not self._left:
            raise CardLeft("the recording ends here")
        expected, answer = self._left.pop(0)
        return answer if command == expected else b"\x6f\x00"
