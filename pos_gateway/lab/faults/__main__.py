"""`tools/faults SCENARIO…`: break things on purpose, count what is lost, doubled, out of balance."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pos_gateway.lab.faults.carry import LONG_JOURNEYS, SHORT_JOURNEYS, carry
from pos_gateway.lab.faults.clock import LONG_JUMPS, SHORT_JUMPS, clock
from pos_gateway.lab.faults.disk_errors import LONG_ERRORS, SHORT_ERRORS, fsync_error
from pos_gateway.lab.faults.disk_full import LONG_FILLINGS, SHORT_FILLINGS, disk_full
from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.kill import LONG_KILLS, SHORT_KILLS, kill
from pos_gateway.lab.faults.partition import LONG_ROUNDS, SHORT_ROUNDS, partition
from pos_gateway.lab.faults.power import SHORT_POINTS, power
from pos_gateway.lab.faults.replace import LONG_DEATHS, SHORT_DEATHS, replace
from pos_gateway.lab.faults.replay import LONG_ATTACKS, SHORT_ATTACKS, replay
from pos_gateway.lab.faults.restore import LONG_RESTORES, SHORT_RESTORES, restore
from pos_gateway.lab.faults.upgrade import LONG_UPGRADES, SHORT_UPGRADES, upgrade


@dataclass(frozen=True, slots=True)
class Scenario:
    """`run` is given a folder of its own, the seed, and how often; `whole` None: at every point."""

    run: Callable[[Path, int, int | None], Finding]
    short: int
    whole: int | None


SCENARIOS: Final[Mapping[str, Scenario]] = {
    "kill": Scenario(lambda f, s, n: kill(f, s, kills=n or 0), SHORT_KILLS, LONG_KILLS),
    "power": Scenario(lambda f, s, n: power(f, s, points=n), SHORT_POINTS, None),
    "fsync-error": Scenario(lambda f, s, n: fsync_error(f, s, errors=n or 0), SHORT_ERRORS, LONG_ERRORS),
    "disk-full": Scenario(lambda f, s, n: disk_full(f, s, fillings=n or 0), SHORT_FILLINGS, LONG_FILLINGS),
    "partition": Scenario(lambda f, s, n: partition(f, s, rounds=n or 0), SHORT_ROUNDS, LONG_ROUNDS),
    "clock": Scenario(lambda f, s, n: clock(f, s, jumps=n or 0), SHORT_JUMPS, LONG_JUMPS),
    "replay": Scenario(lambda f, s, n: replay(f, s, attacks=n or 0), SHORT_ATTACKS, LONG_ATTACKS),
    "restore": Scenario(lambda f, s, n: restore(f, s, restores=n or 0), SHORT_RESTORES, LONG_RESTORES),
    "carry": Scenario(lambda f, s, n: carry(f, s, journeys=n or 0), SHORT_JOURNEYS, LONG_JOURNEYS),
    "replace": Scenario(lambda f, s, n: replace(f, s, deaths=n or 0), SHORT_DEATHS, LONG_DEATHS),
    "upgrade": Scenario(lambda f, s, n: upgrade(f, s, upgrades=n or 0), SHORT_UPGRADES, LONG_UPGRADES),
}
_MOST_TIMES: Final = 100_000


def main() -> int:
    arguments = _arguments()
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    wanted = SCENARIOS if "all" in arguments.scenario else dict.fromkeys(arguments.scenario)
    print(f"seed {seed}", file=sys.stderr)
    well = True
    for name in wanted:
        scenario = SCENARIOS[name]
        times = arguments.times or (scenario.short if arguments.short else scenario.whole)
        with tempfile.TemporaryDirectory(prefix="pos-gateway-faults-") as folder:
            try:
                finding = scenario.run(Path(folder), seed, times)
            except Exception as error:  # noqa: BLE001 - the others are still to be run, and this one told of
                traceback.print_exc()
                problem = f"{type(error).__name__}: {error}"
                finding = Finding(name, seed, "it could not be finished", 0, 0, wrong=(problem[:500],))
        well = well and finding.well
        print(
            json.dumps(finding.as_json(), ensure_ascii=False) if arguments.json else _text(finding),
            flush=True,
        )
    return 0 if well else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/faults", description=__doc__)
    parser.add_argument("scenario", nargs="+", choices=[*SCENARIOS, "all"])
    parser.add_argument("--seed", type=int, help="as printed by an earlier run")
    parser.add_argument("--short", action="store_true", help="seconds rather than minutes each")
    parser.add_argument("--times", type=_times, help="how often, instead of the usual number")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args()


def _times(text: str) -> int:
    times = int(text)
    if not 1 <= times <= _MOST_TIMES:
        raise argparse.ArgumentTypeError(f"between 1 and {_MOST_TIMES}")
    return times


def _text(finding: Finding) -> str:
    lines = [
        f"{'✓' if finding.well else '✕'} {finding.scenario}: {finding.tried}",
        f"    {finding.times} times, {finding.acknowledged} acknowledged, {finding.lost} lost, "
        f"{finding.posted_twice} posted twice, {finding.out_of_balance_minor} out of balance",
    ]
    lines += [f"    ✕ {text}" for text in finding.wrong]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
