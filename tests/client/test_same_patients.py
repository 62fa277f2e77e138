"""The same patients are never strangers to what they have spent: key, column and new names for old people."""

from __future__ import annotations

import json

import pytest
from medfed_test_commands import Federation, call, check_refusal, new_arguments, write_records

from medfed.client.cli import main
from medfed.server.cli import main as server

SWAPPED = bytes(range(32))


def approving(federation: Federation) -> list[object]:
    return ["approve", federation.study, "--peers", *federation.peers, "--config", federation.config, "--yes"]


def next_study(federation: Federation, name: str = "Trial 2") -> None:
    arguments = [name if each == "Trial 1" else each for each in new_arguments(federation)]
    outcome = call(server, [*arguments, "--replace"])
    assert outcome.status == 0, outcome.err


def swap_key(federation: Federation) -> None:
    path = federation.north / "patients.key"
    path.write_bytes(SWAPPED)
    path.chmod(0o600)


def other_column(federation: Federation) -> None:
    """The same rows, with a second column of ids."""
    table = federation.north / "patients.csv"
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([f"{head},mrn", *(f"{row},M{number}" for number, row in enumerate(rows))]) + "\n")
    text = federation.config.read_text()
    assert 'patient_column = "pid"' in text
    federation.config.write_text(text.replace('patient_column = "pid"', 'patient_column = "mrn"'))


CHANGES = {"key": (swap_key, "patients.key is not the one"), "column": (other_column, "know patients by pid")}


@pytest.fixture
def approved(federation: Federation) -> Federation:
    assert call(main, approving(federation)).status == 0
    return federation


@pytest.mark.parametrize("changed", CHANGES)
def test_another_key_or_column_begins_no_fresh_account(approved: Federation, changed: str) -> None:
    """Neither for another study, nor for the one that was approved, nor in a start; the way out is told."""
    spoil, said = CHANGES[changed]
    spoil(approved)
    for asked in (approving(approved), ["run", approved.config, "--once"]):
        assert said in check_refusal(approved, main, asked, 340, 4).err
    next_study(approved)
    assert said in check_refusal(approved, main, approving(approved), 340, 4).err
    planned = call(main, ["plan", approved.study, "--config", approved.config, "--json"])
    assert planned.status == 3
    assert said in json.loads(planned.out)["refusals"][0]


def test_key_that_is_restored_finds_the_account_again(approved: Federation) -> None:
    key = (approved.north / "patients.key").read_bytes()
    swap_key(approved)
    (approved.north / "patients.key").write_bytes(key)
    next_study(approved)
    assert (
        "other studies in this ledger: 1 on these patients, counted above; 0 on others"
        in call(main, approving(approved)).out
    )


@pytest.mark.parametrize("changed", CHANGES)
def test_nothing_is_bound_before_anything_can_be_spent(federation: Federation, changed: str) -> None:
    CHANGES[changed][0](federation)
    assert call(main, approving(federation)).status == 0
    assert call(main, ["withdraw", "Trial 1", "--config", federation.config, "--yes"]).status == 0


def test_card_says_so_where_no_patient_is_known(approved: Federation) -> None:
    """The same rows under new names: nobody but a person can tell."""
    next_study(approved)
    write_records(approved.north / "patients.csv", "renamed")
    card = call(main, approving(approved)).out
    assert "NO PATIENT IN COMMON with any of the other studies in this ledger (1)" in card


def test_card_of_a_first_study_says_nothing_of_others(federation: Federation) -> None:
    card = call(main, [*approving(federation), "--json"]).out
    asked = json.loads(card)
    assert (asked["studies_in_common"], asked["studies_apart"]) == (0, 0)
    assert "in this ledger" not in call(main, approving(federation)).out


def test_ledger_holds_a_commitment_and_not_the_key(approved: Federation) -> None:
    key = (approved.north / "patients.key").read_bytes()
    rows = call(main, ["ledger", "--json", "--config", approved.config]).out
    assert '"patient_column": "pid"' in rows
    assert key.hex() not in rows and key not in (approved.north / "ledger.db").read_bytes()
