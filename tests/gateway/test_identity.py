from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pos_gateway.errors import Conflict, InvalidConfiguration, NotFound
from pos_gateway.gateway.identity import (
    Enrolled,
    load_enrolment,
    load_identity,
    load_or_create_identity,
    store_enrolment,
)
from tests.gateway.snapshots import enrolment


def test_the_identity_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    with pytest.raises(NotFound, match="enroll"):
        load_identity(path)
    key = load_or_create_identity(path)
    assert path.stat().st_mode & 0o777 == 0o600
    for again in (load_or_create_identity(path), load_identity(path)):
        assert again.public_key() == key.public_key()
    assert [child.name for child in tmp_path.iterdir()] == ["identity.key"]


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    load_or_create_identity(path)
    path.chmod(0o640)
    with pytest.raises(InvalidConfiguration, match=r"mode 0640.*chmod 600"):
        load_or_create_identity(path)


def test_a_file_with_another_key_or_none_is_refused_without_quoting_it(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    rsa = generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content in (b"", b"SECRET", rsa):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(InvalidConfiguration, match="not an Ed25519 private key") as caught:
            load_identity(path)
        assert "SECRET" not in str(caught.value)


def test_an_enrolment_is_kept_and_never_replaced_by_another_gateway_s(tmp_path: Path) -> None:
    path = tmp_path / "enrolment.json"
    with pytest.raises(NotFound):
        load_enrolment(path)
    enrolled = Enrolled(ledger_url="https://127.0.0.1:1", enrolment=enrolment())
    store_enrolment(path, enrolled)
    store_enrolment(path, enrolled)
    assert load_enrolment(path) == enrolled
    assert path.stat().st_mode & 0o777 == 0o600
    other = enrolled.model_copy(
        update={"enrolment": enrolled.enrolment.model_copy(update={"gateway_id": "gw-other"})}
    )
    with pytest.raises(Conflict):
        store_enrolment(path, other)
    assert load_enrolment(path) == enrolled


def test_a_broken_enrolment_names_the_field_and_not_its_value(tmp_path: Path) -> None:
    path = tmp_path / "enrolment.json"
    secret = enrolment().token_key_secret
    enrolled = Enrolled(ledger_url="https://127.0.0.1:1", enrolment=enrolment())
    assert repr(secret) not in repr(enrolled)
    store_enrolment(path, enrolled)
    path.write_text(path.read_text().replace('"token_key_epoch": 1', '"token_key_epoch": "TOPSECRET"'))
    with pytest.raises(InvalidConfiguration, match=r"enrolment\.token_key_epoch") as caught:
        load_enrolment(path)
    assert "TOPSECRET" not in str(caught.value)
    path.chmod(0o604)
    with pytest.raises(InvalidConfiguration, match="chmod 600"):
        load_enrolment(path)
