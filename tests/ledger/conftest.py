from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from pos_gateway.ledger import Ledger
from pos_gateway.ledger.keys import ICC_KEY_BITS, generate_rsa_key
from tests.ledger.shop import Clock


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh ledger to copy: making its keys takes longer than most tests."""
    home = tmp_path_factory.mktemp("template") / "ledger"
    Ledger.create(home, issuer="Test Issuer", clock=Clock()).close()
    return home


@pytest.fixture(scope="session")
def icc_key() -> rsa.RSAPrivateKey:
    return generate_rsa_key(ICC_KEY_BITS)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(template: Path, tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    home = tmp_path / "ledger"
    shutil.copytree(template, home)
    with Ledger.open(home, clock=clock) as opened:
        yield opened
