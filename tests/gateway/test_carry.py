"""A stick between a shop without a line and its issuer: real journal, real ledger, real files."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from pos_gateway.carrying import ROOT, TO_GATEWAY, TO_LEDGER, CarriedVerdict, Letter
from pos_gateway.cli import main as cli
from pos_gateway.errors import AuthenticationFailed, InvalidMessage, NotFound, Unavailable
from pos_gateway.gateway.carry import export_queue, read_letters, take_letter
from pos_gateway.gateway.till import Approved
from pos_gateway.lab.faults.site import Customer, Site, copied
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.authority import Authority
from pos_gateway.ledger.carry import _server_identity, take_queues, write_letters, write_limits
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.records import Kind, Record, Verdict, uuid7
from pos_gateway.stick import MANIFEST, read_set, write_set

NOW = 1_800_000_000_000


@pytest.fixture
def shop(tmp_path: Path, ledger_home: Path) -> Iterator[Shop]:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    with Shop(tmp_path) as shop:
        yield shop


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    (tmp_path / "stick").mkdir()
    return tmp_path / "stick"


def pay(shop: Shop, count: int) -> list[Record]:
    _, personalisation = shop.issue(limit_minor=100_000)
    shop.publish()
    card, records = VirtualCard(personalisation), []
    for number in range(count):
        payment_id = uuid7(shop.ledger.now_unix_ms() + number, bytes([number]) * 10)
        payment = shop.till.new_payment(payment_id, 700, shop.journal.last_sequence + 1)
        outcome = shop.till.tap(payment, DirectChannel(card))
        assert isinstance(outcome, Approved)
        records.append(outcome.record)
    return records


def out(shop: Shop, stick: Path) -> int:
    return export_queue(shop.journal, shop.enrolment.gateway_id, shop.key, stick).records


def letters(shop: Shop, stick: Path) -> list[Letter]:
    found, told = read_letters(
        stick,
        authority=shop.enrolment.authority,
        gateway_id=shop.enrolment.gateway_id,
        now_unix_ms=shop.ledger.now_unix_ms(),
    )
    assert not told.damaged
    assert not told.refused
    return found


def take(shop: Shop, letter: Letter) -> tuple[int, int]:
    return take_letter(shop.journal, letter, now_unix_ms=shop.ledger.now_unix_ms(), deadline_s=None)


def answered(shop: Shop, stick: Path) -> Letter:
    write_letters(shop.ledger, stick, [shop.enrolment.gateway_id])
    [letter] = letters(shop, stick)
    return letter


def test_a_queue_goes_out_and_its_verdicts_come_back_once(shop: Shop, stick: Path) -> None:
    records = pay(shop, 3)
    assert out(shop, stick) == 3
    [queue] = take_queues(shop.ledger, stick)
    assert queue.verdicts == {"posted": 3}
    letter = answered(shop, stick)
    assert shop.journal.exposure.count == 3
    assert take(shop, letter) == (3, 0)
    assert shop.journal.exposure.count == 0
    assert take(shop, letter) == (0, 3)
    about = shop.journal.about(records[0].id)[-1]
    assert about.kind is Kind.ACKNOWLEDGEMENT
    assert about.facts()["verdict"] == "posted"
    assert out(shop, stick) == 0


def test_the_stick_brings_a_later_word_and_never_an_earlier_one(shop: Shop, stick: Path) -> None:
    [record] = pay(shop, 1)
    out(shop, stick)
    take_queues(shop.ledger, stick)
    posted = answered(shop, stick)
    [told] = posted.verdicts
    unknown = replace(posted, verdicts=(replace(told, verdict=Verdict.UNKNOWN, reason="no such token"),))
    late = replace(posted, verdicts=(replace(told, verdict=Verdict.LATE, reason="late"),))
    assert take(shop, unknown) == (1, 0)
    assert out(shop, stick) == 1  # presented again, as over the line
    assert take(shop, late) == (1, 0)
    assert take(shop, unknown) == (0, 1)
    assert take(shop, posted) == (1, 0)
    assert take(shop, late) == (0, 1)
    assert shop.journal.last_verdict(record.id) == "posted"
    assert not shop.journal.view.refused


def test_a_verdict_on_other_content_or_of_another_shop_is_passed_over(shop: Shop, stick: Path) -> None:
    pay(shop, 1)
    out(shop, stick)
    take_queues(shop.ledger, stick)
    letter = answered(shop, stick)
    [told] = letter.verdicts
    assert take(shop, replace(letter, verdicts=(replace(told, record_hash=bytes(32)),))) == (0, 1)
    assert take(shop, replace(letter, verdicts=(replace(told, record_id=UUID(int=7)),))) == (0, 1)
    assert shop.journal.exposure.count == 1


def test_after_a_restore_the_old_letter_says_nothing_and_all_is_carried_again(
    shop: Shop, stick: Path, tmp_path: Path
) -> None:
    pay(shop, 2)
    out(shop, stick)
    take_queues(shop.ledger, stick)
    old = answered(shop, stick)
    assert take(shop, old) == (2, 0)
    shop.ledger.close()
    Ledger.restored(tmp_path / "ledger")
    shop.ledger = Ledger.open(tmp_path / "ledger")
    new = answered(shop, stick)
    assert new.epochs[:-1] == old.epochs
    empty = replace(new, verdicts=())
    assert take(shop, empty) == (0, 0)
    assert shop.journal.view.again is not None
    assert out(shop, stick) == 2
    with pytest.raises(AuthenticationFailed, match="letter epoch"):
        take(shop, replace(old, at_unix_ms=1))
    assert take(shop, new) == (0, 2)
    assert shop.journal.view.again is None
    assert out(shop, stick) == 0


def _letter(shop: Shop, gateway_id: str | None = None) -> Letter:
    told = CarriedVerdict(UUID(int=1), bytes(32), Verdict.POSTED, "")
    return Letter(gateway_id or shop.enrolment.gateway_id, (str(UUID(int=9)),), NOW, (told,))


def _open(shop: Shop, data: bytes, now_unix_ms: int | None = None) -> Letter:
    return Letter.open(
        data,
        authority=shop.enrolment.authority,
        gateway_id=shop.enrolment.gateway_id,
        now_unix_ms=now_unix_ms or shop.ledger.now_unix_ms(),
        where="stick",
    )


def test_only_the_ledgers_server_writes_letters_and_only_to_this_gateway(shop: Shop) -> None:
    key, certificate = _server_identity(shop.ledger.keys.tls)
    letter = _letter(shop)
    data = letter.sign(key, certificate)
    assert _open(shop, data) == letter
    with pytest.raises(AuthenticationFailed, match="letter address"):
        _open(shop, _letter(shop, "gw-other").sign(key, certificate))
    with pytest.raises(AuthenticationFailed, match="letter signature"):
        _open(shop, data.replace(b"posted", b"invalid"))
    with pytest.raises(AuthenticationFailed, match="letter signature"):
        _open(shop, letter.sign(ec.generate_private_key(ec.SECP256R1()), certificate))
    until_ms = int(1000 * certificate.not_valid_after_utc.timestamp())
    with pytest.raises(AuthenticationFailed, match="expired"):
        _open(shop, data, until_ms + 1)
    now = datetime.now(UTC)
    mallory = ec.generate_private_key(ec.SECP256R1())
    stranger = Authority.create(mallory, "Harbour Credit", now)
    with pytest.raises(AuthenticationFailed, match="not of the ledger"):
        _open(shop, letter.sign(mallory, stranger.certify_server(mallory.public_key(), now)))
    # A gateway's certificate is of the right authority, and makes no ledger of it.
    other = shop.ledger.keys.authority.certify_gateway("gw-x", mallory.public_key(), now, timedelta(days=1))
    with pytest.raises(AuthenticationFailed, match="not its server's"):
        _open(shop, letter.sign(mallory, other))
    for nonsense in (b"", b"[]", b"{}", b'{"body":1,"certificate":"","signature":""}'):
        with pytest.raises(InvalidMessage):
            _open(shop, nonsense)


def test_another_shops_stick_is_told_by_name(shop: Shop, stick: Path) -> None:
    with pytest.raises(NotFound, match="brings no letter"):
        letters(shop, stick)
    (stick / ROOT / TO_GATEWAY / "gw-elsewhere").mkdir(parents=True)
    with pytest.raises(NotFound, match="it is gw-elsewhere's"):
        letters(shop, stick)


def test_what_is_whole_counts_and_what_is_not_is_named(shop: Shop, stick: Path) -> None:
    pay(shop, 1)
    out(shop, stick)
    place = stick / ROOT / TO_LEDGER / shop.enrolment.gateway_id
    [batch] = [path for path in place.iterdir() if path.name != MANIFEST]
    whole = batch.read_bytes()
    for damaged in (whole[:-1], b"", whole[:-1] + b"!"):
        batch.write_bytes(damaged)
        [queue] = take_queues(shop.ledger, stick)
        assert queue.damaged == [batch.name]
        assert not queue.verdicts
    batch.write_bytes(whole)
    # Under another gateway's name it is still this one's.
    place.rename(place.with_name("gw-other"))
    [queue] = take_queues(shop.ledger, stick)
    assert queue.verdicts == {"posted": 1}
    assert not shop.ledger.alarms()


def test_a_set_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    place = tmp_path / "set"
    write_set(place, [b"1" * 5000, b"2"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(Unavailable, match="is full"):
            write_set(place, [b"3" * 50, b"4" * 5000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [data for _, data in read_set(place)] == [b"1" * 5000, b"2"]
    assert len(list(place.iterdir())) == 3
    write_set(place, [b"5"])
    assert [data for _, data in read_set(place)] == [b"5"]
    assert len(list(place.iterdir())) == 2


def test_nothing_outside_a_set_is_read(tmp_path: Path) -> None:
    place = tmp_path / "set"
    write_set(place, [b"mine"])
    [name] = [path.name for path in place.iterdir() if path.name != MANIFEST]
    (place / name).unlink()
    (tmp_path / "secret").write_bytes(b"mine")
    (place / name).symlink_to(tmp_path / "secret")
    assert list(read_set(place)) == [(name, None)]
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["files"][0]["name"] = "../secret"
    (place / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InvalidMessage, match="not a manifest"):
        list(read_set(place))


def test_a_write_protected_stick_is_told() -> None:
    with pytest.raises(Unavailable, match="/proc/self/stick"):
        write_set(Path("/proc/self/stick"), [b"x"])


def test_the_commands_carry_there_and_back(
    stick: Path,
    tmp_path: Path,
    ledger_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    with Shop(tmp_path) as shop:
        pay(shop, 2)
        shop.ledger.publish()
    gateway, ledger = (
        ["--home", str(shop.home.path), "--json"],
        ["--home", str(tmp_path / "ledger"), "--json"],
    )

    def run(*words: str, code: int = 0) -> dict[str, object]:
        monkeypatch.setattr("sys.argv", ["pos-gateway", *words])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        assert int(exit.value.code or 0) == code, found
        return found

    assert run("gateway", "carry", "export", str(stick), *gateway)["records"] == 2
    taken = run("ledger", "carry", "import", str(stick), *ledger)
    assert taken["gateways"] == [
        {
            "gateway_id": shop.enrolment.gateway_id,
            "verdicts": {"posted": 2},
            "damaged": [],
            "refused": [],
        }
    ]
    run("ledger", "carry", "export", str(stick), *ledger)
    brought = run("gateway", "carry", "import", str(stick), *gateway)
    assert brought["journalled"] == 2
    assert brought["limits"] == {"brought": True, "changed": True, "version": 2, "problem": ""}
    again = run("gateway", "carry", "import", str(stick), *gateway)
    assert (again["journalled"], again["passed_over"]) == (0, 2)
    [letter] = [p for p in (stick / ROOT / TO_GATEWAY).rglob("*.json") if p.name != MANIFEST]
    letter.write_bytes(b"torn")
    assert run("gateway", "carry", "import", str(stick), *gateway, code=1)["damaged"] == [letter.name]


def test_limits_on_a_stick_are_copied_once(shop: Shop, stick: Path) -> None:
    pay(shop, 1)
    assert write_limits(shop.ledger, stick) > 0
    assert write_limits(shop.ledger, stick) == 0


def test_a_running_gateway_carries_too(tmp_path: Path, ledger_home: Path, stick: Path) -> None:
    """The real program, by its local API, while a customer pays."""
    with Site(copied(ledger_home, tmp_path / "site")) as site, Customer(site) as customer:
        site.start_gateway()
        customer.wait_for(3)
        customer.stop()
        sent = site.ask("POST", "/v1/carry/export", {"folder": str(stick)})
        assert sent["records"] == len(customer.approved)
        with Ledger.open(site.ledger_home) as ledger:
            [queue] = take_queues(ledger, stick)
            assert queue.verdicts == {"posted": len(customer.approved)}
            write_limits(ledger, stick)
            write_letters(ledger, stick, [queue.gateway_id])
        brought = site.ask("POST", "/v1/carry/import", {"folder": str(stick)})
        assert brought["journalled"] == len(customer.approved)
        assert brought["limits"]["problem"] == ""
        assert site.ask("GET", "/v1/status")["queue"]["count"] == 0
        refused = site.ask("POST", "/v1/carry/import", {"folder": str(tmp_path)})
        assert refused["error"]["code"] == "NotFound"
        site.stop()
