"""Debian's cardpeek, an independent reader of EMV cards, reads our virtual card through pcscd."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from pos_gateway.emv.application import CDOL1, CDOL2, PDOL
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.gateway.readers.pcsc import PcscReader
from pos_gateway.lab.virtual_reader import VirtualReader

CARDPEEK = shutil.which("cardpeek")
READ = "dofile('emv.lua'); ui.save_view(os.getenv('HOME')..'/card.xml'); os.exit(0)"


def run(
    home: Path, virtual: VirtualReader, *arguments: str, answers: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(CARDPEEK), "-c", *arguments],
        env={**os.environ, **virtual.environment, "HOME": str(home)},
        input=answers,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


_POWERED_DOWN = "error 0x80100016"  # SCARD_E_NOT_TRANSACTED


@pytest.mark.skipif(CARDPEEK is None, reason="cardpeek is not installed: apt-get install cardpeek")
def test_cardpeek_reads_the_card_without_an_error(
    virtual_reader: VirtualReader, card_file: Path, tmp_path: Path
) -> None:
    own = Personalisation.from_json(card_file.read_text())
    (tmp_path / ".cardpeek").mkdir()
    # The first run asks whether it may install its scripts into its home; they work from the second on.
    run(tmp_path, virtual_reader, "-e", "os.exit(0)", answers="1\n" * 4)
    virtual_reader.insert(card_file)
    seen = PcscReader(virtual_reader.names[0])
    channel = seen.wait_for_card(20.0)
    assert channel is not None
    channel.close()
    seen.close()
    for _ in range(3):
        # "Issue a GET PROCESSING OPTIONS command?": yes.
        done = run(
            tmp_path, virtual_reader, "-r", f"pcsc://{virtual_reader.names[0]}", "-e", READ, answers="1\n" * 4
        )
        log = re.sub(r"\x1b\[\d+m", "", done.stderr)
        # pcscd powers a card down a moment after its last reader let go of it; whoever sends in that
        # very moment is told so, and cardpeek does not send again.
        if _POWERED_DOWN not in log:
            break
    assert done.returncode == 0, log[-2000:]
    assert not re.search(r"^\d+ ERROR", log, re.MULTILINE), log
    assert "GPO with data failed" not in log

    values = {}
    # Its XML declaration is not well-formed.
    text = (tmp_path / "card.xml").read_text().split("?>", 1)[1]
    for node in ElementTree.fromstring(text).iter("node"):  # noqa: S314 - cardpeek wrote it
        attributes = {a.get("name"): a.text or "" for a in node.findall("attr")}
        if re.fullmatch("8:(?:[0-9A-F]{2})+", attributes.get("val", "")):
            values[attributes.get("id", "")] = bytes.fromhex(attributes["val"].removeprefix("8:"))
    assert values["9F38"] == PDOL
    assert values["8C"] == CDOL1
    assert values["8D"] == CDOL2
    assert values["5A"].hex() == own.pan
    assert values["90"] == own.issuer_certificate
    assert values["9F46"] == own.icc_certificate
    status = virtual_reader.status()
    assert status is not None
    assert status["state"]["counter"] == own.counter  # read, and nothing paid
