"""What the suite is run against: a reader and a card, real ones in a tester's hands or virtual ones."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.errors import NotFound, PosGatewayError
from pos_gateway.gateway.readers.frontend import FrontendReader
from pos_gateway.gateway.readers.models import ReaderModel, load_models, model_by_usb, model_of
from pos_gateway.gateway.readers.pcsc import PcscReader, list_readers
from pos_gateway.gateway.readers.port import CardChannel, Indication
from pos_gateway.gateway.readers.probe import Probe, probe
from pos_gateway.gateway.readers.source import Found, Readers
from pos_gateway.lab.card_state import CardState
from pos_gateway.lab.scripted_card import Dialogue
from pos_gateway.lab.udp_card import UdpField
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.lab.virtual_reader import VirtualReader
from pos_gateway.lab.vpcd import Fault

VIRTUAL, UDP = "virtual", "udp"
PATIENCE_S = 20.0
TESTERS_PATIENCE_S = 60.0


@dataclass
class Log:
    """All that was said to cards, and what the report tells beside it."""

    dialogues: list[tuple[str, Dialogue]] = field(default_factory=list)
    timings_us: dict[str, list[float]] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)
    test: str = ""

    def note(self, text: str) -> None:
        self.notes.append((self.test, text))


class RecordingChannel:
    """A card channel that writes down what passes, and how long each answer took."""

    def __init__(self, channel: CardChannel, log: Log, told: dict[str, Any]) -> None:
        self._channel = channel
        self._log = log
        self._told = told
        self.exchanges: list[tuple[bytes, bytes]] = []
        self.elapsed_us: list[float] = []
        self._closed = False

    def transceive(self, command: bytes) -> bytes:
        begun = time.perf_counter_ns()
        answer = self._channel.transceive(command)
        self.elapsed_us.append((time.perf_counter_ns() - begun) / 1000)
        self.exchanges.append((command, answer))
        return answer

    def close(self) -> None:
        self._channel.close()
        if not self._closed and self.exchanges:
            told = {**self._told, "elapsed_us": [round(us) for us in self.elapsed_us]}
            self._log.dialogues.append((self._log.test, Dialogue(tuple(self.exchanges), told)))
        self._closed = True


class Rig(ABC):
    """One reader, one card of ours if there is an issuer for it, and whoever moves them."""

    attended = False
    """Is there a tester, who does what is asked and is slower and less exact than a machine?"""

    def __init__(self, reader: PcscReader | FrontendReader, found: Found, log: Log) -> None:
        self.reader = reader
        self.found = found
        self.log = log
        self.probe: Probe | None = None

    @property
    def model(self) -> ReaderModel | None:
        return self.found.model

    def ask(self) -> Probe:
        """What the reader is and which firmware it has; asked once."""
        if self.probe is None:
            self.probe = probe(_OneReader(self.reader), self.found, response_timeout_s=PATIENCE_S)
        return self.probe

    def take(self, patience_s: float = PATIENCE_S) -> RecordingChannel:
        """The card in the field, opened."""
        channel = self.reader.wait_for_card(patience_s)
        assert channel is not None, "no card came into the field in time"
        told = {"reader": self.found.name, "driver": self.found.driver}
        if self.probe is not None:
            told["firmware"] = self.probe.firmware or "not told"
        return RecordingChannel(channel, self.log, told)

    def take_standing(self) -> RecordingChannel:
        """The card, which may be in the field already; else it is held there, to stay."""
        try:
            there = not self.reader.wait_for_removal(0.0)
        except PosGatewayError:
            there = False
        if not there:
            self.hold()
        return self.take()

    def emptied(self) -> None:
        """Wait until the reader says that the field is empty."""
        patience_s = TESTERS_PATIENCE_S if self.attended else PATIENCE_S
        assert self.reader.wait_for_removal(patience_s), "the reader still sees a card"

    @abstractmethod
    def hold(self, *faults: Fault) -> None:
        """Hold the card into the field. `faults` only where nobody is asked to do it."""

    @abstractmethod
    def withdraw(self) -> None:
        """Take the card out of the field."""

    @abstractmethod
    def unplug(self) -> None: ...

    @abstractmethod
    def plug_in(self) -> None: ...

    @abstractmethod
    def saw(self, what: str) -> bool | None:
        """Did the tester see it? None where there is nobody to ask."""

    @property
    def counter(self) -> int | None:
        """The card's counter, where one can look into it."""
        return None

    def close(self) -> None:
        self.reader.close()


class _OneReader(Readers):
    """The rig's own reader, for `probe`, which closes what it opened; the rig's opens itself anew."""

    def __init__(self, reader: PcscReader | FrontendReader) -> None:
        super().__init__(())
        self._reader = reader

    def open(self, name: str, response_timeout_s: float) -> PcscReader | FrontendReader:
        return self._reader


class PcscRig(Rig):
    """The virtual card in the virtual reader under a real pcscd."""

    def __init__(self, virtual: VirtualReader, card: Path, state: Path, log: Log) -> None:
        name = virtual.names[0]
        super().__init__(PcscReader(name), Found(name, "pcsc", None), log)
        self._virtual, self._card, self._state = virtual, card, state

    def hold(self, *faults: Fault) -> None:
        self._virtual.insert(self._card, state=self._state, faults=faults)

    def withdraw(self) -> None:
        self._virtual.remove()

    def unplug(self) -> None:
        self._virtual.kill_pcscd()

    def plug_in(self) -> None:
        self._virtual.start_pcscd()

    def saw(self, what: str) -> bool | None:
        return None

    @property
    def counter(self) -> int | None:
        return _counter(self._card, self._state)


class UdpRig(Rig):
    """The virtual card behind nfcpy's udp driver."""

    def __init__(self, field: UdpField, card: Path, state: Path, log: Log) -> None:
        self._plugged_in = True
        super().__init__(
            FrontendReader("udp", lambda: field.path if self._plugged_in else None),
            Found("udp", "nfcpy", None),
            log,
        )
        self._field, self._card, self._state = field, card, state

    def hold(self, *faults: Fault) -> None:
        own = Personalisation.from_json(self._card.read_text())
        self._field.insert(VirtualCard(own, state_path=self._state), faults=faults)

    def withdraw(self) -> None:
        self._field.remove()

    def unplug(self) -> None:
        self._plugged_in = False
        self._field.unplug()
        self.reader.close()

    def plug_in(self) -> None:
        self._plugged_in = True
        self._field.plug_in()

    def saw(self, what: str) -> bool | None:
        return None

    @property
    def counter(self) -> int | None:
        return _counter(self._card, self._state)

    def close(self) -> None:
        super().close()
        self._field.close()


class AttendedRig(Rig):
    """A real reader, and a tester who is asked to do things. `tell` shows her a sentence, `read` takes her
    answer."""

    attended = True

    def __init__(
        self,
        reader: PcscReader | FrontendReader,
        found: Found,
        log: Log,
        tell: Callable[[str], None],
        read: Callable[[], str],
    ) -> None:
        super().__init__(reader, found, log)
        self._tell, self._read = tell, read

    def take(self, patience_s: float = TESTERS_PATIENCE_S) -> RecordingChannel:
        return super().take(patience_s)

    def hold(self, *faults: Fault) -> None:
        self._tell("Hold the card to the reader, and leave it there.")

    def brush(self) -> None:
        self._tell("Touch the reader with the card only for a moment: pull it away as fast as you can.")

    def withdraw(self) -> None:
        self._tell("Take the card away.")

    def unplug(self) -> None:
        self._tell("Unplug the reader.")

    def plug_in(self) -> None:
        self._tell("Plug the reader in again.")

    def saw(self, what: str) -> bool | None:
        self._tell(f"Does the reader show: {what}? [y/n]")
        return self._read().strip().lower().startswith("y")


def attended_reader(wanted: str) -> tuple[PcscReader | FrontendReader, Found]:
    """The reader that `--reader` names: `usb:VVVV:PPPP`, `tty:…` or `udp:…` for nfcpy, else a part of a
    PC/SC name.

    Raises:
        NotFound: no PC/SC reader of that name.
        ReaderUnavailable: pcscd does not answer.
    """
    models = load_models()
    if wanted.startswith(("usb:", "tty:", "udp:")):
        model = model_of(wanted, models)
        parts = wanted.split(":")
        if parts[0] == "usb" and len(parts) == 3:
            model = model_by_usb(parts[1], parts[2], models)
        return FrontendReader(wanted, lambda: wanted), Found(wanted, "nfcpy", model)
    name = next((name for name in list_readers() if wanted in name), None)
    if name is None:
        raise NotFound(f"no PC/SC reader whose name holds {wanted!r}", advice="pos-gateway reader list")
    model = model_of(name, models)
    return PcscReader(name, model=model), Found(name, "pcsc", model)


def until_there_again(rig: Rig) -> None:
    """Wait until the reader can be asked again."""
    deadline = time.monotonic() + TESTERS_PATIENCE_S
    while True:
        try:
            rig.reader.wait_for_card(0.0)
        except PosGatewayError:
            assert time.monotonic() < deadline, "the reader did not come back"
            time.sleep(0.2)
        else:
            return


def until_gone(rig: Rig) -> PosGatewayError:
    """Wait until the reader is gone; what it says then."""
    deadline = time.monotonic() + TESTERS_PATIENCE_S
    while time.monotonic() < deadline:
        try:
            rig.reader.wait_for_card(0.0)
        except PosGatewayError as error:
            return error
        time.sleep(0.2)
    raise AssertionError("the reader is still there")


def moments(model: ReaderModel | None) -> Sequence[tuple[Indication, str]]:
    """What the model's light can show."""
    if model is None or model.indications is None:
        return ()
    shown = [(i, model.indications.of(i)) for i in Indication]
    return [(i, sequence.shows) for i, sequence in shown if sequence is not None]


def _counter(card: Path, state: Path) -> int:
    if state.exists():
        return CardState.from_json(state.read_text()).counter
    return Personalisation.from_json(card.read_text()).counter
