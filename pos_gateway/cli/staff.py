"""`staff code|list|add|set-pin|leave|token`: who works at this till, and which programs may use it."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from pos_gateway.cli.places import GATEWAY_HOME, GatewayHome
from pos_gateway.cli.terminal import Json, emit, emit_rows
from pos_gateway.errors import NotFound
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.local_client import ask

app = typer.Typer(no_args_is_help=True, help="Who works at this till. The gateway must be running.")

_COLUMNS: Final = ("name", "role", "active")
_PROGRAM_COLUMNS: Final = ("name", "role", "id")
Pin = Annotated[str, typer.Option(help="Asked for if not said.", prompt=True, hide_input=True)]


def setup_code(home: Home) -> str | None:
    """What the first owner types in; None once there is one."""
    try:
        return home.setup_code.read_text().strip() or None
    except OSError:
        return None


@app.command()
def code(home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """The setup code that the page asks for at its first run."""
    found = setup_code(Home(home))
    if found is None:
        raise NotFound("there is no setup code", advice="there is an owner already, or it was never started")
    emit({"setup_code": found}, f"{found[:4]} {found[4:]}", as_json=as_json)


@app.command("list")
def list_staff(home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Everybody, also who has left."""
    emit_rows("staff", _COLUMNS, _staff(home), as_json=as_json, empty="Nobody yet.")


@app.command()
def add(
    name: str,
    role: Annotated[str, typer.Option(help="cashier, manager or owner.")] = "cashier",
    pin: Pin = "",
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Somebody new."""
    data = ask(Home(home), "POST", "/v1/staff", {"name": name, "role": role, "pin": pin})
    emit(data, f"{data['name']} is here as {data['role']}.", as_json=as_json)


@app.command("set-pin")
def set_pin(name: str, pin: Pin = "", home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """A new PIN, for whoever has forgotten theirs or is locked out."""
    data = ask(Home(home), "POST", f"/v1/staff/{_id_of(home, name)}", {"pin": pin})
    emit(data, f"{data['name']} has a new PIN.", as_json=as_json)


@app.command()
def leave(name: str, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Somebody works here no more."""
    data = ask(Home(home), "POST", f"/v1/staff/{_id_of(home, name)}", {"active": False})
    emit(data, f"{data['name']} cannot sign in any more.", as_json=as_json)


@app.command()
def token(
    name: str,
    role: Annotated[str, typer.Option(help="cashier or manager.")] = "cashier",
    home: GatewayHome = GATEWAY_HOME,
    as_json: Json = False,
) -> None:
    """Let a program use the API: `Authorization: Bearer TOKEN`. It is shown this once."""
    data = ask(Home(home), "POST", "/v1/tokens", {"name": name, "role": role})
    emit(data, data["token"], as_json=as_json)


@app.command("tokens")
def list_tokens(home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """Which programs may use the API."""
    rows = ask(Home(home), "GET", "/v1/tokens")["tokens"]
    emit_rows("tokens", _PROGRAM_COLUMNS, rows, as_json=as_json, empty="None but this machine's own.")


@app.command("remove-token")
def remove_token(token_id: str, home: GatewayHome = GATEWAY_HOME, as_json: Json = False) -> None:
    """A program may use the API no more."""
    data = ask(Home(home), "POST", f"/v1/tokens/{token_id}/remove", {})
    emit(data, f"{data['name']} is not let in any more.", as_json=as_json)


def _staff(home: GatewayHome) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask(Home(home), "GET", "/v1/staff")["staff"]
    return found


def _id_of(home: GatewayHome, name: str) -> str:
    for member in _staff(home):
        if member["name"].casefold() == name.casefold():
            return str(member["id"])
    raise NotFound("nobody here has this name", advice="see `pos-gateway staff list`")
