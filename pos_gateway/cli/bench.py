"""`bench …`: what things cost, always beside the bare cost measured in the same run."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from pos_gateway.cli.terminal import Json, emit
from pos_gateway.lab.billing_bench import bench_billing
from pos_gateway.lab.journal_bench import bench_journal
from pos_gateway.lab.pos_bench import bench_pos
from pos_gateway.lab.publish_bench import bench_publish
from pos_gateway.lab.rest_bench import bench_rest
from pos_gateway.lab.snapshot_bench import bench_snapshot
from pos_gateway.lab.sync_bench import bench_sync
from pos_gateway.lab.tap_bench import DRIVERS, bench_tap
from pos_gateway.lab.tap_under_sync_bench import bench_taps_under_sync

app = typer.Typer(no_args_is_help=True, help="Measure, side by side with the bare cost.")


@app.callback()
def bench() -> None:
    """Measure, side by side with the bare cost."""


@app.command()
def tap(
    taps: Annotated[int, typer.Option(min=1, max=100_000, help="How many to measure.")] = 500,
    reader: Annotated[
        str, typer.Option(help=f"Over which driver: {' or '.join(DRIVERS)}.", show_default=True)
    ] = "virtual",
    folder: Annotated[
        Path | None, typer.Option(help="On which disk the journal lies.", exists=True, file_okay=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """A tap over the real PC/SC stack or nfcpy: card and reader, the gateway's own share, and the ratio of
    that share to the RSA checks and one durable append alone; its APDUs, and why each is needed."""
    if reader not in DRIVERS:
        raise typer.BadParameter(f"one of {', '.join(DRIVERS)}")
    data = bench_tap(taps, folder, reader)
    emit(data, _text(data), as_json=as_json)


@app.command()
def billing(
    accounts: Annotated[int, typer.Option(min=100, max=100_000_000, help="How many to bill.")] = 1_000_000,
    batch: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many at once.")] = 20_000,
    directory: Annotated[
        Path | None,
        typer.Option(help="Where PostgreSQL lies, about 3 KB an account.", exists=True, file_okay=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Closing a month on PostgreSQL, batch by batch in turn with a bare UPDATE … FROM of the same rows."""
    data = bench_billing(accounts, batch, directory, lambda text: print(text, file=sys.stderr, flush=True))
    text = (
        f"{data['billed']} bills in {data['seconds']} s: {data['accounts_per_second']} accounts/s, "
        f"{data['ratio_to_bare_update']} of the bare update's speed"
    )
    emit(data, text, as_json=as_json)


@app.command()
def snapshot(
    tokens: Annotated[
        int, typer.Option(min=1000, max=200_000_000, help="How many tokens it holds.")
    ] = 1_000_000,
    directory: Annotated[
        Path | None,
        typer.Option(help="Where the files lie, about 230 bytes a token.", exists=True, file_okay=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """The limit snapshot: build, open, verified lookups cold and warm, delta, merge, memory; beside raw
    reads, LMDB and hashing the file."""
    data = bench_snapshot(tokens, directory, lambda text: print(text, file=sys.stderr, flush=True))
    emit(data, _snapshot_text(data), as_json=as_json)


def _snapshot_text(data: dict[str, Any]) -> str:
    build, opening, merge = data["build"], data["open"], data["merge"]
    lines = [
        f"{data['tokens']} tokens, {data['bytes_per_token']} bytes each",
        f"built in {build['seconds']} s, {build['records_per_second']} records/s",
        f"opens in {opening['open_us']['p50']} µs (hashing the file: {opening['hash_whole_file_ms']} ms)",
    ]
    for state in ("warm", "cold"):
        found = data["lookup"][state]
        for name in ("verified", "raw_pread", "lmdb"):
            lines.append(f"{state:5}{name:12} p50 {found[name]['p50']:>9} µs  p99 {found[name]['p99']:>9} µs")
    lines += [
        f"delta of {data['delta']['records']} changes active in "
        f"{data['delta']['activation']['all_nodes_loaded_ms']['p50']} ms",
        f"merged in {merge['seconds']} s, {merge['records_per_second']} records/s",
    ]
    for name, target in data["targets"].items():
        sign = "✓" if target["met"] else "✕"
        lines.append(f"{sign} {name}: {target['measured']} (aim: ≤ {target['at_most']})")
    return "\n".join(lines)


@app.command()
def journal(
    records: Annotated[int, typer.Option(min=0, max=10_000_000, help="How many it holds already.")] = 300_000,
    folder: Annotated[
        Path | None, typer.Option(help="On which disk the journal lies.", exists=True, file_okay=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Durable commits with 1, 8 and 64 payments waiting, and their ratios to raw append + fdatasync and to
    overwriting preallocated blocks + fdatasync."""
    data = bench_journal(records, folder)
    emit(data, _journal_text(data), as_json=as_json)


class Books(Enum):
    """Which database a ledger keeps its books in."""

    SQLITE = "sqlite"
    POSTGRES = "postgres"


@app.command()
def sync(
    backlog: Annotated[
        int, typer.Option(min=1000, max=10_000_000, help="How many payments wait for the ledger.")
    ] = 100_000,
    ledger: Annotated[Books, typer.Option(help="Which database the ledger's books are in.")] = Books.SQLITE,
    cards: Annotated[int, typer.Option(min=2, max=100_000, help="How many cards made them.")] = 2000,
    with_taps: Annotated[
        bool,
        typer.Option(
            "--with-taps", help="What a tap costs meanwhile, instead: the books are in SQLite then."
        ),
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="On which disk journal and books lie.", exists=True, file_okay=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """A long backlog brought to the ledger over TLS: end to end, what verifying costs part by part, and
    posting beside a server-side INSERT … SELECT of the same rows."""
    if with_taps:
        data = bench_taps_under_sync(backlog, cards, folder=folder, progress=_tell_progress)
        emit(data, _taps_text(data), as_json=as_json)
        return
    data = bench_sync(
        backlog, cards, postgresql=ledger is Books.POSTGRES, folder=folder, progress=_tell_progress
    )
    emit(data, _sync_text(data), as_json=as_json)


def _taps_text(data: dict[str, Any]) -> str:
    lines = [
        f"{data['backlog']} payments synchronised beside the taps, {data['synchronised_per_s']}/s",
        f"{'':8}{'taps':>8}{'own share p50':>16}{'p99 µs':>10}{'whole tap p50':>16}{'p99 µs':>10}",
    ]
    for name in ("before", "during"):
        told = data[name]
        own, whole = told["own_share_us"], told["tap_us"]
        lines.append(
            f"{name:8}{told['taps']:>8}{own['p50']:>16}{own['p99']:>10}{whole['p50']:>16}{whole['p99']:>10}"
        )
    lines.append(f"own share, during ÷ before: {data['ratio']} (aim: ≤ {data['target_ratio']})")
    return "\n".join(lines)


def _tell_progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _sync_text(data: dict[str, Any]) -> str:
    whole, posting = data["end_to_end"], data["posting"]
    lines = [
        f"{data['backlog']} payments of {data['cards']} cards, books in {data['ledger']}",
        f"end to end {whole['presentments_per_s']}/s ({whole['us_per_record']} µs each)",
        "verifying a record, µs on one core:",
        *(f"  {name.replace('_', ' '):24}{cost:>9}" for name, cost in data["verification_us"].items()),
        "posting a record, µs (CPU of the ledger's process):",
        *(
            f"  {name:24}{cost['wall']:>9}  ({cost['cpu']})"
            for name, cost in posting["steps_us_per_record"].items()
        ),
        f"posting {posting['per_s']}/s ({posting['us_per_record']} µs each), "
        f"INSERT … SELECT {posting['insert_select_per_s']}/s ({posting['insert_select_us_per_record']} µs): "
        f"ratio {posting['ratio']} (aim: ≥ {posting['target_ratio']})",
    ]
    return "\n".join(lines)


@app.command()
def publish(
    accounts: Annotated[
        int, typer.Option(min=1000, max=20_000_000, help="How many accounts the ledger has.")
    ] = 100_000,
    by_use: Annotated[
        bool, typer.Option("--by-use", help="By the shipped policy whose allowances go by use.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="On which disk books and files lie.", exists=True, file_okay=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Every account's ceilings decided anew and published, on PostgreSQL, beside a plain COPY … TO and a
    server-side INSERT … SELECT of the same rows; how long others wait for an account meanwhile."""
    data = bench_publish(accounts, by_use=by_use, folder=folder, progress=_tell_progress)
    emit(data, _publish_text(data), as_json=as_json)


def _publish_text(data: dict[str, Any]) -> str:
    lines = [f"{data['accounts']} accounts with {data['tokens']} tokens, allowances {data['policy']}"]
    for name in ("first", "again"):
        told = data[name]
        steps = ", ".join(f"{step} {taken_s}" for step, taken_s in told["steps_s"].items())
        waits = told["others_wait_ms"]
        lines.append(
            f"{name:6} {told['seconds']} s, {told['accounts_per_s']} accounts/s, {told['us_per_token']} µs a "
            f"token ({steps}); others wait p50 {waits['p50']} ms, p99 {waits['p99']}, at most {waits['max']}"
        )
    urgent = data["urgent"]
    lines += [
        f"urgent {urgent['seconds']} s, of it building {urgent['steps_s']['build']}",
        f"COPY … TO {data['copy_to_s']} s: ratio {data['ratio']} (aim: ≥ {data['target_ratio']}), "
        f"of deciding alone {data['ratio_of_deciding']}",
        f"INSERT … SELECT {data['insert_select_s']} s: ratio to it, of deciding alone "
        f"{data['ratio_to_insert_select']}",
    ]
    return "\n".join(lines)


def _journal_text(data: dict[str, Any]) -> str:
    lines = [
        f"{data['records']} records before, opened in {data['open_s']} s; {data['record_bytes']} bytes each",
        f"raw append + fdatasync {data['raw_append_per_s']}/s (p50 {data['raw_append_p50_us']} µs), "
        f"overwriting {data['raw_overwrite_per_s']}/s (p50 {data['raw_overwrite_p50_us']} µs)",
        f"{'waiting':>8}{'commits/s':>11}{'÷ append':>10}{'by p50':>8}{'÷ overwrite':>13}"
        f"{'CPU µs':>9}{'p50 µs':>10}{'p99 µs':>10}",
    ]
    columns = (
        "commits_per_s",
        "ratio_to_append",
        "ratio_of_p50",
        "ratio_to_overwrite",
        "cpu_us_each",
        "p50_us",
        "p99_us",
    )
    for waiting, told in data["waiting"].items():
        widths = zip(columns, (11, 10, 8, 13, 9, 10, 10), strict=True)
        line = f"{waiting:>8}" + "".join(f"{told[column]:>{width}}" for column, width in widths)
        lines.append(line + (f"   (aim: ≥ {told['target_ratio']} × append)" if told["target_ratio"] else ""))
    for together, told in data["sqlite_alone"].items():
        lines.append(
            f"SQLite alone, {together} rows a commit: {told['records_per_s']} records/s, "
            f"{told['ratio_to_append']} × append, {told['cpu_us_each']} µs CPU each"
        )
    costs = ", ".join(f"{name.replace('_', ' ')} {cost}" for name, cost in data["costs_us"].items())
    return "\n".join([*lines, f"of a record's own cost, µs: {costs}"])


class Protocol(Enum):
    """What POS software speaks."""

    NEXO = "nexo"
    REST = "rest"


@app.command()
def pos(
    protocol: Annotated[Protocol, typer.Option(help="The interface to measure.")] = Protocol.NEXO,
    taps: Annotated[int, typer.Option(min=1, max=100_000, help="How many to measure of each kind.")] = 200,
    folder: Annotated[
        Path | None, typer.Option(help="On which disk the journal lies.", exists=True, file_okay=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """What a POS interface adds: the gateway's own share of a payment that a POS asks for over HTTPS, and its
    ratio to that of the same tap begun without it."""
    data = bench_rest(taps, folder) if protocol is Protocol.REST else bench_pos(taps, folder)
    emit(data, _pos_text(data), as_json=as_json)


def _pos_text(data: dict[str, Any]) -> str:
    names = {
        "card_and_reader_us": "card and reader",
        "own_share_without_us": "own share without the protocol",
        "own_share_us": "own share, plain messages",
        "own_share_encrypted_us": "own share, encrypted messages",
    }
    lines = [f"{data['taps']} taps each way, µs", f"{'':34}{'p50':>10}{'p99':>10}"]
    lines += [
        f"{name:34}{data[key]['p50']:>10}{data[key]['p99']:>10}" for key, name in names.items() if key in data
    ]
    ratios = f"{data['own_share_ratio']} plain"
    if "own_share_ratio_encrypted" in data:
        ratios += f", {data['own_share_ratio_encrypted']} encrypted"
    lines.append(f"own share ÷ own share without the protocol: {ratios} (aim: ≤ {data['target_ratio']})")
    return "\n".join(lines)


def _text(data: dict[str, Any]) -> str:
    names = {
        "tap_us": "a whole tap",
        "card_and_reader_us": "  of it card and reader",
        "own_share_us": "  of it the gateway's own share",
        "own_cpu_us": "    and its processor time",
        "bare_apdus_us": "the same APDUs back to back",
        "rsa_checks_us": "the RSA checks alone",
        "append_fdatasync_us": "one raw append + fdatasync",
    }
    lines = [f"{number}. {apdu['command']}  {apdu['why']}" for number, apdu in enumerate(data["apdus"], 1)]
    lines.append(f"{data['taps']} taps of {data['apdus_per_tap']} APDUs over {data['driver']}, µs")
    lines.append(f"{'':34}{'p50':>10}{'p99':>10}")
    lines += [f"{name:34}{data[key]['p50']:>10}{data[key]['p99']:>10}" for key, name in names.items()]
    lines.append(
        f"own share ÷ (RSA checks + fdatasync): {data['own_share_ratio']} (aim: ≤ {data['target_ratio']})"
    )
    return "\n".join(lines)
