"""Flower's store of objects in transit, with the pieces of long frames on disk instead of in memory.

All hospitals may upload at once, and what they send waits here until the training child fetches it, one frame after
another. In memory that would be as many models as there are hospitals; here it is a file of slots without a name. What is
short stays in memory.
"""

from __future__ import annotations

import threading

from medfed.flower import hush

# isort: split
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.object_store.object_store import NoObjectInStoreError

from medfed.flower_pieces import BODY_LIMIT_BYTES
from medfed.process import Collector
from medfed.seams import Scratch

hush()

SPOOL_FROM_BYTES = 1 << 16
COLLECT_EVERY_BYTES = 32 << 20
SLOT_BYTES = BODY_LIMIT_BYTES
_AROUND_PIECES = 8  # a message, its record dict, and room to spare


class SpoolingStore(InMemoryObjectStore):  # type: ignore[misc]
    """The store of Flower's in-memory state; objects of ``SPOOL_FROM_BYTES`` and more lie in ``scratch``.

    ``limit_bytes`` bounds all of them together: an object beyond it is refused, and its message never becomes complete.
    """

    def __init__(self, scratch: Scratch, limit_bytes: int) -> None:
        super().__init__()
        self._scratch = scratch
        self._slots_at_most = max(1, limit_bytes // SLOT_BYTES)
        self._spooled: dict[str, tuple[int, int]] = {}  # object id -> slot and size
        self._free: list[int] = []
        self._slots = 0
        self._lock_slots = threading.Lock()
        self._collector = Collector()
        self._passed_bytes = 0

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """Flower's, for messages of no more objects than the longest frame has: each named one may then be stored.

        A body of a few megabytes could name tens of thousands, whose contents, each too short for the file, would fill
        memory. Raises ``ValueError``.
        """
        if sum(1 for _ in iterate_object_tree(object_tree)) > self._slots_at_most + _AROUND_PIECES:
            raise ValueError("a message of more objects than a frame has")
        names: list[str] = super().preregister(run_id, object_tree)
        return names

    def put(self, object_id: str, object_content: bytes) -> None:
        """Check and keep one object. Raises as Flower's: ``ValueError``, ``NoObjectInStoreError``."""
        if len(object_content) < SPOOL_FROM_BYTES:
            super().put(object_id, object_content)
            return
        if len(object_content) > SLOT_BYTES or get_object_id(object_content) != object_id:
            raise ValueError("an object is not what it is named, or too long")
        validate_object_content(content=object_content)
        slot = self._take_slot()
        self._scratch.put(slot * SLOT_BYTES, object_content)
        self._passed(len(object_content))
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is not None and not entry.is_available:
                entry.is_available = True
                self._spooled[object_id] = (slot, len(object_content))
                return
        self._give_back(slot)
        if entry is None:
            raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")

    def get(self, object_id: str) -> bytes | None:
        """An object's content, empty while it is on its way, None for an unknown one."""
        with self.lock_store:
            place = self._spooled.get(object_id)
            if place is None:
                content: bytes | None = super().get(object_id)
                return content
            slot, size = place
            self._passed(size)
            return self._scratch.take(slot * SLOT_BYTES, size)

    def delete(self, object_id: str) -> None:
        """Flower calls this for a message, and it calls itself for what lies below it."""
        with self.lock_store:
            super().delete(object_id)
            if object_id not in self.store and object_id in self._spooled:
                self._give_back(self._spooled.pop(object_id)[0])

    def clear(self) -> None:
        with self.lock_store:
            super().clear()
            for slot, _ in self._spooled.values():
                self._give_back(slot)
            self._spooled.clear()

    def _passed(self, size: int) -> None:
        """What served a request is garbage in circles, the object's bytes in it: collected before it is much."""
        self._passed_bytes += size
        if self._passed_bytes >= COLLECT_EVERY_BYTES:
            self._passed_bytes = 0
            self._collector.collect()

    def _take_slot(self) -> int:
        with self._lock_slots:
            if self._free:
                return self._free.pop()
            if self._slots >= self._slots_at_most:
                raise ValueError("the hospitals have stored more than their study needs")
            self._slots += 1
            return self._slots - 1

    def _give_back(self, slot: int) -> None:
        with self._lock_slots:
            self._free.append(slot)
