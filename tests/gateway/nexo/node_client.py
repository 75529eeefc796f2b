"""The public Node client for this dialect, installed from its lock file and driven line by line."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pos_gateway.gateway.nexo import wire

_HERE = Path(__file__).parent / "node"
_INSTALL_TIMEOUT_S = 240


def install() -> Path:
    """The folder the client runs in: made once for its lock file, beside the Python environment.

    Where it cannot be had the test is skipped, but in CI that is a failure.
    """
    stamp = (_HERE / "package-lock.json").read_bytes() + (_HERE / "package.json").read_bytes()
    folder = Path(sys.prefix) / "node-client"
    done = folder / "installed"
    if not done.exists() or done.read_bytes() != stamp:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(_HERE / name, folder)
        try:
            ran = subprocess.run(
                ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=_INSTALL_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            _cannot(f"npm does not run: {error}")
        if ran.returncode:
            _cannot(f"npm could not install the public client: {ran.stderr.strip()[-300:]}")
        done.write_bytes(stamp)
    shutil.copy(_HERE / "client.js", folder)
    return folder


def _cannot(why: str) -> None:
    if os.environ.get("POS_GATEWAY_CI"):
        pytest.fail(why)
    pytest.skip(why)


class NodeClient:
    """One process with both of the library's local clients; several requests may be under way."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, folder: Path, place: dict[str, Any]) -> NodeClient:
        process = await asyncio.create_subprocess_exec(
            "node",
            str(folder / "client.js"),
            json.dumps(place),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        return cls(process)

    async def ask(
        self, request: dict[str, Any], *, sealed: bool, key: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The answer as the library gives it out, or `{"error": …}`. `key`: changes to what it seals with."""
        number = next(self._numbers)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        order = {"id": number, "sealed": sealed, "request": request, "key": key or {}}
        self._process.stdin.write(wire.dumps(order) + b"\n")
        await self._process.stdin.drain()
        told = await waiting
        return told["answer"] if "answer" in told else {"error": told["error"]}

    async def close(self) -> None:
        self._process.kill()
        await self._process.wait()
        await self._reading

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            told = json.loads(line)
            self._waiting.pop(told["id"]).set_result(told)
        for waiting in self._waiting.values():
            waiting.set_exception(ConnectionError("the client ended"))
