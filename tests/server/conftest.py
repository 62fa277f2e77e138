"""A federation laid out by the commands: built once, copied for every test that wants to spoil it."""

import shutil
import sys
from pathlib import Path

import pytest

COMMANDS = Path(__file__).parent.parent / "commands"
for folder in (COMMANDS, Path(__file__).parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from medfed_test_commands import Federation, lay_out_by_commands  # noqa: E402


@pytest.fixture(scope="session")
def federation_by_commands(tmp_path_factory) -> Federation:
    """Not to be changed."""
    return lay_out_by_commands(tmp_path_factory.mktemp("by-commands"))


@pytest.fixture
def federation(federation_by_commands, tmp_path) -> Federation:
    """A copy of its own."""
    shutil.copytree(federation_by_commands.folder, tmp_path / "federation")
    return Federation(tmp_path / "federation")
