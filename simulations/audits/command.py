"""``medfed-simulate audit``: runs the audits, shows and keeps what they found, and fails where a promise does not hold."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from medfed.command import say, say_json
from medfed.errors import ConfigError, MedfedError, PrivacyError
from medfed.progress import Progress
from medfed.seams import Seams
from medfed.server.ending import versions
from medfed.simulations.audits.setting import Setting
from medfed.simulations.plots import require_matplotlib
from medfed.simulations.run_folder import RESULT_NAME, new_run_folder
from medfed.simulations.threads import one_torch_thread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger("medfed.simulations")

PLOT_NAME = "audit.png"
_STEPS = 1000  # of the progress bar
_WIDTH = 38

Result = Mapping[str, Any]  # of one audit, whose module states its keys


@dataclass(frozen=True, slots=True)
class Audit:
    """One audit: how it is run, shown and drawn. ``cost``: its share of the time, roughly."""

    run: Callable[[Setting], Result]
    rows: Callable[[Result], list[tuple[str, str]]]
    plot: Callable[[Axes, Result], None]
    cost: float


def load_audit(name: str) -> Audit:
    """One of mechanism, one-run, membership and inversion; only what it needs is imported."""
    # each module speaks of its own kind of result; here they are alike
    found: tuple[object, object, object, float]
    match name:
        case "mechanism":
            from medfed.simulations.audits import mechanism

            found = mechanism.mechanism_audit, mechanism.mechanism_rows, mechanism.mechanism_plot, 15.0
        case "one-run":
            from medfed.simulations.audits import one_run

            found = one_run.one_run_audit, one_run.one_run_rows, one_run.one_run_plot, 13.0
        case "membership":
            from medfed.simulations.audits import membership

            found = membership.membership_audit, membership.membership_rows, membership.membership_plot, 60.0
        case "inversion":
            from medfed.simulations.audits import inversion

            found = inversion.inversion_audit, inversion.inversion_rows, inversion.inversion_plot, 15.0
        case _:
            raise ConfigError(100, f"there is no audit {name}", "see medfed-simulate audit --help")
    return Audit(*cast("tuple[Any, Any, Any, float]", found))


def run_audits(
    names: Sequence[str], seams: Seams, *, seed: int | None, quick: bool, out: Path | None, as_json: bool
) -> None:
    """Run the audits of these names in turn, write them to the folder ``out`` and to standard output.

    Raises ``PrivacyError`` MF-710 if any found a promise broken, else ``MedfedError`` MF-711 if any could not have found
    one: its control did not succeed, or its bound is far below the claim. All results are out by then.
    """
    require_matplotlib()
    audits = {name: load_audit(name) for name in names}
    results, seconds = _run_all(audits, seams, seed, quick)
    document = _document(results, seconds, seed, quick)
    place = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(seams.clock.wall()))}-audit"
    with new_run_folder(place, seams) as folder:
        seams.files.write(folder / RESULT_NAME, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
        seams.files.write(folder / PLOT_NAME, plot(audits, results))
    if as_json:
        say_json(document)
    else:
        _show(audits, results, place)
    _judge(results)


def _run_all(
    audits: Mapping[str, Audit], seams: Seams, seed: int | None, quick: bool
) -> tuple[dict[str, Result], dict[str, float]]:
    results: dict[str, Result] = {}
    seconds: dict[str, float] = {}
    total = sum(audit.cost for audit in audits.values())
    before = 0.0
    is_watched = sys.stderr.isatty()  # asked now: the bar puts itself in the place of sys.stderr
    with Progress("audit", _STEPS, sys.stderr) as progress, one_torch_thread():
        for name, audit in audits.items():

            def tell(share: float, what: str, before: float = before, cost: float = audit.cost) -> None:
                progress.update(int(_STEPS * (before + share * cost) / total), what)

            started = seams.clock.monotonic()
            tell(0.0, name)
            if not is_watched:  # else the bar says it
                log.info("audit: %s", name)
            results[name] = audit.run(Setting(seams, seed, quick, tell))
            seconds[name] = round(seams.clock.monotonic() - started, 2)
            if not is_watched:
                log.info("audit: %s done in %.0f s", name, seconds[name])
            before += audit.cost
    return results, seconds


def _document(
    results: Mapping[str, Result], seconds: Mapping[str, float], seed: int | None, quick: bool
) -> dict[str, object]:
    stamps = ["audit of the code on this machine, on made-up or public patients"]
    if seed is not None:
        stamps.append(f"everything from seed {seed}: repeats, and is not private")
    about = {"quick": quick, "seed": seed, "seconds": dict(seconds), "versions": versions()}
    return {"audit": about, "stamps": stamps, **{name.replace("-", "_"): result for name, result in results.items()}}


def _show(audits: Mapping[str, Audit], results: Mapping[str, Result], place: Path) -> None:
    for name, result in results.items():
        broken, weak = result["violations"], result["weak"]
        say(f"{name}: {'PROMISE BROKEN' if broken else 'BLIND' if weak else 'holds'}")
        for what, figure in audits[name].rows(result):
            say(f"  {what:<{_WIDTH}} {figure}")
        for sentence in (*broken, *weak):
            say(f"  ! {sentence}")
    say(f"{RESULT_NAME} and {PLOT_NAME} are in {place}")


def _judge(results: Mapping[str, Result]) -> None:
    broken = [sentence for result in results.values() for sentence in result["violations"]]
    if broken:
        raise PrivacyError(710, "; ".join(broken), "train on no patient with this code; report it as a fault of medfed")
    weak = [sentence for result in results.values() for sentence in result["weak"]]
    if weak:
        raise MedfedError(711, "; ".join(weak), "nothing broken was seen, but it would not have been: report it")


def plot(audits: Mapping[str, Audit], results: Mapping[str, Result]) -> bytes:
    """PNG: one panel an audit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4 * len(results)), dpi=130, layout="constrained")
    panels = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        audits[name].plot(axes, result)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
