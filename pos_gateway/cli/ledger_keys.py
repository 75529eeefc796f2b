"""`ledger keys …`: the key ceremony. `create` and `sign` need no ledger: they run on the signing machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pos_gateway.cli.places import LEDGER_HOME, LedgerHome
from pos_gateway.cli.terminal import Json, emit
from pos_gateway.ledger.ceremony import CeremonyState, remove_key, set_threshold
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.ledger.signing import PublicKey, Role, SigningKey, new_signing_key, sign_file

app = typer.Typer(no_args_is_help=True, help="Who may sign limits, and the list of them.")

RoleArgument = Annotated[Role, typer.Argument(help="What the key is for.")]


@app.command()
def create(
    role: RoleArgument,
    out: Annotated[
        Path, typer.Option(help="Folder for both halves: a stick, a safe's disk.", file_okay=False)
    ],
    as_json: Json = False,
) -> None:
    """Make a signing key. It counts once `keys rotate` has put its public half into the root."""
    key = new_signing_key(role)
    path = key.write(out)
    data = {
        "role": role.value,
        "key_id": key.id,
        "private": str(path),
        "public": str(path.with_suffix(".pub")),
    }
    emit(
        data,
        f"{role.value} key {key.id} made.\n  private, keep it off the serving machine: {path}\n"
        f"  public, for `ledger keys rotate --new`: {path.with_suffix('.pub')}",
        as_json=as_json,
    )


@app.command()
def show(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Every role's keys and threshold, and a new root that waits for signatures."""
    with Ledger.open(home) as ledger:
        state = ledger.ceremony.state()
    _emit(state, as_json=as_json)


@app.command()
def rotate(
    new: Annotated[Path, typer.Option(help="The new key's public half, ROLE-….pub.", dir_okay=False)],
    old: Annotated[str | None, typer.Option(help="Id of the key it takes the place of.")] = None,
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """Take a new key into its role, in an old one's place or beside them."""
    with Ledger.open(home) as ledger:
        state = ledger.ceremony.rotate(PublicKey.read(new), old)
    _emit(state, as_json=as_json)


@app.command()
def revoke(key_id: str, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Take a key out of its role. Shops trust nothing it signed as soon as they see the new root."""
    with Ledger.open(home) as ledger:
        state = ledger.ceremony.change(lambda root: remove_key(root, key_id))
    _emit(state, as_json=as_json)


@app.command()
def threshold(role: RoleArgument, needed: int, home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """How many keys of a role must sign. The number it has already just renews the root's date."""
    with Ledger.open(home) as ledger:
        state = ledger.ceremony.change(lambda root: set_threshold(root, role, needed))
    _emit(state, as_json=as_json)


@app.command()
def online(
    new: Annotated[bool, typer.Option("--new", help="Make one more.")] = False,
    retire: Annotated[str | None, typer.Option(help="Id of a key to take away.")] = None,
    home: LedgerHome = LEDGER_HOME,
    as_json: Json = False,
) -> None:
    """The keys on this server that sign grants and notes, within what the limit keys allow.

    A new key signs once limits that name it are published and the older one is retired.
    """
    with Ledger.open(home) as ledger:
        if retire is not None:
            ledger.online_keys.retire(retire)
        if new:
            ledger.online_keys.create()
        terms = ledger.online_terms()
        keys = [
            {"key_id": key.id, "public_key": key.public.hex(), "named": key.public in terms.keys}
            for key in ledger.online_keys.all()
        ]
    data = {
        "keys": keys,
        "per_tap_cap_minor": terms.per_tap_cap_minor,
        "grant_life_s": terms.grant_life_s,
        "note_life_s": terms.note_life_s,
        "unsynchronised_amount_cap_minor": terms.unsynchronised_amount_cap_minor,
    }
    lines = [
        f"{key['key_id']}  {'named by the limits in force' if key['named'] else 'not published yet'}"
        for key in keys
    ]
    bounds = (
        f"The limits in force let them sign grants for {terms.grant_life_s} s and notes for "
        f"{terms.note_life_s} s,\nno tap above {terms.per_tap_cap_minor}, "
        f"{terms.unsynchronised_amount_cap_minor} unsynchronised at one gateway (minor units)."
    )
    emit(data, "\n".join([*lines, bounds] if terms.keys else lines or ["No online keys."]), as_json=as_json)


@app.command()
def sign(
    file: Annotated[Path, typer.Argument(help="limits.json, targets.json or root.json.", dir_okay=False)],
    key: Annotated[list[Path], typer.Option(help="A private key, ROLE-….pem; may be given again.")],
    as_json: Json = False,
) -> None:
    """Sign what the ledger has prepared, and say what it was."""
    signed = sign_file(file, [SigningKey.read(path) for path in key])
    data = {"file": str(file), "signed": signed.what, "key_ids": list(signed.key_ids)}
    emit(data, f"Signed by {', '.join(signed.key_ids)}: {signed.what}", as_json=as_json)


@app.command()
def release(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Put a new root in force once enough root keys have signed it."""
    with Ledger.open(home) as ledger:
        state = ledger.ceremony.release()
    _emit(state, as_json=as_json)


@app.command()
def discard(home: LedgerHome = LEDGER_HOME, as_json: Json = False) -> None:
    """Forget a new root that waits for signatures."""
    with Ledger.open(home) as ledger:
        ledger.ceremony.discard()
        state = ledger.ceremony.state()
    _emit(state, as_json=as_json)


def _emit(state: CeremonyState, *, as_json: bool) -> None:
    old, own = state.draft_lacks
    data: dict[str, Any] = {
        "root_version": state.version,
        "expires": state.expires.isoformat(),
        "roles": {
            role.role.value: {
                "threshold": role.threshold,
                "keys": [{"key_id": key.id, "here": key.here} for key in role.keys],
            }
            for role in state.roles
        },
        "draft": str(state.draft) if state.draft else None,
        "draft_lacks": {"by_todays_root_keys": old, "by_its_own": own},
    }
    lines = [f"Root {state.version}, valid until {state.expires:%Y-%m-%d}"]
    for role in state.roles:
        lines.append(f"  {role.role.value}: {role.threshold} of {len(role.keys)} must sign")
        lines += [f"    {key.id}{'' if key.here else '  (private half elsewhere)'}" for key in role.keys]
    if state.draft:
        lines.append(
            f"A new root waits in {state.draft}: it lacks {old} signatures by today's root keys and "
        )
        lines[-1] += f"{own} by its own. `ledger keys sign` it, then `ledger keys release`."
    emit(data, "\n".join(lines), as_json=as_json)
