from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pos_gateway.cli.main import build
from pos_gateway.lab.snapshot_bench import Population
from pos_gateway.limits.record import RECORD_BYTES, LimitRecord


def measured(tokens: int, folder: Path) -> dict[str, Any]:
    arguments = ["bench", "snapshot", "--tokens", str(tokens), "--directory", str(folder), "--json"]
    result = CliRunner().invoke(build(arguments), arguments)
    assert result.exception is None, result.exception
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    assert not list(folder.iterdir())
    return document


def check(data: dict[str, Any]) -> None:
    """What does not depend on how fast or busy the machine is."""
    assert data["merge"]["signed_root_reproduced"]
    for name in ("bytes_per_token", "resident_growth_mb"):
        assert data["targets"][name]["met"], data["targets"][name]
    for state in ("warm", "cold"):
        found = data["lookup"][state]
        assert {"verified", "raw_pread", "lmdb", "ratio_to_raw_pread", "ratio_to_lmdb"} <= found.keys()
        assert found["verified"]["p50"] > found["raw_pread"]["p50"] > 0
        assert data["overlay"][state]["through_delta"]["p50"] > 0
    for name in ("build", "delta", "merge"):
        assert data[name]["records_per_second"] > 0
    assert set(data["targets"]) == {
        "open_share_of_hashing",
        "open_growth_from_10_thousand_tokens",
        "cold_lookup_ratio",
        "warm_lookup_ratio",
        "bytes_per_token",
        "resident_growth_mb",
        "delta_active_ms",
    }


def test_it_measures_all_in_one_run(tmp_path: Path) -> None:
    data = measured(100_000, tmp_path)
    check(data)
    assert data["delta"]["records"] == 1000


@pytest.mark.long
def test_ten_million(tmp_path: Path) -> None:
    data = measured(10_000_000, tmp_path)
    check(data)
    assert data["open"]["share_of_hashing"] < 0.01


@pytest.mark.parametrize("tokens", [1000, 300_000])
def test_the_population_is_what_it_says(tokens: int) -> None:
    population = Population(tokens, seed=5)
    before, after = (
        [
            LimitRecord.from_bytes(chunk[at : at + RECORD_BYTES])
            for chunk in population.chunks(changed=changed)
            for at in range(0, len(chunk), RECORD_BYTES)
        ]
        for changed in (False, True)
    )
    assert len(before) == tokens
    assert before == sorted(before)
    changes = b"".join(population.changes())
    listed = [
        LimitRecord.from_bytes(changes[at : at + RECORD_BYTES]) for at in range(0, len(changes), RECORD_BYTES)
    ]
    assert listed == [new for old, new in zip(before, after, strict=True) if old != new]
    assert len(listed) == population.changed
