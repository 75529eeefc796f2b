"""The benchmark of the POS interface runs and tells what it must; how fast a machine is decides nothing."""

from __future__ import annotations

from pos_gateway.lab.programs import command


def test_the_pos_interface_is_measured_beside_the_bare_tap() -> None:
    told = command("bench", "pos", "--protocol", "nexo", "--taps", "3")
    assert told["exit"] == 0
    assert (told["protocol"], told["taps"]) == ("nexo", 3)
    for share in ("own_share_without_us", "own_share_us", "own_share_encrypted_us", "card_and_reader_us"):
        assert told[share]["p50"] > 0
    assert told["own_share_ratio"] > 0
