"""What stands between a coordinator and real hospitals in tests of the rounds: an exchange in this thread, and its process."""

from __future__ import annotations

from collections.abc import Callable

from medfed.server.exchange import Kind, Reply
from medfed.server.rounds import Rounds
from medfed.server.store import Checkpoint, Store
from medfed.wire import Message, decode


class Killed(BaseException):
    """The process is gone."""


def opened(frame: bytes) -> Message:
    return decode(frame, vector_limit_bytes=1 << 16)


class Post:
    """The exchange: hands frames to real hospitals in this thread and keeps what travelled."""

    def __init__(self, world) -> None:
        self.world = world
        self.offline: set[int] = set()
        self.queue: list[tuple[int, bytes]] = []
        self.sent: list[tuple[int, Kind, bytes]] = []
        self.calls = 0

    def online(self) -> frozenset[int]:
        return frozenset(range(len(self.world.names))) - self.offline

    def send(self, position: int, kind: Kind, payload: bytes, timeout_s: float) -> None:
        assert timeout_s > 0
        self.calls += 1
        self.sent.append((position, kind, payload))
        self.queue.append((position, payload))

    def receive(self) -> list[Reply]:
        self.calls += 1
        batch, self.queue = self.queue, []
        return [reply for position, payload in batch for reply in self.deliver(position, payload)]

    def deliver(self, position: int, payload: bytes) -> list[Reply]:
        hospital = self.world.hospitals.get(position)
        if hospital is None:
            return [Reply(position, None, "expired")]
        try:
            return [Reply(position, hospital.handle(payload), None)]
        except Killed:
            self.world.start(position)
            return []
        except Exception as error:
            return [Reply(position, None, type(error).__name__)]


class Coordinator:
    """One process of the coordinator, to be thrown away and started again over the same folder."""

    def __init__(self, world, post: Post, observe: Callable[[Checkpoint, str], None] | None = None) -> None:
        self.world = world
        self.post = post
        self.told: list[str] = []
        self.observe = observe
        self.rounds = self.start()

    def start(self) -> Rounds:
        world = self.world
        store = Store(world.base.files, world.run_folder, world.study, world.assignment.plan.words)
        self.rounds = Rounds(world.assignment, self.post, store, world.seams_of("coordinator"), self._told)
        return self.rounds

    def _told(self, checkpoint: Checkpoint, what: str) -> None:
        self.told.append(what)
        if self.observe is not None:
            self.observe(checkpoint, what)

    def run(self) -> Checkpoint:
        return self.rounds.run()
