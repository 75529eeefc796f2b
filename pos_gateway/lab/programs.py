"""The real programs as real processes: started, spoken to, stopped, killed."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pos_gateway.errors import PosGatewayError

_COMMAND: Final = (sys.executable, "-m", "pos_gateway.cli")
_START_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 10.0
_COMMAND_TIMEOUT_S: Final = 120.0
_LOG_LINES: Final = 8
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def command(*arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run one `pos-gateway` command with `--json`; its answer, with its exit code as `exit`.

    Raises:
        PosGatewayError: it printed no JSON object.
    """
    done = subprocess.run(
        [*_COMMAND, *arguments, "--json"],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=_COMMAND_TIMEOUT_S,
        check=False,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise PosGatewayError(f"`pos-gateway {' '.join(arguments[:3])}` failed: {done.stderr.strip()[-500:]}")
    return {**answer, "exit": done.returncode}


class Program:
    """A server that says on stdout, as JSON, where it listens. It dies with its starter."""

    def __init__(self, *arguments: str, log: Path, environment: Mapping[str, str] | None = None) -> None:
        """
        Raises:
            PosGatewayError: it did not start; the end of its log is quoted.
        """
        self._log = log
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [*_COMMAND, *arguments, "--json"],
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                preexec_fn=_die_with_starter,
                # Ctrl-C is the starter's to handle: it stops its programs in order.
                start_new_session=True,
            )
        self.address = self._await_address(" ".join(arguments[:2]))

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        if self.running:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._reap()

    def kill(self) -> None:
        """SIGKILL: it gets no chance to tidy up."""
        self._process.kill()
        self._reap()

    def _reap(self) -> None:
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _await_address(self, name: str) -> str:
        output = self._process.stdout
        line = b""
        if output is not None and select.select([output], [], [], _START_TIMEOUT_S)[0]:
            line = output.readline()
        try:
            return str(json.loads(line)["address"])
        except (ValueError, KeyError, TypeError):
            self.kill()
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
            said = line.decode(errors="replace").strip()
            raise PosGatewayError(f"`pos-gateway {name}` did not start: {said}\n{tail}") from None


def _die_with_starter() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
