"""The ClientApp that Flower's stock SuperNode runs: production's, over the socket of a hospital that runs beside it.

``--node-config 'bridge="/path/to/bridge.sock"'`` tells it where. It reads nothing of the hospital's folder and keeps nothing
between messages.
"""

from __future__ import annotations

import logging
from pathlib import Path

from medfed.flower import hush

# isort: split
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from medfed.client.bridge import NotAnswered, ask
from medfed.client.node import CLIENT_FAILED, make_client_app
from medfed.errors import ConfigError, MedfedError

hush()
log = logging.getLogger("medfed.client.bridge")

BRIDGE = "bridge"
"""The entry of the node's configuration that names the socket."""


class BridgedApp(ClientApp):  # type: ignore[misc]
    """Passes a message's frame on and its reply back.

    Guarantee: of an exception nothing but its class name goes out. Flower itself would send its text.
    """

    def __call__(self, message: Message, context: Context) -> Message:
        try:
            path = _socket(context)
            return make_client_app(lambda frame: ask(path, frame, message.metadata.ttl))(message, context)
        except NotAnswered as error:  # the hospital's own log says more
            reason = str(error)
        except MedfedError as error:
            log.warning("%s", error)
            reason = type(error).__name__
        except Exception as error:
            reason = type(error).__name__
        return Message(Error(CLIENT_FAILED, reason), reply_to=message)


def _socket(context: Context) -> Path:
    path = context.node_config.get(BRIDGE)
    if not isinstance(path, str) or not path:
        raise ConfigError(203, "the SuperNode does not name the hospital's socket", "--node-config 'bridge=\"/PATH\"'")
    return Path(path)


app = BridgedApp()
