"""Every error of medfed: a code, one clear line, a remedy, an exit status.

    MedfedError                     anything medfed says on purpose
    ├── ConfigError                 a file, argument or study that cannot be used as written
    ├── DataError                   patients' records that do not fit the study's data contract
    ├── PrivacyError                a guarantee would be broken
    │   ├── BudgetExhausted         epsilon or attempts are spent
    │   └── UnsupportedModel        a model or loss that cannot be clipped by patient
    ├── ProtocolError               a rule of the federation was broken
    │   ├── LocalProtocolError      by our own code: misuse
    │   └── RemoteProtocolError     by the other side: refused, state unchanged
    ├── RoundAborted                this attempt is lost; the next may work (retried)
    ├── TransportError              the other side cannot be reached (retried)
    └── EnvironmentFault            the machine: disk, keys, certificates

A message never holds patients' data, weights or keys. ``EXIT_STATUS`` documents the code and the exit status of each.
"""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit status of the three commands."""

    HANDLED = 0
    USAGE = 2
    POLICY = 3
    INTEGRITY = 4
    BUDGET = 5
    ENVIRONMENT = 6
    INTERRUPTED = 130


_U, _P, _I, _B, _E = (
    ExitStatus.USAGE,
    ExitStatus.POLICY,
    ExitStatus.INTEGRITY,
    ExitStatus.BUDGET,
    ExitStatus.ENVIRONMENT,
)

EXIT_STATUS: dict[int, tuple[ExitStatus, str]] = {
    100: (_U, "command line not understood"),
    101: (_I, "message length invalid"),
    102: (_I, "protocol version not supported"),
    103: (_I, "message malformed"),
    104: (_I, "message of an unexpected kind or at an unexpected time"),
    110: (_I, "signature does not verify"),
    111: (_I, "signer not in the roster"),
    112: (_I, "nonce or study of a message does not match"),
    120: (_P, "study expired"),
    123: (_P, "study not approved by this hospital"),
    124: (_P, "study changed after approval, or its attachments do not match their hashes"),
    125: (_P, "study already approved, closed or withdrawn"),
    130: (_P, "noise multiplier outside the hospital's policy"),
    131: (_P, "delta outside the hospital's policy"),
    132: (_P, "sampling rate, rounds or attempts outside the hospital's policy"),
    133: (_P, "a study must not set randomness"),
    134: (_P, "mode, privacy unit or record cap not allowed by the hospital's policy"),
    135: (_P, "the study states a smaller epsilon than its parameters give"),
    140: (_P, "too few hospitals"),
    141: (_P, "too few colluders allowed for, or too many for the cohort"),
    142: (_P, "more drop-outs than hospitals and colluders allow"),
    143: (_P, "a hospital is listed twice"),
    144: (_P, "this hospital's entry in the roster is missing or not its own"),
    145: (_P, "the masked sum could overflow"),
    147: (_P, "more unconfirmed hospitals than colluders allowed for"),
    148: (_P, "a hospital in the roster contradicts its confirmed enrolment document"),
    149: (_P, "the roster's coordinator is not the one this hospital confirmed"),
    150: (_I, "model state is not the one this hospital computed"),
    151: (_P, "only safetensors files are accepted as models"),
    152: (_I, "model file malformed"),
    153: (_I, "weights not finite"),
    155: (_I, "too few signatures over a model state"),
    160: (_P, "model, loss, sampling or augmentation couples patients"),
    161: (_P, "package of an own model missing, refused, or not the one that the study names"),
    162: (_P, "code of an own model's package fails, or makes no model"),
    170: (_I, "a peer's key is refused"),
    174: (_I, "own offer missing or changed"),
    180: (_I, "masked vector malformed"),
    181: (_I, "attempt already used"),
    182: (_I, "wrong round, attempt or session"),
    183: (_I, "the same slot was filled with different bytes"),
    184: (_I, "vector not finite"),
    185: (_I, "survivor set invalid"),
    186: (_I, "votes do not certify the survivor set"),
    187: (_I, "share, box or commitment does not verify"),
    190: (_E, "attempts are used up; the last good model is kept"),
    191: (_E, "deadline passed; the last good model is kept"),
    192: (_P, "a hospital refuses to take part"),
    193: (_I, "hospitals do not agree on the final model or its privacy statement"),
    194: (_I, "a run's privacy statement, journal or model does not verify"),
    195: (_P, "a model that one hospital made for itself would be passed on"),
    201: (_U, "file is not valid TOML or JSON"),
    202: (_U, "unknown key"),
    203: (_U, "value missing, of the wrong type or out of range"),
    204: (_P, "path refused"),
    210: (_E, "key file can be read by others"),
    211: (_E, "key or certificate file not usable"),
    212: (_U, "refusing to overwrite what is there"),
    301: (_U, "records do not fit the data contract"),
    310: (_P, "data do not meet the study's minimum"),
    320: (_U, "data set, or the library that reads it, not available"),
    321: (_I, "downloaded file is not the one that is known"),
    340: (_I, "patients differ from the snapshot made at approval"),
    401: (_I, "ledger not found"),
    402: (_I, "ledger truncated"),
    403: (_I, "ledger row altered"),
    404: (_I, "ledger chain broken"),
    405: (_I, "ledger older than others saw it, or a second copy: locked until the newest one is restored"),
    406: (_I, "ledger written by another version"),
    501: (_B, "epsilon would exceed the hospital's cap"),
    502: (_B, "the study's attempts are used up"),
    601: (_E, "ledger volume not safe"),
    602: (_E, "volume is read-only"),
    603: (_E, "disk full"),
    605: (_E, "clock went back"),
    606: (_E, "file not found"),
    607: (_E, "no permission"),
    608: (_E, "input/output error"),
    609: (_U, "file too large"),
    610: (_E, "coordinator unreachable"),
    611: (_E, "host name not found"),
    612: (_E, "certificate expired, of a wrong name or of an unknown authority"),
    613: (_E, "proxy not usable"),
    614: (_E, "port not available"),
    615: (_I, "the coordinator's guard is not closed"),
    616: (_P, "node key not known to the coordinator"),
    617: (_I, "redirect refused"),
    618: (_E, "Unix socket of a hospital (control or bridge) not usable"),
    620: (_I, "identity already active"),
    621: (_E, "Flower of another version"),
    630: (_E, "device missing or out of memory"),
    701: (_P, "only in medfed-simulate"),
    710: (_I, "an audit found a promise of privacy broken"),
    711: (_I, "an audit has lost its power: it would not notice a broken promise"),
    900: (_I, "internal error"),
}


class MedfedError(Exception):
    """One line a person can act on: ``MF-501 epsilon 8.20 would exceed the cap 8.00: raise the cap or stop``."""

    def __init__(self, code: int, what: str, remedy: str) -> None:
        super().__init__(f"MF-{code} {what}: {remedy}")
        self.code = code
        self.what = what
        self.remedy = remedy

    @property
    def exit_status(self) -> ExitStatus:
        return EXIT_STATUS[self.code][0]


class ConfigError(MedfedError):
    """A file, argument or study that cannot be used as written."""


class DataError(MedfedError):
    """Patients' records that do not fit; names rows and columns, never values."""


class PrivacyError(MedfedError):
    """A guarantee would be broken."""


class BudgetExhausted(PrivacyError):
    """Epsilon or attempts are spent."""


class UnsupportedModel(PrivacyError):
    """A model or loss that cannot be clipped by patient."""


class ProtocolError(MedfedError):
    """A rule of the federation was broken."""


class LocalProtocolError(ProtocolError):
    """By our own code."""


class RemoteProtocolError(ProtocolError):
    """By the other side; the message is refused and the state is as before."""


class RoundAborted(MedfedError):
    """This attempt is lost; the next may work."""


class TransportError(MedfedError):
    """The other side cannot be reached."""


class EnvironmentFault(MedfedError):
    """The machine: disk, keys, certificates, ports."""
