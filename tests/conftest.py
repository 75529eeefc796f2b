"""What the tests of several floors share: an issuer, its cards, and virtual readers under a real pcscd.

PC/SC calls of the test process never reach a pcscd of this machine: libpcsclite takes its socket's name
from the environment at its first call, so the name is set here, before any, and pcscd starts behind it
when a test asks for `virtual_reader`.
"""

from __future__ import annotations

import atexit
import itertools
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from pos_gateway.emv.application import Sale
from pos_gateway.emv.authentication import CaPublicKey
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.gateway.readers.pcsc import PcscReader
from pos_gateway.lab.card_host import PCSCD_SOCKET
from pos_gateway.lab.virtual_reader import VirtualReader
from pos_gateway.ledger import issuing
from pos_gateway.ledger.keys import ICC_KEY_BITS, KeyRing, generate_rsa_key
from pos_gateway.ledger.ledger import Ledger

_PCSCD_OF_THE_MACHINE = os.environ.get("PCSCLITE_CSOCK_NAME")
_READER_DIRECTORY = Path(tempfile.mkdtemp(prefix="pos-gateway-test-"))
atexit.register(shutil.rmtree, _READER_DIRECTORY, ignore_errors=True)
os.environ["PCSCLITE_CSOCK_NAME"] = str(_READER_DIRECTORY / PCSCD_SOCKET)

TODAY = date(2026, 11, 24)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the longer tests too")
    parser.addoption("--seed", type=int, help="of random tests, to repeat a run; else another one each time")
    parser.addoption(
        "--reader", default="virtual", help="tests/hil: virtual, udp, usb:…, tty:…, a PC/SC name"
    )
    parser.addoption("--card-home", help="tests/hil: the test ledger that issued the tester's card")
    parser.addoption("--hil-report", help="tests/hil: a folder for report.html, junit.xml and dialogues")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--reader") not in ("virtual", "udp"):
        # A real reader is asked for: it is under this machine's own pcscd.
        del os.environ["PCSCLITE_CSOCK_NAME"]
        if _PCSCD_OF_THE_MACHINE is not None:
            os.environ["PCSCLITE_CSOCK_NAME"] = _PCSCD_OF_THE_MACHINE
    folder = config.getoption("--hil-report")
    if folder is not None and config.option.xmlpath is None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        config.option.xmlpath = str(Path(folder) / "junit.xml")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        kept = [item for item in items if item.get_closest_marker("long") is None]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Of a random test; printed, so that a failure can be repeated with --seed."""
    given: int | None = request.config.getoption("--seed")
    seed = secrets.randbelow(1 << 32) if given is None else given
    print(f"--seed {seed}")
    return seed


MakeCard = Callable[..., Personalisation]
MakeSale = Callable[..., Sale]


@pytest.fixture(scope="session")
def card_issuer(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    """The keys of an issuer."""
    folder = tmp_path_factory.mktemp("issuer") / "keys"
    return KeyRing.generate(folder, now=datetime(2026, 11, 24, tzinfo=UTC))


@pytest.fixture(scope="session")
def capk(card_issuer: KeyRing) -> CaPublicKey:
    return issuing.ca_public_key(card_issuer, date(2036, 12, 31))


@pytest.fixture(scope="session")
def make_card(card_issuer: KeyRing) -> MakeCard:
    """A factory of genuine personalisations; keyword arguments replace fields of the profile."""
    icc_key = generate_rsa_key(ICC_KEY_BITS)
    issuer_certificate = issuing.certify_own_key(
        card_issuer, expires=date(2032, 12, 31), serial=bytes.fromhex("000001")
    )
    serials = itertools.count(2)

    def make(**fields: Any) -> Personalisation:
        profile = issuing.CardProfile(
            pan=issuing.new_pan(),
            psn=1,
            effective=date(2026, 1, 1),
            expires=date(2030, 12, 31),
            currency_numeric=156,
            country_numeric=156,
            per_tap_cap_minor=100_000,
            cumulative_cap_minor=10_000_000,
            tc_rate_limit=50,
            start_counter=0x0123_4567_89AB,
        )
        return issuing.personalise(
            replace(profile, **fields),
            icc_key=icc_key,
            serial=next(serials).to_bytes(3, "big"),
            issuer_certificate=issuer_certificate,
            keys=card_issuer,
        )

    return make


@pytest.fixture(scope="session")
def make_sale() -> MakeSale:
    """A factory of sales under an unreachable ceiling, each with its own unpredictable number."""
    numbers = itertools.count(1)

    def make(**fields: Any) -> Sale:
        number = next(numbers)
        sale = Sale(
            amount_minor=1930,
            currency_numeric=156,
            country_numeric=156,
            at=datetime(2026, 11, 24, 12, 30, 0, tzinfo=UTC),
            unpredictable_number=number.to_bytes(4, "big"),
            sequence_counter=number,
            terminal_id="TILL0001",
            merchant_id="M000001",
            merchant_category="5411",
            sale_id=number.to_bytes(16, "big"),
            ceiling=(1 << 48) - 1,
            limit_digest=bytes(range(16)),
        )
        return replace(sale, **fields)

    return make


@pytest.fixture
def card_file(make_card: MakeCard, tmp_path: Path) -> Path:
    """A genuine card's personalisation on disk."""
    path = tmp_path / "card.json"
    path.write_text(make_card().to_json())
    return path


@pytest.fixture(scope="session")
def running_reader() -> Iterator[VirtualReader]:
    with VirtualReader(slots=2, directory=_READER_DIRECTORY) as reader:
        yield reader


@pytest.fixture
def virtual_reader(running_reader: VirtualReader) -> Iterator[VirtualReader]:
    """Two virtual readers under a real pcscd, empty before and after."""
    yield running_reader
    for slot, name in enumerate(running_reader.names):
        running_reader.remove(slot=slot)
        reader = PcscReader(name)
        assert reader.wait_for_removal(10.0), "pcscd did not see the card leave"
        reader.close()


@pytest.fixture(scope="session")
def ledger_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new ledger's home, to be copied: making its keys takes a second."""
    home = tmp_path_factory.mktemp("issuer") / "ledger"
    Ledger.create(home, issuer="Harbour Credit").close()
    return home


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The demo's story, told once: the folder with all it left behind, and what it printed."""
    folder = tmp_path_factory.mktemp("story")
    # Its own pcscd: the one that this test process may speak to is not to be seen.
    environment = {k: v for k, v in os.environ.items() if k != "PCSCLITE_CSOCK_NAME"}
    done = subprocess.run(
        [sys.executable, "-m", "pos_gateway.lab.story", "--once", "--folder", str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done
