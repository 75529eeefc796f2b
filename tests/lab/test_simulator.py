"""The simulator: the same seed gives the same run; what is promised holds; a broken rule shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pos_gateway.errors import InvalidConfiguration
from pos_gateway.lab.simulator.books import Books
from pos_gateway.lab.simulator.load import Load, read_load
from pos_gateway.lab.simulator.report import render
from pos_gateway.lab.simulator.run import Outcome, simulate
from pos_gateway.lab.simulator.town import Size
from pos_gateway.ledger.config import policy_by_use
from pos_gateway.ledger.reserve import Guarantee

_DAY_S = 86_400
SHORT = policy_by_use().model_copy(
    update={
        "valid_s": 4 * _DAY_S,
        "refresh_after_s": 2 * _DAY_S,
        "presentment_deadline_s": 4 * _DAY_S,
    }
)
"""So that in a short run publications lapse, and some shops are cut off beyond the deadline."""


def rough() -> Load:
    """The shipped load, with what is rare in it often enough for a small town."""
    load = read_load()
    return load.model_copy(
        update={
            "ledger": load.ledger.model_copy(update={"restores_per_60_days": 6}),
            "shops": load.shops.model_copy(update={"clock_wrong_share": 0.15, "stolen_per_month": 0.1}),
            "taps": load.taps.model_copy(update={"torn_share": 0.05}),
            "repayments": load.repayments.model_copy(update={"not_final_share": 0.6, "bounced_share": 0.3}),
            "decisions": load.decisions.model_copy(update={"limit_cuts": 0.2, "tokens_blocked": 0.1}),
        }
    )


def small(seed: int, clones: int = 0, *, peers: bool = False) -> Outcome:
    return simulate(Size(10, 60, 20, 0.5, clones, seed), rough(), SHORT, peers=peers)


@pytest.mark.parametrize("clones", [0, 20])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_is_promised_holds(seed: int, clones: int) -> None:
    ours = small(seed, clones).systems["ours"].to_json()

    assert ours["over_limit_minor"] == 0
    assert ours["over_limit_accounts"] == 0
    assert ours["guaranteed_unpaid"] == 0
    assert ours["billed_for_clones_minor"] == 0
    assert ours["clone_losses_over_bound"] == 0
    # And something was put to the test.
    assert isinstance(ours["guaranteed"], int)
    assert ours["guaranteed"] > 300

    if clones:
        assert ours["clones_proven"]


def test_the_peers_break_what_they_do_not_promise() -> None:
    outcome = small(4, 20, peers=True)

    told = outcome.to_json()
    assert told["ours"]["over_limit_minor"] == 0
    assert told["store_and_forward"]["over_limit_minor"] > 0
    assert told["store_and_forward"]["guaranteed_unpaid"] > 0
    assert told["available_credit"]["over_limit_minor"] > 0
    assert told["ours"]["loss_per_clone_minor"] < told["available_credit"]["loss_per_clone_minor"]
    # One history for all three.
    assert len({len(measures.days) for measures in outcome.systems.values()}) == 1


def test_the_same_seed_gives_the_same_bytes_in_any_process() -> None:
    code = (
        "import json; from tests.lab.test_simulator import small; from pos_gateway.lab.simulator.report "
        "import render; o = small(7, 5, peers=True); print(json.dumps(o.to_json())); print(render(o))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]

    assert runs[0] == runs[1]
    assert len(runs[0]) > 5000


def test_another_seed_gives_another_run() -> None:
    told = [json.dumps(simulate(Size(3, 10, 4, 0.3, 0, seed), read_load()).to_json()) for seed in (1, 2)]
    assert told[0] != told[1]


def test_a_ledger_that_forgets_what_stands_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credit given away again as soon as a ceiling expires, although shops still have D to present."""
    monkeypatch.setattr(
        Guarantee, "stands_until_unix_s", lambda self, valid_until_unix_s: valid_until_unix_s - 3 * _DAY_S
    )
    ours = small(1).systems["ours"].to_json()
    assert ours["over_limit_minor"] or ours["guaranteed_unpaid"]


def test_a_ledger_that_trusts_money_too_early_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repayment is taken for final, and then bounces."""
    repay = Books.repay

    def trusting(
        self: Books, account: int, reference: int, amount_minor: int, now_unix_s: int, *, final: bool
    ) -> None:
        repay(self, account, reference, amount_minor, now_unix_s, final=final)
        self.accounts[account].uncleared_minor = 0
        self.accounts[account].repayments[reference] = 0

    def bouncing(self: Books, account: int, reference: int, now_unix_s: int, *, bounces: bool) -> None:
        """The books never hear of it."""

    monkeypatch.setattr(Books, "repay", trusting)
    monkeypatch.setattr(Books, "repayment_final", bouncing)
    assert small(1).systems["ours"].to_json()["over_limit_minor"]


def test_the_report_needs_nothing_else() -> None:
    page = render(simulate(Size(3, 12, 6, 0.5, 1, 1), read_load(), SHORT))

    assert page.startswith("<!doctype html>")
    assert page.count("<polyline") == 12
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "prefers-color-scheme:dark" in page
    for name in ("Over the limit", "Reserve", "Queue", "Declined, though there was room"):
        assert f"<h2>{name}</h2>" in page


def test_a_load_says_everything_or_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "load.toml"
    path.write_text("[customers]\nphone_share = 2.0\n")
    with pytest.raises(InvalidConfiguration, match="phone_share"):
        read_load(path)
    path.write_text("= no toml")
    with pytest.raises(InvalidConfiguration, match="no TOML"):
        read_load(path)
    assert read_load() == read_load()
