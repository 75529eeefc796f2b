"""`pos-gateway`: noun, then verb."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Final

import structlog
import typer

import pos_gateway
from pos_gateway.cli.terminal import fail
from pos_gateway.errors import PosGatewayError
from pos_gateway.redaction import redact_event

NOUNS: Final = (
    "gateway",
    "payment",
    "staff",
    "receipt",
    "journal",
    "snapshot",
    "proof",
    "conflict",
    "reader",
    "card",
    "offer",
    "ledger",
    "bench",
    "simulate",
    "doctor",
)
"""Each is a module beside this one, with an `app`, or by itself a command."""

_COMMANDS: Final = ("simulate", "doctor")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pos-gateway {pos_gateway.__version__}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Offline point-of-sale payments against signed limits, and the issuer's ledger behind them."""


def build(arguments: Sequence[str]) -> typer.Typer:
    """The command line, with the nouns that these arguments need: a shop's command must not take the
    time to load the ledger, nor the other way round."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(options)
    wanted = [noun for noun in NOUNS if noun in arguments[:1]] or NOUNS
    for noun in wanted:
        module = importlib.import_module(f"pos_gateway.cli.{noun}")
        if noun in _COMMANDS:
            app.command()(getattr(module, noun))
        else:
            app.add_typer(module.app, name=noun)
    return app


def main() -> None:
    """The console script."""
    _log_to_stderr()
    try:
        build(sys.argv[1:])()
    except PosGatewayError as error:
        sys.exit(fail(error, as_json="--json" in sys.argv))
    except KeyboardInterrupt:
        sys.exit(130)


def _log_to_stderr() -> None:
    """Structured logs on stderr, redacted; results alone on stdout."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redact_event,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        # Whatever stderr is when something is logged, not what it was at the start.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
    # nfcpy and others log every byte they exchange at DEBUG: that may be card data.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
