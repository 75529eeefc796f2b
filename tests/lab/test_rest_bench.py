"""`bench pos --protocol rest` measures; how fast is not a test's matter."""

from __future__ import annotations

from pathlib import Path

from pos_gateway.lab.rest_bench import bench_rest


def test_it_pays_both_ways_over_tls_and_without(tmp_path: Path) -> None:
    data = bench_rest(2, tmp_path)
    assert data["taps"] == 2
    assert data["own_share_us"]["p50"] > 0
    assert data["own_share_ratio"] > 0
