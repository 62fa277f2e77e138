"""What the coordinator's child runs in these tests: found through PYTHONPATH, named by reference."""

import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

from medfed.errors import RoundAborted
from medfed.server.exchange import Exchange, Kind, Reply

NEVER = threading.Event()


def until(condition, what: str, seconds: float = 30.0):
    """Poll ``condition`` until it gives something; returns it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        NEVER.wait(0.03)
    raise TimeoutError(what)


def ask(
    exchange: Exchange, payloads: dict[int, bytes], kind: Kind = Kind.TRAIN, timeout_s: float = 20.0
) -> list[Reply]:
    for position, payload in payloads.items():
        exchange.send(position, kind, payload, timeout_s)
    replies: list[Reply] = []
    until(lambda: replies.extend(exchange.receive()) or len(replies) >= len(payloads), "replies")
    return sorted(replies, key=lambda reply: reply.position)


def rounds(exchange: Exchange, config_path: Path) -> None:
    """Ask everybody some times; write what came back and how long each round took."""
    config = json.loads(config_path.read_text())
    everybody = frozenset(range(config["hospitals"]))
    until(lambda: exchange.online() == everybody, "hospitals")
    seconds, answers = [], []
    for number in range(config["rounds"]):
        begin = time.monotonic()
        payload = b"round %d" % number + bytes(config.get("size", 0))
        replies = ask(exchange, dict.fromkeys(everybody, payload))
        seconds.append(time.monotonic() - begin)
        answers.append([[r.position, r.fault or (r.payload or b"")[:40].decode()] for r in replies])
    result = {"seconds": seconds, "answers": answers, "token_in_argv": _token_visible()}
    config_path.with_name("result.json").write_text(json.dumps(result))


def _token_visible() -> bool:
    own = Path(f"/proc/{os.getpid()}")
    return b"token" in (own / "cmdline").read_bytes() or b"admin" in (own / "environ").read_bytes().lower()


def refuse(exchange: Exchange, config_path: Path) -> None:
    raise RoundAborted(190, "attempts are used up", "start a new study")


def stumble(exchange: Exchange, config_path: Path) -> None:
    raise ValueError("patient 17")


def wait_for_ever(exchange: Exchange, config_path: Path) -> None:
    config_path.with_name("pid").write_text(str(os.getpid()))
    NEVER.wait()


def die_once(exchange: Exchange, config_path: Path) -> None:
    marker = config_path.with_name("died")
    if not marker.exists():
        marker.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    rounds(exchange, config_path)


def long_rounds(exchange: Exchange, config_path: Path) -> None:
    """As ``rounds``, with long frames; writes the hashes of what came back."""
    config = json.loads(config_path.read_text())
    everybody = frozenset(range(config["hospitals"]))
    until(lambda: exchange.online() == everybody, "hospitals")
    answers = []
    for number in range(config["rounds"]):
        payload = b"round %d" % number + bytes(config["size"])
        replies = ask(exchange, dict.fromkeys(everybody, payload), timeout_s=60.0)
        answers.append([[r.position, r.fault or hashlib.sha256(r.payload or b"").hexdigest()] for r in replies])
    config_path.with_name("result.json").write_text(json.dumps({"answers": answers}))


def too_long_then_right(exchange: Exchange, config_path: Path) -> None:
    """A frame that the node does not take, then one as long as it may be."""
    size = json.loads(config_path.read_text())["size"]
    until(lambda: 0 in exchange.online(), "hospital")
    exchange.send(0, Kind.QUERY, bytes(size), 20.0)
    exchange.receive()
    (reply,) = ask(exchange, {0: bytes(size - size // 3)}, timeout_s=60.0)
    answer = reply.fault or (reply.payload or b"").decode()
    config_path.with_name("result.json").write_text(json.dumps({"answer": answer}))
