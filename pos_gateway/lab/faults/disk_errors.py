"""`fsync-error`: the disk refuses a sync, a write or a truncation; what the journal then says must be true.

Looked at twice: as the files are, and as they are after a power cut, when whatever a failed fsync had
covered and nobody wrote again is gone.
"""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Final

from pos_gateway.lab.faults import shim
from pos_gateway.lab.faults.disk import apply_all, write_files
from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.journal_writer import JOURNAL, TOLD, read_told, what_is_wrong
from pos_gateway.lab.faults.power import ramdisk, record_run

SHORT_ERRORS: Final = 6
LONG_ERRORS: Final = 200
_COMMITS: Final = 30
_FOR_EVER: Final = 1_000_000
_CALLS: Final = {"sync": 40, "write": 400, "truncate": 4}
"""Which calls fail, and about how many of each the script makes."""


def fsync_error(folder: Path, seed: int, *, errors: int) -> Finding:
    """So many runs, each with one fault of the disk, passing or lasting."""
    chance = random.Random(seed)
    library = shim.build(folder)
    acknowledged = lost = refused = unknown = met = 0
    wrong: list[str] = []
    for number in range(errors):
        call = "sync" if number % 2 == 0 else chance.choice(("write", "write", "truncate"))
        code = chance.choice((errno.EIO, errno.ENOSPC))
        fault = shim.Fault(
            call, chance.randint(1, _CALLS[call]), code, chance.choice((1, 1, 3, _FOR_EVER)), JOURNAL
        )
        place = folder / f"run-{number}"
        place.mkdir()
        operations = record_run(library, place, _COMMITS, fault)
        told = read_told(b"".join(o.data for o in operations if o.name == TOLD))
        met += any(operation.error for operation in operations)
        outcomes = list(told.values())
        acknowledged += outcomes.count("yes")
        refused += outcomes.count("no")
        unknown += outcomes.count("unknown")
        missing, others = what_is_wrong(place / "watched", told)
        lost += missing
        with ramdisk() as found:
            write_files(apply_all(operations).after_power_cut(None, kept=0.0), found)
            missing_then, others_then = what_is_wrong(found, told)
        lost += missing_then
        for when, gone, texts in (("", missing, others), (", then a power cut", missing_then, others_then)):
            wrong += [f"{fault}{when}: {text}" for text in texts]
            wrong += [f"{fault}{when}: {gone} promised records are lost"] if gone else []
    return Finding(
        scenario="fsync-error",
        seed=seed,
        tried=f"{errors} runs with a failing sync, write or truncate (EIO, ENOSPC; {met} met the journal), "
        "each also followed by a power cut",
        times=errors,
        acknowledged=acknowledged,
        lost=lost,
        wrong=tuple(wrong[:20]),
        details={"refused": refused, "outcome_unknown": unknown},
    )
