"""`pos-gateway staff …` and `receipt …` beside a running till."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

from pos_gateway.authorization.receipt import qr_text
from pos_gateway.gateway.staff import Role
from pos_gateway.lab.counter import TOKEN, Counter
from pos_gateway.lab.virtual_card import VirtualCard
from tests.gateway.dashboard.conftest import pay


async def run(till: Counter, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The real command, as this machine's user."""
    home = till.shop.home
    home.address.write_text(till.address + "\n")
    home.api_token.write_text(TOKEN + "\n")
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "pos_gateway.cli", *arguments, "--json"],
        env={"POS_GATEWAY_HOME": str(home.path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


async def test_a_receipt_is_saved_verified_and_its_paper_scanned(
    till: Counter, card: VirtualCard, tmp_path: Path
) -> None:
    view = await pay(till, card)
    file = tmp_path / "decision.json"
    code, saved = await run(till, "receipt", "save", view["id"], "--out", str(file))
    assert code == 0
    key = till.shop.key.public_key().public_bytes_raw().hex()
    code, told = await run(till, "receipt", "verify", str(file), "--gateway-key", key)
    assert (code, told["genuine"], told["digest"]) == (0, True, saved["digest"])
    findings = {step["step"]: step["finding"] for step in told["steps"]}
    assert findings["limits"] == "ok"
    assert findings["card evidence"] == "not_covered"

    made = till.parts.desk.decision_receipt(UUID(view["id"]))
    code, paper = await run(till, "receipt", "scan", qr_text(made, till.shop.key.sign), "--file", str(file))
    assert (code, paper["payment"]) == (0, view["id"])

    document = json.loads(file.read_text())
    document["record"]["sequence"] += 1
    file.write_text(json.dumps(document))
    code, told = await run(till, "receipt", "verify", str(file), "--gateway-key", key)
    assert code == 3, "content and digest do not go together"


async def test_staff_is_added_listed_given_a_pin_and_leaves(till: Counter) -> None:
    code, made = await run(till, "staff", "add", "Wen", "--role", "manager", "--pin", "592817")
    assert (code, made["role"]) == (0, "manager")
    code, listed = await run(till, "staff", "list")
    assert "Wen" in [member["name"] for member in listed["staff"]]
    assert (await run(till, "staff", "set-pin", "wen", "--pin", "730182"))[0] == 0
    assert till.parts.door.staff.check_pin(made["id"], "730182").role is Role.MANAGER
    assert (await run(till, "staff", "leave", "Wen"))[0] == 0
    assert till.parts.door.staff.member(made["id"]) is None
    assert (await run(till, "staff", "leave", "Nobody"))[0] == 7
    assert (await run(till, "staff", "code"))[0] == 7, "there is an owner"


async def test_a_program_gets_a_token_and_without_one_it_is_told_so(till: Counter) -> None:
    code, made = await run(till, "staff", "token", "Kiosk software")
    assert (code, made["role"]) == (0, "cashier")
    assert till.parts.door.staff.program(made["token"]) is not None
    assert (await run(till, "staff", "remove-token", made["id"]))[0] == 0
    assert (await run(till, "gateway", "status"))[0] == 0
    till.shop.home.api_token.unlink()
    home = till.shop.home
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "pos_gateway.cli", "gateway", "status", "--json"],
        env={"POS_GATEWAY_HOME": str(home.path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "NotPermitted"
