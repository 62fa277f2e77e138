"""The ServerApp that Flower's stock SuperLink runs: production's, with hospitals behind whatever nodes are connected.

The run's configuration names the coordinator's file (``server = "/path/to/server.toml"``). A SuperLink of Flower's own does
not know which node is whose; hospitals say so themselves, with their signature.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from medfed.flower import FIELD, RECORD, hush

# isort: split
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from medfed.errors import ConfigError, EnvironmentFault, MedfedError
from medfed.seams import Seams, system_seams
from medfed.server.assignment import Assignment
from medfed.server.daemon import load_assignment, train_with
from medfed.server.exchange import Kind
from medfed.server.link.grid import make_server_app, payload_of
from medfed.server.setup import load_office
from medfed.wire import Finish, Refusal, check_signature, decode, encode

hush()
log = logging.getLogger("medfed.server.link")

SERVER = "server"
"""The entry of the run's configuration that names the coordinator's file."""
ASK_AGAIN_S = 30.0
LOOK_EVERY_S = 0.5


class Register:
    """Finds out which of Flower's nodes is which hospital of the roster.

    Each node is asked to finish a study before its first round. Every hospital refuses that, changes nothing, and signs
    its refusal; whoever signed with an identity of the roster, over the nonce drawn for this, is that hospital.
    """

    def __init__(self, grid: Grid, assignment: Assignment, seams: Seams) -> None:
        self._grid = grid
        self._assignment = assignment
        self._clock = seams.clock
        self._study = assignment.study.hash()
        self._nonce = seams.entropy.draw("stock/nonce", 16)
        question = Finish(self._study, self._nonce, 0, bytes(32), (), b"", bytes(64), b"", b"")
        self._question = encode(question, assignment.identity)
        self._due: dict[int, float] = {}
        self._waiting: dict[str, int] = {}
        self._found: dict[int, int] = {}

    def everybody(self) -> dict[int, int]:
        """Flower's node id by position in the roster.

        Raises ``EnvironmentFault`` MF-191 if not all hospitals have answered within the study's setup deadline.
        """
        hospitals = self._assignment.roster.hospitals
        end = self._clock.monotonic() + self._assignment.study.deadlines.setup_s
        told: list[str] = []
        while len(self._found) < len(hospitals):
            missing = [each.hospital for position, each in enumerate(hospitals) if position not in self._found]
            if missing != told:
                log.info("waiting for %s", ", ".join(missing))
                told = missing
            if self._clock.monotonic() > end:
                what = f"{', '.join(missing)} did not answer"
                raise EnvironmentFault(191, what, "do SuperNode and medfed-client run --bridge run there?")
            self._ask()
            self._listen()
            self._clock.sleep(LOOK_EVERY_S)
        return self._found

    def _ask(self) -> None:
        now = self._clock.monotonic()
        known = self._found.values()
        due = [n for n in self._grid.get_node_ids() if n not in known and self._due.get(n, now) <= now]
        if not due:
            return
        messages = [
            Message(
                RecordDict({RECORD: ConfigRecord({FIELD: self._question})}), node, Kind.QUERY.value, ttl=ASK_AGAIN_S
            )
            for node in due
        ]
        for node, message_id in zip(due, self._grid.push_messages(messages), strict=True):
            self._due[node] = now + ASK_AGAIN_S
            if message_id:
                self._waiting[message_id] = node

    def _listen(self) -> None:
        if not self._waiting:
            return
        for message in self._grid.pull_messages(list(self._waiting)):
            node = self._waiting.pop(message.metadata.reply_to_message_id, None)
            if node is None:
                continue
            if message.has_error():
                log.warning("a node does not answer as a hospital: %s", str(message.error.reason)[:80])
                continue
            position = self._signer(payload_of(message) or b"")
            if position is not None:
                self._found.setdefault(position, node)

    def _signer(self, frame: bytes) -> int | None:
        """The position of the hospital that signed this answer to our question; None if it is nobody's."""
        try:
            reply = decode(frame, vector_limit_bytes=self._assignment.vector_limit_bytes)
        except MedfedError as error:
            log.error("ALARM: a node's answer is refused: %s", error)
            return None
        if not isinstance(reply, Refusal) or reply.nonce != self._nonce or reply.study_hash != self._study:
            log.error("ALARM: a node's answer is refused: it is not one to this question")
            return None
        for position, identity in enumerate(self._assignment.roster.identities):
            try:
                check_signature(frame, identity)
            except MedfedError:
                continue
            return position
        log.error("ALARM: a node's answer is refused: no hospital of the roster signed it")
        return None


def _main(grid: Grid, context: Context) -> None:
    """Train the study of the file that the run's configuration names; raises what the rounds raise."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("medfed").setLevel(logging.INFO)
    try:
        _train(grid, context, system_seams())
    except MedfedError as error:
        log.error("%s", error)  # Flower's own logger is silent here
        raise


def _train(grid: Grid, context: Context, seams: Seams) -> None:
    named = context.run_config.get(SERVER)
    if not isinstance(named, str) or not named:
        raise ConfigError(203, "the run does not name the coordinator's file", "--run-config 'server=\"/PATH\"'")
    config_path = Path(named)
    office = load_office(seams, config_path)
    with seams.files.lock(office.folder / "run.lock"):
        node_ids = Register(grid, load_assignment(office), seams).everybody()
        make_server_app(lambda exchange: _ignore(train_with(exchange, config_path, seams)), node_ids)(grid, context)


def _ignore(result: object) -> None:
    """The checkpoint is on disk."""


app = ServerApp()
app.main()(_main)
