"""`bench …`: what things cost, always beside the bare cost measured in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pos_gateway.cli.terminal import Json, emit
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
