from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pos_gateway.cli.main import build


@pytest.mark.parametrize("policy", [[], ["--by-use"]], ids=["by share", "by use"])
def test_it_publishes_and_says_what_that_costs(policy: list[str], tmp_path: Path) -> None:
    arguments = ["bench", "publish", "--accounts", "1000", "--folder", str(tmp_path), *policy, "--json"]
    result = CliRunner().invoke(build(arguments), arguments)
    assert result.exception is None, result.exception
    data = json.loads(result.stdout)
    assert (data["accounts"], data["tokens"], data["rows"]) == (1000, 1100, 1100)
    for name in ("first", "again"):
        assert set(data[name]["steps_s"]) == {"decide", "log", "build", "release"}
        assert data[name]["accounts_per_s"] > 0
    assert data["again"]["version"] == 2
    assert data["urgent"]["steps_s"]["build"] > 0
    assert min(data["copy_to_s"], data["insert_select_s"]) > 0
    assert not list(tmp_path.iterdir())
