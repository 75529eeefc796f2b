"""`doctor`: what is well, what is not, and what to do about it."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Final

import typer

from pos_gateway.cli.places import GATEWAY_HOME, GatewayHome
from pos_gateway.cli.snapshot import in_use
from pos_gateway.cli.terminal import EXIT_NO, Json, emit
from pos_gateway.errors import AuthenticationFailed, PosGatewayError, ReaderUnavailable
from pos_gateway.gateway.certificate import TlsFile, connect, describe
from pos_gateway.gateway.config import Home, load_applications, load_settings
from pos_gateway.gateway.identity import load_enrolment, load_identity
from pos_gateway.gateway.journal import JournalReader
from pos_gateway.gateway.ledger_client import LedgerClient
from pos_gateway.gateway.local_client import ask
from pos_gateway.gateway.readers.models import Way, load_models
from pos_gateway.gateway.readers.probe import probe
from pos_gateway.gateway.readers.source import Readers
from pos_gateway.gateway.readers.system import (
    kernel_modules_in_the_way,
    load_driver_options,
    unreachable_frontends,
)
from pos_gateway.limits.header import Freshness
from pos_gateway.records import Kind

_LITTLE_DISK_BYTES: Final = 512 * 1024 * 1024
_LATEST_RECORDS: Final = 200


class Health(Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    health: Health
    text: str
    advice: str = ""


def doctor(home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Check configuration, certificate, pcscd, reader, clock, disk, journal, snapshot, ledger and gateway.

    Exit code 0 when taps can be taken, 1 when something stands in their way.
    """
    place = Home(home)
    checks: dict[str, Callable[[Home], Finding]] = {
        "configuration": _configuration,
        "enrolment": _enrolment,
        "certificate": _certificate,
        "reader": _reader,
        "reader rights": _reader_rights,
        "kernel modules": _kernel_modules,
        "lights": _lights,
        "disk": _disk,
        "journal": _journal,
        "clock": _clock,
        "snapshot": _snapshot,
        "ledger": _ledger,
        "gateway": _gateway,
    }
    findings = {name: _run(check, place) for name, check in checks.items()}
    well = all(finding.health is not Health.FAIL for finding in findings.values())
    data = {
        "well": well,
        "findings": [{"name": name} | asdict(f) | {"health": f.health.value} for name, f in findings.items()],
    }
    signs = {Health.OK: "✓", Health.WARN: "!", Health.FAIL: "✕"}
    lines = []
    for name, finding in findings.items():
        lines.append(f"{signs[finding.health]} {name}: {finding.text}")
        if finding.advice:
            lines.append(f"    → {finding.advice}")
    emit(data, "\n".join(lines), as_json=as_json)
    if not well:
        raise typer.Exit(EXIT_NO)


def _run(check: Callable[[Home], Finding], home: Home) -> Finding:
    try:
        return check(home)
    except PosGatewayError as error:
        return Finding(Health.FAIL, error.reason, error.advice)


def _configuration(home: Home) -> Finding:
    settings = load_settings(home)
    load_applications()
    changed = f", changed by {home.overrides}" if home.overrides.exists() else ""
    return Finding(Health.OK, f"currency {settings.terminal.currency}{changed}")


def _enrolment(home: Home) -> Finding:
    enrolled = load_enrolment(home.enrolment)
    load_identity(home.identity_key)
    who = enrolled.enrolment
    return Finding(Health.OK, f"{who.terminal_id} of {who.merchant.name}, issuer {who.issuer}")


def _certificate(home: Home) -> Finding:
    load_enrolment(home.enrolment)
    state = describe(TlsFile(home.credentials).certificate, datetime.now(UTC))
    if state.well:
        return Finding(Health.OK, state.sentence)
    return Finding(
        Health.WARN,
        state.sentence,
        "taps work without it; run the gateway and let it reach the ledger. If the ledger says that it is "
        "away for too long or revoked, call the issuer",
    )


def _reader(home: Home) -> Finding:
    try:
        names = _readers(home).names()
    except ReaderUnavailable as error:
        return Finding(
            Health.FAIL,
            error.reason,
            "install pcscd (apt-get install pcscd), start it (systemctl start pcscd.socket)",
        )
    if not names:
        return Finding(
            Health.FAIL,
            "pcscd runs, but no reader is connected",
            "plug the reader in; if its light stays dark try another cable or port",
        )
    return Finding(Health.OK, ", ".join(names))


def _readers(home: Home) -> Readers:
    return Readers(load_models(home.readers), paths=load_settings(home).reader.frontends)


def _reader_rights(home: Home) -> Finding:
    closed = unreachable_frontends(load_models(home.readers))
    if closed:
        return Finding(
            Health.FAIL,
            "this user may not open " + ", ".join(f"{name} ({device.node})" for device, name in closed),
            "pos-gateway reader configure --apply (as root) installs the udev rules; then "
            "udevadm control --reload && udevadm trigger, and put the user into the group plugdev",
        )
    return Finding(Health.OK, "nothing that nfcpy drives is closed to this user")


def _kernel_modules(home: Home) -> Finding:
    loaded = kernel_modules_in_the_way()
    if loaded:
        return Finding(
            Health.WARN,
            f"{', '.join(loaded)} loaded: they take readers away from pcscd and nfcpy",
            f"modprobe -r {' '.join(reversed(loaded))}; pos-gateway reader configure --apply (as root) keeps "
            "them away",
        )
    return Finding(Health.OK, "none that takes readers away")


def _lights(home: Home) -> Finding:
    timeout_s = load_settings(home).card.exchange_timeout_s
    dark: list[str] = []
    lit: list[str] = []
    for found in _readers(home).found():
        if found.model is None or found.driver != "pcsc" or Way.CONTROL not in found.model.ways:
            continue
        told = probe(_readers(home), found, response_timeout_s=timeout_s)
        (dark if told.commands == "refused" else lit).append(found.model.name)
    if dark:
        option = load_driver_options().escape
        return Finding(
            Health.WARN,
            f"escape commands are not allowed: {', '.join(sorted(set(dark)))} shows only its own light",
            f"pos-gateway reader configure --apply (as root) sets bit 0x{option.bit:04X} of {option.key} in "
            f"{option.info_plist}; then systemctl restart pcscd",
        )
    return Finding(Health.OK, f"reached on {', '.join(lit)}" if lit else "no reader here takes commands")


def _disk(home: Home) -> Finding:
    folder = home.path if home.path.exists() else home.path.parent
    try:
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(Health.FAIL, f"{folder}: {error.strerror}", "create the home directory by enrolling")
    text = f"{free_bytes // (1024 * 1024)} MiB free"
    if free_bytes < load_settings(home).journal.headroom_bytes:
        return Finding(Health.FAIL, f"{text}: no payment is begun", "make room; payments go on by themselves")
    if free_bytes < _LITTLE_DISK_BYTES:
        return Finding(Health.WARN, text, "make room: without it payments stop")
    return Finding(Health.OK, text)


def _journal(home: Home) -> Finding:
    if not home.journal.exists():
        return Finding(Health.WARN, "none yet", "it is made by pos-gateway gateway serve")
    key = load_identity(home.identity_key).public_key()
    with JournalReader.open(home.journal) as journal:
        count = journal.verify(key)
    return Finding(Health.OK, f"{count} records, gap-free and unchanged")


def _clock(home: Home) -> Finding:
    now_unix_s = int(time.time())
    settings = load_settings(home)
    latest_unix_s = _latest_recorded_unix_s(home)
    if now_unix_s < latest_unix_s - settings.clock.tolerance_s:
        return Finding(
            Health.FAIL,
            f"{latest_unix_s - now_unix_s} s behind what was already recorded",
            "set the clock (timedatectl); if it is right, the manager confirms it: pos-gateway gateway "
            "confirm-time; a board without a battery for its clock should get one",
        )
    try:
        enrolled = load_enrolment(home.enrolment)
        ledger_unix_s = asyncio.run(_ledger_time_unix_s(enrolled.ledger_url, enrolled.enrolment.authority))
    except PosGatewayError:
        return Finding(Health.OK, "not behind anything recorded (no ledger to compare with)")
    off_s = now_unix_s - ledger_unix_s
    if abs(off_s) > settings.clock.tolerance_s:
        return Finding(Health.FAIL, f"{off_s} s off the ledger's", "set the clock (timedatectl set-ntp true)")
    return Finding(Health.OK, f"within {max(1, abs(off_s))} s of the ledger's")


def _latest_recorded_unix_s(home: Home) -> int:
    if not home.journal.exists():
        return 0
    with JournalReader.open(home.journal) as journal:
        after = max(0, journal.last_sequence - _LATEST_RECORDS)
        latest_unix_ms = 0
        for record in journal.records(after, _LATEST_RECORDS):
            at_unix_ms = record.facts().get("at_unix_ms", 0)
            confirmed = record.kind is Kind.CLOCK_CONFIRMATION
            latest_unix_ms = at_unix_ms if confirmed else max(latest_unix_ms, at_unix_ms)
    return latest_unix_ms // 1000


def _snapshot(home: Home) -> Finding:
    now_unix_s = int(time.time())
    with in_use(home.path) as limits:
        text, fresh = limits.explain(now_unix_s), limits.freshness(now_unix_s)
    match fresh:
        case Freshness.FRESH:
            return Finding(Health.OK, text)
        case Freshness.STALE:
            return Finding(Health.WARN, text, "connect the gateway to the network soon")
        case _:
            return Finding(Health.FAIL, text, "connect the gateway to the network, and check the clock")


def _ledger(home: Home) -> Finding:
    enrolled = load_enrolment(home.enrolment)
    try:
        asyncio.run(_standing(home, enrolled.enrolment.gateway_id))
    except AuthenticationFailed as error:
        return Finding(Health.WARN, error.reason, error.advice or "call the issuer")
    except PosGatewayError as error:
        return Finding(
            Health.WARN,
            error.reason,
            "taps work without it until the limits expire; check network and address when you expect it",
        )
    return Finding(Health.OK, f"answers at {enrolled.ledger_url}")


async def _standing(home: Home, gateway_id: str) -> None:
    """Is the ledger there, and does it let this gateway in?"""
    async with connect(home) as client:
        if await client.standing(gateway_id) != "active":
            raise AuthenticationFailed("this gateway is suspended by the issuer", step="gateway")


async def _ledger_time_unix_s(url: str, authority: bytes) -> int:
    async with LedgerClient(url, authority) as client:
        return await client.ledger_time_unix_ms() // 1000


def _gateway(home: Home) -> Finding:
    try:
        data = ask(home, "GET", "/v1/status")
    except PosGatewayError as error:
        return Finding(Health.WARN, error.reason, error.advice)
    queue = data["queue"]
    return Finding(Health.OK, f"running; {queue['count']} payments ({queue['amount']}) wait for the ledger")
