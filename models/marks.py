"""What a safetensors file must not be mistaken for, in its own header: it stays when the file is copied or renamed."""

from __future__ import annotations

import json

from medfed.errors import ConfigError, PrivacyError

_MARK = "medfed-stamps"
_LONGEST = 200


def marked(data: bytes, stamps: tuple[str, ...]) -> bytes:
    """A safetensors file with ``stamps`` in its header; its tensors are the same."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = {_MARK: json.dumps(list(stamps))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at whole words
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def marks(data: bytes) -> tuple[str, ...]:
    """The stamps of a safetensors file that was opened before; () of one without. Raises ``ConfigError`` MF-151 for a mark that
    is no list of texts."""
    size = int.from_bytes(data[:8], "little")
    try:
        found = json.loads(json.loads(data[8 : 8 + size]).get("__metadata__", {}).get(_MARK, "[]"))
    except (ValueError, TypeError, AttributeError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(stamp, str) for stamp in found):
        raise ConfigError(151, "the model file's header is not as medfed writes it", "ask for the run's files anew")
    return tuple(stamp[:_LONGEST] for stamp in found)


def refuse_local(data: bytes) -> None:
    """Raise ``PrivacyError`` MF-195 for the file of a model that a hospital fine-tuned without privacy for itself.

    ``data``: a safetensors file that was opened before.
    """
    if marks(data):
        what = "this model was trained at one hospital without privacy, for its own use"
        raise PrivacyError(195, what, "begin with the model that the federation released")
