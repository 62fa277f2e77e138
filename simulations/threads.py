"""How many threads torch may use in a rehearsal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Within the block every torch operation runs on the thread that asks for it.

    A cohort's batches are too small to share out, and threads that wait for each other on a busy machine made training
    several times slower; simulated hospitals run side by side as it is. Sums come out in one order on any machine.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
