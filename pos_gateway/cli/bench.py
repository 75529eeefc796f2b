"""`bench …`: what things cost, always beside the bare cost measured in the same run."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from pos_gateway.cli.terminal import Json, emit
from pos_gateway.lab.journal_bench import bench_journal
from pos_gateway.lab.rest_bench import bench_rest
from pos_gateway.lab.snapshot_bench import bench_snapshot
from pos_gateway.lab.tap_bench import bench_tap

app = typer.Typer(no_args_is_help=True, help="Measure, side by side with the bare cost.")


@app.callback()
def bench() -> None:
    """Measure, side by side with the bare cost."""


@app.command()
def tap(
    taps: Annotated[int, typer.Option(min=1, max=100_000, help="How many to measure.")] = 500,
    folder: Annotated[
        Path | None, typer.Option(help="On which disk the journal lies.", exists=True, file_okay=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """A tap over the real PC/SC stack: card and reader, the gateway's own share, and the ratio of that
    share to the RSA checks and one durable append alone."""
    data = bench_tap(taps, folder)
    emit(data, _text(data), as_json=as_json)


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
    costs = ", ".join(f"{name.replace('_', ' ')} {cost}" for name, cost in data["costs_us"].items())
    return "\n".join([*lines, f"of a record's own cost, µs: {costs}"])


class Protocol(Enum):
    """What POS software speaks."""

    REST = "rest"


@app.command()
def pos(
    protocol: Annotated[Protocol, typer.Option(help="The interface to measure.")] = Protocol.REST,
    taps: Annotated[int, typer.Option(min=1, max=100_000, help="How many to measure of each kind.")] = 200,
    folder: Annotated[
        Path | None, typer.Option(help="On which disk the journal lies.", exists=True, file_okay=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """What a POS interface adds: the gateway's own share of a payment that a POS asks for over HTTPS, and its
    ratio to that of the same tap begun without it."""
    data = bench_rest(taps, folder)
    emit(data, _pos_text(data), as_json=as_json)


def _pos_text(data: dict[str, Any]) -> str:
    names = {
        "card_and_reader_us": "card and reader",
        "own_share_without_us": "own share without the protocol",
        "own_share_us": "own share",
    }
    lines = [f"{data['taps']} taps each way, µs", f"{'':34}{'p50':>10}{'p99':>10}"]
    lines += [f"{name:34}{data[key]['p50']:>10}{data[key]['p99']:>10}" for key, name in names.items()]
    lines.append(
        f"own share ÷ own share without the protocol: {data['own_share_ratio']}"
        f" (aim: ≤ {data['target_ratio']})"
    )
    return "\n".join(lines)


def _text(data: dict[str, Any]) -> str:
    names = {
        "tap_us": "a whole tap",
        "card_and_reader_us": "  of it card and reader",
        "own_share_us": "  of it the gateway's own share",
        "bare_apdus_us": "the same APDUs back to back",
        "rsa_checks_us": "the RSA checks alone",
        "append_fdatasync_us": "one raw append + fdatasync",
    }
    lines = [f"{data['taps']} taps of {data['apdus_per_tap']} APDUs, µs", f"{'':34}{'p50':>10}{'p99':>10}"]
    lines += [f"{name:34}{data[key]['p50']:>10}{data[key]['p99']:>10}" for key, name in names.items()]
    lines.append(
        f"own share ÷ (RSA checks + fdatasync): {data['own_share_ratio']} (aim: ≤ {data['target_ratio']})"
    )
    return "\n".join(lines)
