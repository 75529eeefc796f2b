"""Lights and beeps at their seam: what is sent to a reader, when, and that nothing waits for it. The
exchanges are as the vendors' manuals print them; nothing here was recorded on hardware."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pos_gateway.errors import ReaderUnavailable
from pos_gateway.gateway.config import firmware_config
from pos_gateway.gateway.readers import indicator as indicator_module
from pos_gateway.gateway.readers.indicator import Indicator
from pos_gateway.gateway.readers.models import ReaderModel, load_models
from pos_gateway.gateway.readers.pcsc import PcscReader
from pos_gateway.gateway.readers.port import Indication
from pos_gateway.lab.virtual_reader import ForeignCard, VirtualReader

PATIENCE_S = 10.0
MODELS = {model.name: model for model in load_models()}
ACR122U, ACR1252U, ACR1255U = (MODELS[f"ACS {name}"] for name in ("ACR122U", "ACR1252U", "ACR1255U-J1"))

NO_OWN_BEEP = "FF 00 52 00 00"
OK = "90 00"


class RecordedLine:
    """Replays recorded exchanges in order; anything else fails the test."""

    def __init__(self, *exchanges: tuple[str, str | None]) -> None:
        self._left = list(exchanges)
        self.sent: list[str] = []
        self.done = threading.Event()

    def send(self, command: bytes) -> bytes | None:
        self.sent.append(command.hex(" ").upper())
        if not self._left:
            raise ReaderUnavailable("nothing more was recorded")
        expected, answer = self._left.pop(0)
        if not self._left:
            self.done.set()
        if self.sent[-1] != expected:
            raise ReaderUnavailable(f"{expected} was recorded")
        return None if answer is None else bytes.fromhex(answer)


class JammedLine:
    """A reader that answers a light command when it feels like it."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.entered = threading.Event()
        self.free = threading.Event()

    def send(self, command: bytes) -> bytes | None:
        self.sent.append(command.hex(" ").upper())
        self.entered.set()
        assert self.free.wait(PATIENCE_S)
        return b"\x90\x00"


@pytest.fixture
def show() -> Iterator[Callable[[ReaderModel | None, RecordedLine | JammedLine], Indicator]]:
    made: list[Indicator] = []

    def make(model: ReaderModel | None, line: RecordedLine | JammedLine) -> Indicator:
        made.append(Indicator(model, line))
        return made[-1]

    yield make
    for indicator in made:
        indicator.close()


Show = Callable[[ReaderModel | None, "RecordedLine | JammedLine"], Indicator]


@pytest.mark.parametrize(
    ("model", "indication", "exchanges"),
    [
        (ACR122U, Indication.PRESENT_CARD, [(NO_OWN_BEEP, OK), ("FF 00 40 0F 04 00 00 00 00", "90 03")]),
        (ACR122U, Indication.APPROVED, [(NO_OWN_BEEP, OK), ("FF 00 40 0E 04 01 00 01 01", "90 02")]),
        (ACR122U, Indication.DECLINED, [(NO_OWN_BEEP, OK), ("FF 00 40 0D 04 05 00 01 01", "90 01")]),
        (
            ACR1252U,
            Indication.APPROVED,
            [("E0 00 00 29 01 02", "E1 00 00 00 01 02"), ("E0 00 00 28 01 0A", "E1 00 00 00 01 00")],
        ),
        (
            ACR1255U,
            Indication.PRESENT_CARD,
            [
                ("E0 00 00 21 00", "E1 00 00 00 01 8F"),
                ("E0 00 00 21 01 87", "E1 00 00 00 01 87"),
                ("E0 00 00 29 01 04", "E1 00 00 00 01 04"),
            ],
        ),
        (  # its non-volatile memory holds what we want: it is not written again
            ACR1255U,
            Indication.IDLE,
            [("E0 00 00 21 00", "E1 00 00 00 01 87"), ("E0 00 00 29 01 00", "E1 00 00 00 01 00")],
        ),
    ],
)
def test_what_a_model_is_sent(
    show: Show, model: ReaderModel, indication: Indication, exchanges: list[tuple[str, str | None]]
) -> None:
    line = RecordedLine(*exchanges)
    show(model, line).show(indication)
    assert line.done.wait(PATIENCE_S)
    assert line.sent == [command for command, _ in exchanges]


def test_a_reader_that_takes_no_commands_is_left_alone(show: Show) -> None:
    line = RecordedLine((NO_OWN_BEEP, None))
    show(ACR122U, line).show(Indication.APPROVED)
    assert line.done.wait(PATIENCE_S)
    assert line.sent == [NO_OWN_BEEP]


def test_a_reader_that_came_back_is_started_again(show: Show) -> None:
    line = RecordedLine((NO_OWN_BEEP, OK), ("FF 00 40 0F 04 00 00 00 00", "90 03"))
    indicator = show(ACR122U, line)
    indicator.show(Indication.PRESENT_CARD)
    assert line.done.wait(PATIENCE_S)
    line._left = [(NO_OWN_BEEP, OK), ("FF 00 40 0F 04 00 00 00 00", "90 03")]
    line.done.clear()
    indicator.restart()
    indicator.show(Indication.PRESENT_CARD)
    assert line.done.wait(PATIENCE_S)
    assert line.sent == [NO_OWN_BEEP, "FF 00 40 0F 04 00 00 00 00"] * 2


def test_showing_never_waits_and_the_latest_wins(show: Show) -> None:
    line = JammedLine()
    indicator = show(ACR1252U, line)
    indicator.show(Indication.PRESENT_CARD)
    assert line.entered.wait(PATIENCE_S)
    for indication in (Indication.PROCESSING, Indication.REMOVE_CARD, Indication.APPROVED):
        indicator.show(indication)  # returns, although the reader is still at the first
    assert line.sent == ["E0 00 00 29 01 03"]
    line.free.set()
    _until(lambda: len(line.sent) == 3)
    assert line.sent[1:] == ["E0 00 00 29 01 02", "E0 00 00 28 01 0A"]


def test_an_outcome_is_played_to_its_end(show: Show) -> None:
    line = JammedLine()
    indicator = show(ACR1252U, line)
    indicator.show(Indication.APPROVED)
    assert line.entered.wait(PATIENCE_S)
    indicator.show(Indication.PRESENT_CARD)  # the next customer is quick
    line.free.set()
    _until(lambda: len(line.sent) == 3)
    assert line.sent == ["E0 00 00 29 01 02", "E0 00 00 28 01 0A", "E0 00 00 29 01 03"]


def test_the_light_goes_out_after_an_outcome(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indicator_module, "_OUTCOME_SHOWN_S", 0.01)
    line = JammedLine()
    line.free.set()
    show(ACR1252U, line).show(Indication.DECLINED)
    _until(lambda: line.sent[-1:] == ["E0 00 00 29 01 00"])


def test_asking_again_changes_nothing(show: Show) -> None:
    line = JammedLine()
    line.free.set()
    indicator = show(ACR1252U, line)
    for _ in range(5):
        indicator.show(Indication.PRESENT_CARD)
    indicator.show(Indication.REMOVE_CARD)
    _until(lambda: line.sent[-1:] == ["E0 00 00 29 01 01"])
    assert line.sent.count("E0 00 00 29 01 03") <= 1


def test_a_model_without_lights_starts_no_thread(show: Show) -> None:
    line = JammedLine()
    for model in (None, MODELS["Sony RC-S380"], MODELS["HID Omnikey 5022"]):
        indicator = show(model, line)
        indicator.show(Indication.APPROVED)
        assert indicator._thread is None


def _until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came true")


# Against the real pcscd: vpcd passes no escape command on, as libccid does not by default.


@pytest.fixture
def model(tmp_path: Path) -> ReaderModel:
    """A model that the virtual reader's name fits, with the ACR122U's commands."""
    (tmp_path / "readers").mkdir()
    text = (firmware_config() / "readers" / "acs-acr122u.toml").read_text()
    (tmp_path / "readers" / "lab.toml").write_text(
        text.replace('name_pattern = "ACR122"', 'name_pattern = "lab reader"')
    )
    (model,) = load_models(firmware=tmp_path)
    return model


def test_a_driver_that_refuses_escape_commands_is_asked_once(
    virtual_reader: VirtualReader, model: ReaderModel
) -> None:
    reader = PcscReader(virtual_reader.names[0], model=model)
    assert reader.commands.send(bytes.fromhex("FF00480000")) is None
    assert reader.commands.refused
    assert reader.commands.escape_allowed() is None
    assert reader.commands.driver_version() is None
    for indication in Indication:
        reader.indicate(indication)
    assert reader.wait_for_card(0.0) is None
    reader.close()


@pytest.mark.parametrize(
    ("features", "allowed"),
    [
        # As libccid answers CM_IOCTL_GET_FEATURE_REQUEST: tag, length 4, control code, for each feature.
        ("0A0442330004 120442330012 130442000001", True),
        ("120442330012", False),
        ("", False),
        ("120442330013", False),
    ],
)
def test_whether_escape_commands_are_allowed_stands_among_the_features(
    model: ReaderModel, monkeypatch: pytest.MonkeyPatch, features: str, allowed: bool
) -> None:
    reader = PcscReader("never opened", model=model)
    monkeypatch.setattr(reader.commands, "_control", lambda code, command: bytes.fromhex(features))
    assert reader.commands.escape_allowed() is allowed
    reader.close()


def test_refused_commands_go_as_pseudo_apdus_while_a_card_is_open(
    virtual_reader: VirtualReader, model: ReaderModel
) -> None:
    reader = PcscReader(virtual_reader.names[0], model=model)
    virtual_reader.insert(ForeignCard.BLANK)
    channel = reader.wait_for_card(PATIENCE_S)
    assert channel is not None
    # A real reader would keep it for itself; vpcd hands it to the card, which knows no such thing.
    assert reader.commands.send(bytes.fromhex("FF00480000")) == b"\x6a\x82"
    channel.close()
    assert reader.commands.send(bytes.fromhex("FF00480000")) is None
    reader.close()


def test_a_light_does_not_get_in_the_way_of_the_next_card(
    virtual_reader: VirtualReader, model: ReaderModel
) -> None:
    reader = PcscReader(virtual_reader.names[0], model=model)
    virtual_reader.insert(ForeignCard.BLANK)
    for _ in range(20):
        reader.indicate(Indication.PRESENT_CARD)
        channel = reader.wait_for_card(PATIENCE_S)
        assert channel is not None
        reader.indicate(Indication.PROCESSING)
        assert channel.transceive(bytes.fromhex("00A4040001F000")) == b"\x6a\x82"
        channel.close()
        reader.indicate(Indication.APPROVED)
    reader.close()


def test_commands_to_a_reader_that_is_gone(virtual_reader: VirtualReader, model: ReaderModel) -> None:
    reader = PcscReader("no such lab reader", model=model)
    with pytest.raises(ReaderUnavailable, match="reader list"):
        reader.commands.send(b"\xff\x00\x48\x00\x00")
    reader.close()
