"""Where the two programs keep their files, and the options that say so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

_DATA: Final = Path("~/.local/share/pos-gateway").expanduser()

GatewayHome = Annotated[
    Path,
    typer.Option("--home", envvar="POS_GATEWAY_HOME", help="The gateway's home directory.", file_okay=False),
]
LedgerHome = Annotated[
    Path,
    typer.Option("--home", envvar="POS_LEDGER_HOME", help="The ledger's home directory.", file_okay=False),
]
GATEWAY_HOME: Final = _DATA / "gateway"
LEDGER_HOME: Final = _DATA / "ledger"
