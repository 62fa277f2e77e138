"""A coordinator in a process of its own, to be killed: arguments are folder, port, task."""

import sys
import threading
from pathlib import Path

from medfed.seams import system_seams
from medfed.server.link.serve import ChildTask, serve
from medfed.server.link.superlink import LinkSettings


def main() -> int:
    folder, port, task = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    settings = LinkSettings("127.0.0.1", port, 0, folder / "server.crt", folder / "server.key", folder / "ca.crt")
    keys = [path.read_bytes() for path in sorted(folder.glob("node*.pub"))]
    work = ChildTask(f"medfed_test_tasks:{task}", folder / "config.json")
    return serve(settings, keys, work, system_seams(), threading.Event())


if __name__ == "__main__":
    sys.exit(main())
