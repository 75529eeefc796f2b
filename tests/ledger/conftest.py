from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from pos_gateway.ledger import Ledger
from pos_gateway.ledger.keys import ICC_KEY_BITS, generate_rsa_key
from tests.ledger import books
from tests.ledger.books import Cluster
from tests.ledger.shop import Clock


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh ledger to copy: making its keys takes longer than most tests."""
    home = tmp_path_factory.mktemp("template") / "ledger"
    Ledger.create(home, issuer="Test Issuer", clock=Clock()).close()
    return home


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Cluster]:
    with books.cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def tables(postgresql: Cluster) -> str:
    """The name of a PostgreSQL database with the ledger's empty tables."""
    return books.make_template(postgresql)


@pytest.fixture(params=books.DIALECTS)
def dialect(request: pytest.FixtureRequest) -> str:
    """Every test that asks for a ledger is run on each."""
    return str(request.param)


@pytest.fixture
def database(dialect: str, request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The URL of a new database with the ledger's tables; None where it is the file in the home."""
    if dialect == "sqlite":
        yield None
        return
    postgresql: Cluster = request.getfixturevalue("postgresql")
    url = postgresql.create(request.getfixturevalue("tables"))
    yield url
    postgresql.drop(url)


@pytest.fixture(scope="session")
def icc_key() -> rsa.RSAPrivateKey:
    return generate_rsa_key(ICC_KEY_BITS)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(template: Path, tmp_path: Path, clock: Clock, database: str | None) -> Iterator[Ledger]:
    home = tmp_path / "ledger"
    shutil.copytree(template, home)
    if database is not None:
        books.move_books(home, database)
    with Ledger.open(home, clock=clock) as opened:
        yield opened
