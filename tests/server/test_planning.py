"""Planning: what no study may hold is one line, whatever a task asks for."""

from __future__ import annotations

import pytest

from medfed.errors import ConfigError
from medfed.server.planning import Decisions, TaskFile, load_task, plan_study


def changed(task: TaskFile, changes: dict[str, object]) -> TaskFile:
    local = task.training.local.model_copy(
        update={key: changes.pop(key) for key in ("learning_rate",) if key in changes}
    )
    return task.model_copy(update={"training": task.training.model_copy(update={"local": local}), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling_rate": 1e-12, "clipping_norm": 1e-320},
        {"sampling_rate": 5e-324},
        {"learning_rate": 1e-320},
        {"learning_rate": 1e6, "sampling_rate": 1e-9},
    ],
    ids=str,
)
def test_numbers_that_leave_no_grid_are_refused(world, changes: dict[str, object]) -> None:
    task = load_task(world.base.files, "example-update")
    decisions = Decisions("a", "2099-12-31", 8.0, 1e-3, "local", "patient", 1)
    roster = world.assignment.roster
    assert plan_study(task, decisions, roster)[0].privacy.epsilon == 8.0
    with pytest.raises(ConfigError, match="MF-203"):
        plan_study(changed(task, dict(changes)), decisions, roster)
