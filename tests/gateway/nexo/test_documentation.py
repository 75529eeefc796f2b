"""The samples of docs/pos-integration.md, run as they stand against the real gateway."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import pos_gateway
from pos_gateway.gateway.local_client import ask
from pos_gateway.lab.programs import command
from pos_gateway.lab.virtual_reader import VirtualReader
from tests.gateway.nexo.counter import POI
from tests.gateway.nexo.site import API_KEY, PORT, Site

PAGE = (Path(pos_gateway.__file__).parent.parent / "docs" / "pos-integration.md").read_text()


def sample(language: str) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return str(block)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, shop_folder: Path) -> Iterator[Site]:
    with VirtualReader(slots=2) as reader:
        site = Site(tmp_path_factory.mktemp("site"), shop_folder, reader)
        yield site
        site.close()


@pytest.fixture
def environment(site: Site) -> dict[str, str]:
    return {
        **os.environ,
        "POS_ADDRESS": f"https://{site.host}:{PORT}",
        "POS_CERTIFICATE": str(site.ca),
        "POS_API_KEY": API_KEY,
        "POS_POIID": POI,
        "SERVICE_ID": "DOC1",
    }


def run_with_a_customer(site: Site, arguments: list[str], environment: dict[str, str]) -> str:
    """Run it, and hold the card out once the gateway waits for it."""
    done = threading.Event()

    def customer() -> None:
        while not done.wait(0.05):
            if any(lane["busy"] for lane in ask(site.home, "GET", "/v1/status")["lanes"]):
                site.insert()
                return

    tapping = threading.Thread(target=customer)
    tapping.start()
    try:
        ran = subprocess.run(
            arguments, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    finally:
        done.set()
        tapping.join()
        site.reader.remove()
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_curl_sample(site: Site, environment: dict[str, str]) -> None:
    told = run_with_a_customer(site, ["bash", "-euc", sample("sh")], environment)
    assert json.loads(told)["SaleToPOIResponse"]["PaymentResponse"]["Response"]["Result"] == "Success"


def test_the_python_sample(site: Site, environment: dict[str, str]) -> None:
    told = run_with_a_customer(site, [sys.executable, "-c", sample("python")], environment)
    assert told.splitlines() == ["payment: Success", "void: Success"]


def test_the_command_that_tells_a_pos_where_to_go(site: Site) -> None:
    told = command("gateway", "pos", "--home", str(site.home.path))
    assert told["address"] == f"https://{site.host}:{PORT}"
    assert told["lanes"][0] == {"lane": "lane-1", "poi_id": POI}
    assert told["certificate"] == str(site.files.certificate)


def test_every_condition_a_pos_may_be_told_is_explained() -> None:
    from pos_gateway.gateway.nexo.transitions import Condition

    for condition in Condition:
        assert f"`{condition.value}`" in PAGE or f"ErrorCondition: {condition.value}" in PAGE, condition
