from __future__ import annotations

from pathlib import Path

import pytest

from pos_gateway.emv.application import AID
from pos_gateway.errors import InvalidConfiguration
from pos_gateway.gateway.config import Home, firmware_config, load_applications, load_settings


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "gateway")
    home.create()
    return home


def test_the_defaults_are_found_in_the_checkout_and_are_valid(home: Home) -> None:
    settings = load_settings(home)
    assert settings.terminal.currency == "CNY"
    assert settings.http.host == "127.0.0.1"
    assert settings.policy().unsynchronised_count_cap == settings.caps.unsynchronised_count_cap
    assert load_applications().aids == (AID,)
    assert home.path.stat().st_mode & 0o777 == 0o700


def test_a_gateway_overrides_single_values(home: Home) -> None:
    default = load_settings(home)
    home.overrides.write_text("[caps]\nper_tap_cap_minor = 7\n")
    settings = load_settings(home)
    assert settings.caps.per_tap_cap_minor == 7
    assert settings.caps.unsynchronised_count_cap == default.caps.unsynchronised_count_cap
    assert settings.terminal == default.terminal


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (
            "\n[caps]\nper_tap_cap = 7\n",
            3,
            r"unknown key 'caps.per_tap_cap'.*did you mean 'per_tap_cap_minor'",
        ),
        ("[cap]\nper_tap_cap_minor = 7\n", 1, r"unknown key 'cap'.*did you mean 'caps'"),
        ("colour = 1\n", 1, r"unknown key 'colour'.*remove it"),
        ("# till\n\n[caps]\n\nper_tap_cap_minor = '7'\n", 5, "'caps.per_tap_cap_minor': .*integer"),
        ("[caps]\nper_tap_cap_minor = 7.5\n", 2, "'caps.per_tap_cap_minor': .*integer"),
        ("[caps]\nper_tap_cap_minor = true\n", 2, "'caps.per_tap_cap_minor': .*integer"),
        ("[caps]\nper_tap_cap_minor = -1\n", 2, "'caps.per_tap_cap_minor': .*greater than or equal to 0"),
        ("[http]\nport = 70000\n", 2, "'http.port'"),
        ("[terminal]\ncurrency = 'XXX'\n", 2, "'terminal.currency': unknown currency"),
        ("[reader]\nname_pattern = '('\n", 2, "'reader.name_pattern': not a regular expression"),
        ("http = 'here'\n", 1, "'http'"),
        ("[caps]\n\nper_tap_cap_minor 7\n", 3, "not TOML"),
        ("[caps]\n[caps]\n", 2, "not TOML"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_key(home: Home, text: str, line: int, says: str) -> None:
    home.overrides.write_text(text)
    with pytest.raises(InvalidConfiguration, match=says) as caught:
        load_settings(home)
    assert "gateway.toml" in str(caught.value)
    assert f"line {line}" in str(caught.value)


def test_a_mistake_in_the_defaults_names_that_file(home: Home, tmp_path: Path) -> None:
    text = (firmware_config() / "terminal.toml").read_text()
    (tmp_path / "terminal.toml").write_text(text.replace("cvm_limit_minor", "cvm_limit"))
    with pytest.raises(InvalidConfiguration, match=r"terminal\.toml"):
        load_settings(home, firmware=tmp_path)
    (tmp_path / "terminal.toml").write_text(text.replace("[synchroniser]\ninterval_s", "[synchroniser]\n#"))
    with pytest.raises(
        InvalidConfiguration, match=r"'synchroniser.interval_s' is missing at .*terminal.toml line"
    ):
        load_settings(home, firmware=tmp_path)
    (tmp_path / "terminal.toml").write_bytes(b"\n\n[terminal]\n# \xff\n")
    with pytest.raises(InvalidConfiguration, match=r"not UTF-8 at .*terminal\.toml line 4"):
        load_settings(home, firmware=tmp_path)
    (tmp_path / "terminal.toml").unlink()
    with pytest.raises(InvalidConfiguration, match="No such file"):
        load_settings(home, firmware=tmp_path)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (
            '[[application]]\naid = "F0504F53475701"\nname = "a"\n[[application]]\naid = "F0"\nname = "b"\n',
            5,
            "AID",
        ),
        ('[[application]]\naid = "F0504F53475701"\nlabel = "a"\n', 3, "unknown key 'application.0.label'"),
        ("application = []\n", 1, "'application'"),
    ],
)
def test_a_mistake_in_the_applications_is_named(tmp_path: Path, text: str, line: int, says: str) -> None:
    (tmp_path / "applications.toml").write_text(text)
    with pytest.raises(InvalidConfiguration, match=says) as caught:
        load_applications(tmp_path)
    assert f"line {line}" in str(caught.value)
