"""What the tests of this folder share: a small real federation on loopback."""

import sys
from pathlib import Path

import pytest

TASKS = Path(__file__).parent / "tasks"
if str(TASKS) not in sys.path:
    sys.path.insert(0, str(TASKS))

from medfed_test_federation import Place, make_place  # noqa: E402


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    monkeypatch.setenv("PYTHONPATH", str(TASKS))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower-home"))
    return make_place(tmp_path)
