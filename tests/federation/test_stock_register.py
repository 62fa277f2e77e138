"""The coordinator's ServerApp for a stock SuperLink finds out which node is which hospital, and trains."""

from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, Context, RecordDict

from medfed.client.node import make_client_app
from medfed.errors import ConfigError, EnvironmentFault
from medfed.seams import system_seams
from medfed.server.link import stock
from medfed.server.link.stock import Register, app
from medfed.simulations.grid import LocalGrid

ORDER = [2, 0, 3, 1]  # which hospital each node is


def fail(frame: bytes) -> bytes:
    raise ValueError("not a hospital")


def test_each_hospital_is_found_by_its_signature_whatever_its_node(world):
    world.start_all()
    before = [world.rows(position) for position in ORDER]
    handles = [fail, lambda frame: b"nonsense", *(world.hospitals[position].handle for position in ORDER)]
    grid = LocalGrid([make_client_app(handle) for handle in handles])
    found = Register(grid, world.assignment, replace(world.base, clock=system_seams().clock)).everybody()
    assert found == {position: grid.node_ids[2 + index] for index, position in enumerate(ORDER)}
    assert [world.rows(position) for position in ORDER] == before, "asking costs nothing"
    grid.close()


def test_question_does_not_end_a_hospital_s_session(world):
    """A coordinator that comes back asks its open attempt again, with the keys of the session that it was opened in."""
    hospital = world.start(0)
    (part,) = hospital.participations
    before = {name: getattr(part, name) for name in ("_session", "_party")}
    part._session, part._party = b"s" * 16, object()
    kept = part._party
    hospital.handle(question(world))
    assert (part._session, part._party) == (b"s" * 16, kept)
    for name, value in before.items():
        setattr(part, name, value)


def question(world) -> bytes:
    return Register(LocalGrid([]), world.assignment, world.base)._question


def test_reply_of_another_question_or_of_a_stranger_is_nobody_s(world, caplog):
    world.start_all()
    old = world.hospitals[0].handle(question(world))
    register = Register(LocalGrid([]), world.assignment, world.base)
    assert register._signer(old) is None
    good = world.hospitals[0].handle(register._question)
    assert register._signer(good) == 0
    assert register._signer(good[:-1] + bytes([good[-1] ^ 1])) is None
    alarms = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [alarm.startswith("ALARM") for alarm in alarms] == [True, True]


def test_hospital_that_never_answers_is_named_at_the_deadline(world):
    hospital = world.start(0)
    handles = [hospital.handle, fail]
    grid = LocalGrid([make_client_app(handle) for handle in handles])
    with pytest.raises(EnvironmentFault, match=r"MF-191 .*Bonn, Celle, Daun did not answer"):
        Register(grid, world.assignment, world.base).everybody()
    grid.close()


def run(grid: LocalGrid, run_config: dict[str, str]) -> None:
    app(grid=grid, context=Context(1, 1, {}, RecordDict({"c": ConfigRecord()}), run_config))


def test_server_app_trains_the_study_of_the_file_that_the_run_names(world, monkeypatch):
    monkeypatch.setattr(stock, "system_seams", lambda: replace(world.base, clock=system_seams().clock))
    world.start_all()
    grid = LocalGrid([make_client_app(world.hospitals[position].handle) for position in ORDER])
    run(grid, {"server": str(world.folder / "coordinator" / "server.toml")})
    grid.close()
    checkpoint = world.store.load_checkpoint()
    assert checkpoint.state.completed_rounds == world.study.training.rounds
    assert checkpoint.last_attempt == world.study.training.rounds
    assert (world.run_folder / "model.safetensors").exists()


@pytest.mark.parametrize("run_config", [{}, {"server": ""}])
def test_server_app_asks_for_the_coordinator_s_file(run_config):
    with pytest.raises(ConfigError, match="MF-203 the run does not name"):
        run(LocalGrid([]), run_config)
