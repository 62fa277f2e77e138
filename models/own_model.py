"""Where medfed and a package with own models meet: what it is told of the records, and what its model is wrapped in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from medfed.data_contract import DataContract


@dataclass(frozen=True, slots=True)
class RecordForm:
    """``kind``: as ``DataContract.kind``. ``shape``: of one record, without the batch. ``tokens``: of texts and events, how many
    different numbers there are, 0 for padding among them: such records are int64[n, *shape], all others float32[n, *shape]."""

    kind: str
    shape: tuple[int, ...]
    tokens: int | None

    @classmethod
    def of(cls, data: DataContract) -> RecordForm:
        """The form of a study's records."""
        tokens = None if data.text is None else data.text.buckets + 1
        return cls(data.kind, tuple(data.shape), tokens if data.events is None else data.events.tokens)


class OwnModel(nn.Module):
    """A model of a hospital group's own: records [n, *shape] -> float[n, outputs], as the package's model says.

    ``known``: the types of its layers that were looked over when it was made; ``separability`` lets these pass, and no others.
    """

    def __init__(self, own: nn.Module, known: frozenset[type[nn.Module]]) -> None:
        super().__init__()
        self.own = own
        self.known = known

    def forward(self, records: Tensor) -> Tensor:
        result: Tensor = self.own(records)
        return result
