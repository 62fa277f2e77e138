"""A federation as the commands lay it out: built once, copied for every test that wants to spoil it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medfed.client.ledger import LedgerView
from medfed.client.site import Site, load_site
from medfed.seams import system_seams

Main = Callable[[Sequence[str] | None], int]

TASK = """\
purpose = "Predict death from two findings."
sampling_rate = 1.0
clipping_norm = 1.0
[task]
kind = "binary"
label = "died"
classes = 2
[model]
name = "logistic-regression"
hidden = []
[training]
aggregate = "gradient"
rounds = 4
spare_attempts = 1
learning_rates = [[1, 0.3]]
average_last_rounds = 2
server_step = { kind = "momentum", momentum = 0.9 }
[deadlines]
setup_s = 60.0
round_s = 60.0
[data]
max_records_per_patient = 2
[[data.features]]
name = "age"
kind = "number"
unit = "years"
minimum = 0
maximum = 120
center = 60
scale = 15
outside = "refuse"
[[data.features]]
name = "ventilated"
kind = "category"
levels = ["no", "yes"]
center = 0.25
scale = 0.5
"""
NAMES = ("north", "south", "west")


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Federation:
    """``north``'s people type; its config is ``config``, the study's files lie in ``study``."""

    folder: Path

    @property
    def north(self) -> Path:
        return self.folder / "north"

    @property
    def config(self) -> Path:
        return self.north / "hospital.toml"

    @property
    def office(self) -> Path:
        return self.folder / "office"

    @property
    def study(self) -> Path:
        return self.office / "study" / "study.toml"

    @property
    def peers(self) -> list[str]:
        return [str(self.folder / name / "enrolment.json") for name in NAMES[1:]]

    def site(self) -> Site:
        return load_site(system_seams(), self.config)

    def head(self) -> bytes:
        """Hash of the last row of north's ledger, which vouches for all of them."""
        site = self.site()
        with LedgerView.inspect(site.seams.files, site.ledger_path, site.identity()) as ledger:
            return ledger.head().hash

    def listing(self) -> dict[str, bytes | None]:
        """Every file with its bytes, every folder."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.folder.rglob("*"))
        }


def call(main: Main, argv: Sequence[str | Path]) -> Outcome:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as end:  # argparse's own exit after --help and --version
            status = end.code if isinstance(end.code, int) else 0
    return Outcome(int(status), out.getvalue(), err.getvalue())


def write_records(path: Path, name: str) -> None:
    lines = [f"{name}-{n},{30 + n},{'yes' if n % 3 else 'no'},{n % 2}" for n in range(12)]
    path.write_text("\n".join(["pid,age,ventilated,died", *lines]) + "\n")


def init_arguments(folder: Path, name: str) -> list[str]:
    """``medfed-client init`` for ``folder/name``."""
    return [
        *("init", name, "--folder", str(folder / name), "--coordinator", "localhost:1", "--patients", "12"),
        *("--ca", str(folder / "office/tls/ca.crt"), "--data", str(folder / name / "patients.csv")),
        *("--patient-column", "pid", "--max-epsilon-study", "4", "--max-epsilon-lifetime", "8"),
        *("--lifetime-delta", "1e-5", "--max-delta", "0.01", "--min-colluders", "1"),
    ]


def new_arguments(federation: Federation) -> list[str]:
    """``medfed-server study new`` as the happy path has it."""
    return [
        *("study", "new", "--folder", str(federation.office), "--task", str(federation.folder / "task.toml")),
        *("--name", "Trial 1", "--expires", "2099-12-31", "--epsilon", "2", "--delta", "1e-3"),
        *("--mode", "distributed", "--unit", "patient", "--colluders", "1"),
    ]


def lay_out_by_commands(folder: Path) -> Federation:
    """Coordinator and three hospitals, enrolled, with a study nobody has approved yet."""
    from medfed.client.cli import main as client
    from medfed.server.cli import main as server

    federation = Federation(folder)
    (folder / "task.toml").write_text(TASK)
    done = [call(server, ["init", "--folder", federation.office, "--host", "localhost", "--host", "127.0.0.1"])]
    for name in NAMES:
        (folder / name).mkdir()
        write_records(folder / name / "patients.csv", name)
        done.append(call(client, init_arguments(folder, name)))
    documents = [str(folder / name / "enrolment.json") for name in NAMES]
    done.append(call(server, ["enroll", *documents, "--folder", str(federation.office)]))
    done.append(call(server, new_arguments(federation)))
    assert [outcome.status for outcome in done] == [0] * len(done), [outcome.err for outcome in done]
    return federation


def check_refusal(federation: Federation, main: Main, argv: Sequence[str | Path], code: int, status: int) -> Outcome:
    """One line with the code and a remedy, the exit status, no traceback; nothing spent, no file changed or left over."""
    before = federation.listing()
    outcome = call(main, argv)
    assert outcome.err.count("\n") == 1 and outcome.err.startswith(f"MF-{code} "), outcome.err
    assert ": " in outcome.err and "Traceback" not in outcome.err + outcome.out
    assert outcome.status == status
    assert federation.listing() == before
    return outcome
