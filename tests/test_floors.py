"""Imports run one way, floor by floor (docs/how-a-tap-travels.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pos_gateway

PACKAGE = Path(pos_gateway.__file__).parent

FLOORS = {
    "pos_gateway": 0,
    "pos_gateway.errors": 0,
    "pos_gateway.money": 0,
    "pos_gateway.redaction": 0,
    "pos_gateway.emv": 1,
    "pos_gateway.limits": 2,
    "pos_gateway.instalments": 2,
    "pos_gateway.authorization": 3,
    "pos_gateway.records": 3,
    "pos_gateway.enrolment": 3,
    "pos_gateway.inquiry": 3,
    "pos_gateway.conflict": 3,
    "pos_gateway.signers": 3,
    "pos_gateway.distribution": 3,
    "pos_gateway.snapshot_file": 3,
    "pos_gateway.carrying": 3,
    "pos_gateway.stick": 3,
    "pos_gateway.gateway": 4,
    "pos_gateway.ledger": 4,
    "pos_gateway.lab": 5,
    "pos_gateway.cli": 5,
}
# The command line is the topmost face: it starts what stands in the laboratory too.
# An inquiry carries a proof as a record does.
SIBLINGS_ALLOWED = {
    ("pos_gateway.authorization", "pos_gateway.records"),
    ("pos_gateway.cli", "pos_gateway.lab"),
    ("pos_gateway.money", "pos_gateway.errors"),
    ("pos_gateway.inquiry", "pos_gateway.records"),
    ("pos_gateway.conflict", "pos_gateway.records"),
    ("pos_gateway.limits", "pos_gateway.instalments"),
    ("pos_gateway.carrying", "pos_gateway.records"),
    ("pos_gateway.stick", "pos_gateway.records"),
    ("pos_gateway.stick", "pos_gateway.carrying"),
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _home(module: str) -> str:
    """The longest entry of FLOORS that the module stands under."""
    return max((f for f in FLOORS if module == f or module.startswith(f + ".")), key=len)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            # `from pos_gateway.emv import tlv` imports the module, not only the package.
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_run_downwards(path: Path) -> None:
    here = _home(_name(path))
    for imported in _imports(path):
        if not imported.startswith("pos_gateway"):
            continue
        there = _home(imported)
        if there in (here, "pos_gateway") or (here, there) in SIBLINGS_ALLOWED:
            continue
        assert FLOORS[there] < FLOORS[here], f"{_name(path)} (floor {FLOORS[here]}) imports {imported}"


def test_errors_imports_nothing_of_ours() -> None:
    assert [i for i in _imports(PACKAGE / "errors.py") if i.startswith("pos_gateway")] == []


def test_every_module_has_a_floor() -> None:
    homeless = [_name(p) for p in MODULES if _home(_name(p)) == "pos_gateway" and p.name != "__init__.py"]
    assert homeless == []


def test_authorization_and_card_code_know_no_clock_no_chance_and_no_files() -> None:
    """The pure floors take `now` and bytes; they never reach out for them."""
    forbidden = {
        "time",
        "random",
        "secrets",
        "os",
        "socket",
        "sqlite3",
        "asyncio",
        "threading",
        "pathlib",
        "uuid.uuid4",
    }
    for floor in ("emv", "limits", "authorization"):
        for path in sorted((PACKAGE / floor).rglob("*.py")):
            reached = {i.split(".")[0] for i in _imports(path)} & forbidden
            assert not reached, f"{_name(path)} imports {reached}"
            source = path.read_text()
            assert "datetime.now" not in source, _name(path)
            assert "date.today" not in source, _name(path)
