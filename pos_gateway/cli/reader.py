"""`reader list`: what PC/SC sees."""

from __future__ import annotations

import typer

from pos_gateway.cli.terminal import Json, emit_rows
from pos_gateway.gateway.readers.pcsc import list_readers

app = typer.Typer(no_args_is_help=True, help="NFC readers.")


@app.callback()
def readers() -> None:
    """NFC readers."""


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """The readers that pcscd knows now."""
    rows = [{"name": name, "driver": "pcsc"} for name in list_readers()]
    emit_rows(
        "readers", ("name", "driver"), rows, as_json=as_json, empty="No reader. Run pos-gateway doctor."
    )
