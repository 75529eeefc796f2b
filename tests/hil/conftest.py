"""Hardware in the loop: one suite for any reader and card.

    pytest tests/hil                                   the virtual card under a real pcscd
    pytest tests/hil --reader udp                      the virtual card behind nfcpy's udp driver
    pytest tests/hil --reader "ACS ACR122U"            a PC/SC reader, and a tester who is asked to tap
    pytest tests/hil --reader usb:054c:06c3            one that nfcpy drives
        --card-home FOLDER     the ledger (of a test issuer) that issued the tester's card
        --hil-report FOLDER    report.html, junit.xml, and every dialogue

Without `--card-home` a real reader is tested with any ISO/IEC 14443-4 card, and what needs one of ours is
skipped.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from pos_gateway.lab.shop import Shop
from pos_gateway.lab.udp_card import UdpField
from pos_gateway.lab.virtual_reader import VirtualReader
from pos_gateway.ledger.config import Policy
from tests.hil import report
from tests.hil.rig import UDP, VIRTUAL, AttendedRig, Log, PcscRig, Rig, UdpRig, attended_reader

LIMIT_MINOR = 10_000_000
_log = Log()
_results: list[report.Result] = []
_rigs: list[Rig] = []


@pytest.fixture(scope="session")
def hil_shop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wanted: str
) -> Iterator[Shop | None]:
    """A shop enrolled with the card's issuer; None if there is no issuer for the tester's card."""
    folder = tmp_path_factory.mktemp("hil")
    given: str | None = request.config.getoption("--card-home")
    if wanted in (VIRTUAL, UDP):
        ledger_home: Path = request.getfixturevalue("ledger_home")
        shutil.copytree(ledger_home, folder / "ledger")
    elif given is None:
        yield None
        return
    else:
        (folder / "ledger").symlink_to(Path(given).resolve(), target_is_directory=True)
    policy = Policy(card_tc_rate_limit=1_000_000, card_cumulative_cap_minor=10**12)
    with Shop(folder, policy=policy if given is None else None) as shop:
        yield shop


@pytest.fixture(scope="session")
def wanted(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--reader"))


@pytest.fixture(scope="session")
def session_rig(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    wanted: str,
    hil_shop: Shop | None,
    record_testsuite_property: Callable[[str, object], None],
) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("card")
    card, state = folder / "card.json", folder / "card.state"
    rig: Rig
    if wanted in (VIRTUAL, UDP):
        assert hil_shop is not None
        _, own = hil_shop.issue(limit_minor=LIMIT_MINOR)
        card.write_text(own.to_json())
    if wanted == VIRTUAL:
        virtual: VirtualReader = request.getfixturevalue("running_reader")
        rig = PcscRig(virtual, card, state, _log)
    elif wanted == UDP:
        rig = UdpRig(UdpField(), card, state, _log)
    else:
        reader, found = attended_reader(wanted)
        rig = AttendedRig(reader, found, _log, *_tester(request.config))
    if hil_shop is not None:
        hil_shop.publish()
    _rigs.append(rig)
    probed = rig.ask()
    record_testsuite_property("reader", probed.name)
    record_testsuite_property("firmware", probed.firmware or "not told")
    yield rig
    rig.close()


@pytest.fixture
def rig(session_rig: Rig, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """The rig, its field empty before and after."""
    _log.test = request.node.name
    if not session_rig.reader.wait_for_removal(0.0):
        session_rig.withdraw()
        session_rig.emptied()
    yield session_rig
    if not session_rig.attended:
        session_rig.withdraw()


@pytest.fixture
def standing_rig(session_rig: Rig, request: pytest.FixtureRequest) -> Rig:
    """The rig as the test before left it: the card may stay in the field."""
    _log.test = request.node.name
    return session_rig


@pytest.fixture
def shop(hil_shop: Shop | None) -> Shop:
    if hil_shop is None:
        pytest.skip("no issuer for the tester's card: --card-home FOLDER")
    return hil_shop


def _tester(config: pytest.Config) -> tuple[Callable[[str], None], Callable[[], str]]:
    """How to tell the tester something and hear her answer, past pytest's capture."""
    capture = config.pluginmanager.getplugin("capturemanager")

    def aside() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if capture is None else capture.global_and_fixture_disabled()

    def tell(text: str) -> None:
        with aside():
            print(f"\n>>> {text}", flush=True)

    def read() -> str:
        with aside():
            return sys.stdin.readline()

    return tell, read


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    told: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]
    if told.when == "call" or told.outcome != "passed":
        kind = told.outcome if told.when == "call" or told.outcome == "skipped" else "error"
        text = ""
        if told.outcome == "skipped" and isinstance(told.longrepr, tuple):
            text = str(told.longrepr[2])
        elif told.outcome == "failed":
            text = str(call.excinfo.value if call.excinfo else "").splitlines()[0][:300]
        _results.append(report.Result(item.name, kind, told.duration, text))


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.getoption("--hil-report")
    if folder is not None:
        report.write(
            Path(folder),
            reader=str(session.config.getoption("--reader")),
            probed=_rigs[0].probe if _rigs else None,
            results=_results,
            log=_log,
            at=datetime.now().astimezone(),
        )
