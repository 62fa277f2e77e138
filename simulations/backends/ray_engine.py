"""Flower's stock simulation engine: production's ServerApp and ClientApp over a pool of Ray actors.

Flower hands each message to any free actor of its pool. A hospital is more than a message: it holds its ledger's lock and
the keys of a session. So each hospital lives in a Ray actor of its own, which trains, and the pool's ClientApp passes bytes
to it. With an address all this happens on an existing Ray cluster whose machines share the rehearsal's folder and have the
same medfed installed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from medfed.flower import hush

# isort: split
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import PARTITION_ID_KEY
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from medfed.client.ledger import Ledger
from medfed.client.node import make_client_app
from medfed.client.site import CONFIG_NAME, Site
from medfed.errors import ConfigError, EnvironmentFault, MedfedError
from medfed.seams import Clock, Seams
from medfed.server.exchange import Exchange, Kind, Reply
from medfed.server.link.grid import GridExchange, make_server_app
from medfed.simulations.rehearsal import Backend, Rehearsal, Train, enter_hospital
from medfed.simulations.watch import Watch

log = logging.getLogger("medfed.simulations")

WHO = b"medfed/which-hospital"
"""Asked once of each of Flower's nodes; the answer is the position of its hospital. Never leaves a simulation."""
NEW_CLUSTER = "local"  # Ray's own word; without one it would take whatever RAY_ADDRESS names
_ASK_WITHIN_S = 300.0  # Ray starts a process for each actor, which imports Flower
_REACH_WITHIN_S = 5.0
_LAST_WORDS_S = 1.0
_CLOSE_WITHIN_S = 10.0
_FREE_WITHIN_S = 30.0
_QUIET_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # hospitals share the accelerator; also what Ray announces for later
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}

Fault = tuple[int, str, str]  # code, what and remedy of a MedfedError, or 900, its text and nothing


@dataclass(frozen=True, slots=True)
class _News:
    """What a hospital has logged as a warning since it was last asked, and why it did not answer its last message, if so."""

    warnings: tuple[str, ...]
    why: str


class _Kept(logging.Handler):
    """Keeps lines for whoever asks: Ray would put them into a file."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def take(self) -> tuple[str, ...]:
        lines, self._lines = self._lines, []
        return tuple(lines)


class _Hospital:
    """A hospital of the rehearsal in a process of its own; one message at a time.

    Exceptions stay here: ours do not survive Ray's wrapping, and Ray's text would be a page.
    """

    def __init__(self, config_path: str, plan: Rehearsal) -> None:
        self._config_path = Path(config_path)
        self._plan = plan
        self._stack = contextlib.ExitStack()
        self._why = ""
        self._warnings = _Kept()
        logging.getLogger("medfed").addHandler(self._warnings)

    def open(self) -> Fault | None:
        """Take the ledger, load the studies; what went wrong, if anything did."""
        import torch

        torch.set_num_threads(1)
        try:
            self._handle = enter_hospital(self._stack, self._config_path, self._plan)
        except MedfedError as error:
            return error.code, error.what, error.remedy
        except Exception as error:
            return 900, f"{type(error).__name__}: {error}", ""
        return None

    def answer(self, frame: bytes) -> tuple[bytes, bool]:
        """The reply, and whether there is one."""
        try:
            reply = self._handle(frame)
        except Exception as error:
            self._why = str(error) if isinstance(error, MedfedError) else f"{type(error).__name__}: {error}"
            return b"", False
        self._why = ""
        return reply, True

    def news(self) -> _News:
        """In its turn: after the messages that came before this question."""
        return _News(self._warnings.take(), self._why)

    def close(self) -> None:
        """Give the ledger back."""
        self._stack.close()


class _Forward(ClientApp):  # type: ignore[misc]
    """The ClientApp of the pool: production's, over the hospital that the node stands for."""

    def __init__(self, names: Sequence[str], namespace: str) -> None:
        super().__init__()
        self._names = list(names)
        self._namespace = namespace

    def __call__(self, message: Message, context: Context) -> Message:
        position = int(context.node_config[PARTITION_ID_KEY])
        return make_client_app(lambda frame: self._answer(position, frame))(message, context)

    def _answer(self, position: int, frame: bytes) -> bytes:
        import ray

        if frame == WHO:
            return position.to_bytes(2, "big")
        hospital = ray.get_actor(self._names[position], namespace=self._namespace)
        reply, is_answered = ray.get(hospital.answer.remote(frame))
        if not is_answered:
            raise RuntimeError("the hospital failed")  # it keeps why
        return bytes(reply)


class _Actors:
    """The hospitals' actors on the cluster, by position."""

    def __init__(self, sites: Sequence[Site], plan: Rehearsal, namespace: str) -> None:
        import ray

        self.names = [f"hospital-{position}" for position in range(len(sites))]
        # no processor is set aside for them: what limits how many train at a time is Flower's pool
        make = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(_Hospital)
        self._sites = sites
        self._asked: list[tuple[int, object]] = []
        self._actors = [
            make.options(name=name, namespace=namespace).remote(str(site.folder / CONFIG_NAME), plan)
            for name, site in zip(self.names, sites, strict=True)
        ]

    def open(self) -> None:
        """Raises what the first hospital that cannot start says, with its code."""
        import ray

        try:
            faults = ray.get([actor.open.remote() for actor in self._actors])
        except ray.exceptions.RayError as error:
            what = f"Ray could not start the hospitals ({type(error).__name__})"
            raise EnvironmentFault(192, what, "has every machine of the cluster medfed and this folder?") from error
        for site, fault in zip(self._sites, faults, strict=True):
            if fault is not None:
                code, what, remedy = fault
                raise MedfedError(code, f"{site.config.hospital.name}: {what}", remedy or "please report it")

    def ask(self, position: int) -> None:
        """Ask a hospital for its news; it may be at work on another message."""
        self._asked.append((position, self._actors[position].news.remote()))

    def news(self, wait_s: float = 0.0) -> list[tuple[int, _News]]:
        """What has been answered."""
        import ray

        came, left = [], []
        for position, reference in self._asked:
            ready, _ = ray.wait([reference], timeout=wait_s)
            if ready:
                came.append((position, self._read(reference)))
            else:
                left.append((position, reference))
        self._asked = left
        return came

    @staticmethod
    def _read(reference: object) -> _News:
        import ray

        try:
            news: _News = ray.get(reference)
        except ray.exceptions.RayError as error:
            return _News((), f"its process on Ray ended ({type(error).__name__})")
        return news

    def close(self) -> None:
        """Let them give their ledgers back, and end them."""
        import ray

        ray.wait([a.close.remote() for a in self._actors], num_returns=len(self._actors), timeout=_CLOSE_WITHIN_S)
        for actor in self._actors:
            ray.kill(actor)


class _Told:
    """An ``Exchange`` that passes everything on, and tells the watch which hospital failed and why."""

    def __init__(
        self,
        exchange: Exchange,
        names: Sequence[str],
        watch: Watch,
        actors: _Actors,
        interrupted: threading.Event,
    ) -> None:
        self._exchange = exchange
        self._names = names
        self._watch = watch
        self._actors = actors
        self._interrupted = interrupted

    def online(self) -> frozenset[int]:
        return self._exchange.online()

    def send(self, position: int, kind: Kind, payload: bytes, timeout_s: float) -> None:
        self._exchange.send(position, kind, payload, timeout_s)

    def receive(self) -> list[Reply]:
        if self._interrupted.is_set():
            raise KeyboardInterrupt
        replies = self._exchange.receive()
        for reply in replies:
            self._actors.ask(reply.position)
        self.tell()
        return replies

    def tell(self, wait_s: float = 0.0) -> None:
        """Say what hospitals warn of, as they would in this process."""
        for position, news in self._actors.news(wait_s):
            for line in news.warnings:
                log.warning("%s: %s", self._names[position], line)
            if news.why:
                self._watch.failed(position, news.why)
            else:
                self._watch.worked(position)


def ray_backend(address: str | None, seams: Seams) -> Backend:
    """A rehearsal's ``Backend``: each hospital in a Ray actor, messages by Flower's engine.

    ``address``: of an existing cluster, ``host:port``, or ``auto`` for the one of this machine; None starts one here for
    each run. Raises ``ConfigError`` MF-320 without the extra ``ray``, MF-203 if nobody listens at the address.
    """
    _require_ray()
    if address is not None and address != "auto":
        _require_listener(address)
    return functools.partial(_run_on_ray, address or NEW_CLUSTER, seams)


def _run_on_ray(address: str, seams: Seams, sites: Sequence[Site], plan: Rehearsal, train: Train) -> None:
    """Raises MF-203 if the cluster does not answer, MF-630 if it has no processor, and whatever hospitals and ``train`` raise.

    Guarantee: the ledgers are free afterwards.
    """
    failed: list[BaseException] = []
    namespace = f"medfed-{seams.entropy.draw('ray/namespace', 8).hex()}"
    try:
        with _quiet(), _cluster(address, namespace), _interruptible() as interrupted:
            share = _processors_for_one(len(sites))
            actors = _Actors(sites, plan, namespace)
            try:
                actors.open()
            except BaseException:
                actors.close()
                raise
            names = [site.config.hospital.name for site in sites]
            watch = Watch(names)

            def guarded(exchange: Exchange) -> None:
                told = _Told(exchange, names, watch, actors, interrupted)
                try:
                    train(watch.ending(told))
                finally:
                    told.tell(_LAST_WORDS_S)

            def main(grid: Grid, context: Context) -> None:
                try:
                    positions = _who_is_who(grid, len(sites), seams.clock, interrupted)
                    make_server_app(guarded, positions)(grid, context)
                except BaseException as error:  # raised again in the caller's thread, as it is
                    failed.append(error)
                finally:
                    actors.close()  # here: Flower's engine ends the connection before it returns

            app = ServerApp()
            app.main()(main)
            resources = {"client_resources": {"num_cpus": share, "num_gpus": 0}}
            try:
                run_simulation(app, _Forward(actors.names, namespace), len(sites), "ray", resources)
            except BaseException:
                interrupted.set()  # the ServerApp's thread would go on
                raise
    finally:
        _wait_until_free(sites, seams.clock)
    if failed:
        raise failed[0]


def _require_ray() -> None:
    os.environ.update(_QUIET_ENVIRONMENT)
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ConfigError(320, "Ray is not installed", "pip install 'medfed[ray]'") from error


def _require_listener(address: str) -> None:
    """Ray would try for two minutes, and end the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit():
        raise ConfigError(203, f"{address!r} is no address of a Ray cluster", "write host:port, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            203, f"no Ray cluster answers at {address}", "check the address; leave it out to start one here"
        ) from error


@contextlib.contextmanager
def _cluster(address: str, namespace: str) -> Iterator[None]:
    """A connection to a cluster; ``namespace`` keeps this run's actors apart from others'."""
    import ray

    # what Flower's engine would do at its start, but in our namespace: it takes a connection that is there
    try:
        ray.init(
            address=address,
            namespace=namespace,
            include_dashboard=False if address == NEW_CLUSTER else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,  # the command's own format stays
            runtime_env={"env_vars": _QUIET_ENVIRONMENT},
        )
    except (ConnectionError, ValueError, RuntimeError, SystemExit) as error:
        where = "here" if address == NEW_CLUSTER else f"at {address}"
        what = f"Ray {where} does not answer ({type(error).__name__})"
        raise ConfigError(203, what, "check the address, and that its Ray and Python are these") from error
    try:
        yield
    finally:
        ray.shutdown()


def _processors_for_one(hospitals: int) -> int:
    """What Flower's pool sets aside for one of its actors, which only pass bytes on: as many as hospitals are enough."""
    import ray

    processors = int(ray.cluster_resources().get("CPU", 0))
    if processors < 1:
        raise EnvironmentFault(630, "the Ray cluster has no processor to give", "add a machine to it, or leave it out")
    return max(1, processors // hospitals)


def _who_is_who(grid: Grid, count: int, clock: Clock, interrupted: threading.Event) -> dict[int, int]:
    """Flower's node id by position; the engine draws ids at random and tells only the nodes their number."""
    deadline = clock.monotonic() + _ASK_WITHIN_S
    while len(ids := list(grid.get_node_ids())) < count and clock.monotonic() < deadline:
        clock.sleep(0.05, interrupted)
    exchange = GridExchange(grid, dict(enumerate(ids)))
    for index in range(len(ids)):
        exchange.send(index, Kind.QUERY, WHO, _ASK_WITHIN_S)
    found: dict[int, int] = {}
    while len(found) < count and clock.monotonic() < deadline:
        if interrupted.is_set():
            raise KeyboardInterrupt
        for reply in exchange.receive():
            if reply.payload is None:
                what = f"Flower's engine could not run a hospital: {reply.fault}"
                raise EnvironmentFault(192, what, "has every machine of the cluster the same medfed?")
            found[int.from_bytes(reply.payload, "big")] = ids[reply.position]
        clock.sleep(0.02)
    if len(found) < count:
        raise EnvironmentFault(191, "Flower's engine did not start all hospitals in time", "give Ray more processors")
    return found


def _wait_until_free(sites: Sequence[Site], clock: Clock) -> None:
    """A hospital that was ended at work keeps its ledger until its process is gone."""
    end = clock.monotonic() + _FREE_WITHIN_S
    while clock.monotonic() < end:
        if not any(Ledger.is_held(site.seams.files, site.ledger_path) for site in sites):
            return
        clock.sleep(0.05)


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets within the block.

    Flower's engine goes on until the ServerApp ends, whatever is raised in the main thread: so Ctrl-C has to end that.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before)
        interrupted.set()

    before: Callable[[int, FrameType | None], object] | int | None = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, on_signal)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Flower says that ``run_simulation`` is deprecated and logs at its start; both are known here."""
    hush()
    logging.getLogger("ray").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
