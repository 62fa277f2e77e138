"""The child's exit status and what it says, without a SuperLink."""

import logging

import pytest

from medfed.errors import RoundAborted
from medfed.server.link import child


@pytest.fixture
def main(monkeypatch):
    """``child.main`` with a task that raises ``error``; touches no signal handler and no log configuration."""

    def call(error: BaseException | None) -> int:
        def run(orders) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(child.signal, "signal", lambda number, handler: None)
        monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
        monkeypatch.setattr(child, "_read_orders", lambda: None)
        monkeypatch.setattr(child, "_end_with_parent", lambda: None)
        monkeypatch.setattr(child, "run", run)
        return child.main()

    return call


def test_child_whose_task_returns_ends_with_zero(main, capsys):
    assert main(None) == 0
    assert capsys.readouterr().err == ""


def test_child_whose_task_refuses_says_so_in_one_line_and_passes_the_status_on(main, capsys):
    assert main(RoundAborted(190, "attempts are used up", "start a new study")) == 6
    assert capsys.readouterr().err == "MF-190 attempts are used up: start a new study\n"


def test_child_whose_task_stumbles_names_the_class_only(main, capsys):
    assert main(ValueError("patient 17")) == 4
    said = capsys.readouterr().err
    assert said.startswith("MF-900 internal error (ValueError)")
    assert "patient" not in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), child.RunNotRunningException()])
def test_child_that_is_stopped_ends_with_130(main, stopped):
    assert main(stopped) == 130


@pytest.mark.parametrize("line", [b"{}\n", b'{"admin": 1}\n', b"no json\n"])
def test_child_with_unusable_orders_does_not_start(monkeypatch, line):
    pieces = iter([line[:3], line[3:]])
    monkeypatch.setattr(child.os, "read", lambda handle, size: next(pieces))
    with pytest.raises(ValueError, match="Orders"):
        child._read_orders()


def test_child_without_orders_ends(monkeypatch):
    monkeypatch.setattr(child.os, "read", lambda handle, size: b"")
    with pytest.raises(SystemExit):
        child._read_orders()
