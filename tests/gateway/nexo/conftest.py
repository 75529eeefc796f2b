from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.instalments import Charge, Offer
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.config import Policy
from pos_gateway.money import currency
from tests.gateway.nexo.counter import Counter

CARD_FILE = "card.json"
CNY = currency("CNY")
OFFERS = (
    Offer(
        id="flat",
        currency=CNY,
        charge=Charge.FLAT_FEE,
        periods=(3, 12),
        rate_per_period_bps=50,
    ),
    Offer(
        id="shop",
        currency=CNY,
        charge=Charge.MERCHANT_FUNDED,
        periods=(6,),
        rate_per_period_bps=200,
    ),
    Offer(
        id="gold",
        currency=CNY,
        charge=Charge.ANNUITY,
        periods=(24,),
        rate_per_period_bps=40,
        instalment_class=9,
    ),
)


@pytest.fixture(scope="session")
def shop_folder(tmp_path_factory: pytest.TempPathFactory, ledger_home: Path) -> Path:
    """An enrolled shop with published limits and one card of 300.00, to be copied: its keys take a second."""
    folder = tmp_path_factory.mktemp("shop")
    shutil.copytree(ledger_home, folder / "ledger")
    with Shop(folder, policy=Policy(per_tap_cap_minor=25_000, offers=OFFERS)) as shop:
        _, personalisation = shop.issue(limit_minor=30_000)
        shop.publish()
    (folder / CARD_FILE).write_text(personalisation.to_json())
    return folder


@pytest.fixture
async def counter(tmp_path: Path, shop_folder: Path) -> AsyncIterator[Counter]:
    shutil.copytree(shop_folder, tmp_path, dirs_exist_ok=True)
    with Shop(tmp_path) as shop:
        counter = Counter(tmp_path / "nexo", shop)
        yield counter
        await counter.stop()


@pytest.fixture
def personalisation(counter: Counter, shop_folder: Path) -> Personalisation:
    """Of a card with a limit of 300.00, in the published limits."""
    return Personalisation.from_json((shop_folder / CARD_FILE).read_text())


@pytest.fixture
def card(personalisation: Personalisation) -> VirtualCard:
    return VirtualCard(personalisation)
