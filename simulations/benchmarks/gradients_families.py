"""The models and made-up records that the benchmark of gradients times, and other plain ways to write each model.

Every model takes [n, ...] and gives logits float[n, classes]. Records are noise with random labels: what a step costs does
not depend on whether there is something to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfed.models.convolutional import cnn
from medfed.models.recurrent import Recurrent

PIXELS, SMALL_PIXELS = 64, 28
CHANNELS, HIDDEN = 40, 128
VARIABLES, FEATURES, CATALOGUE_HIDDEN = 37, 5, 32
VOCABULARY, WIDTH, HEADS, LAYERS, TOKENS = 10_000, 128, 4, 4, 128
_GROUPS = 8

Examples = Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
"""(generator, n) -> inputs [n, ...] and labels int64[n], on the CPU."""


@dataclass(frozen=True, slots=True)
class Family:
    """A model to measure. ``variants``: the same model written in other ways, for plain training alone; the fastest of them
    all is what the others are compared with. They need not have the same weights, only the same sizes."""

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator, int], Tensor]
    classes: int
    variants: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)

    def examples(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """``count`` records and their labels."""
        labels = torch.empty(count, dtype=torch.int64).random_(self.classes, generator=generator)
        return self.inputs(generator, count), labels


# ----------------------------------------------------------------------------------------------------------- records


def _numbers(*shape: int) -> Callable[[torch.Generator, int], Tensor]:
    return lambda generator, count: torch.empty(count, *shape).normal_(generator=generator)


def _tokens(generator: torch.Generator, count: int) -> Tensor:
    return torch.empty(count, TOKENS, dtype=torch.int64).random_(VOCABULARY, generator=generator)


def _stays(steps: int) -> Callable[[torch.Generator, int], Tensor]:
    """Series as the catalogue's models take them, without padding: a library's layer, which knows none, does as much work."""

    def draw(generator: torch.Generator, count: int) -> Tensor:
        series = torch.empty(count, steps, 2 * VARIABLES + 1 + FEATURES).normal_(generator=generator)
        series[:, :, VARIABLES : 2 * VARIABLES] = (series[:, :, VARIABLES : 2 * VARIABLES] > 0).float()
        series[:, :, 2 * VARIABLES] = 1.0
        return series

    return draw


# ------------------------------------------------------------------------------------------------------------ images


def _small_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(_GROUPS, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(_GROUPS, 64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * (SMALL_PIXELS // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def _catalogue_cnn() -> nn.Module:
    return _begun(cnn(SMALL_PIXELS, SMALL_PIXELS, 10, [16, 32, 32], first_stride=2, groups=_GROUPS, head="mean"))


class _Residual(nn.Module):
    """Two 3 x 3 convolutions with GroupNorm beside a way past them: [n, i, h, w] -> [n, o, h / stride, w / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(_GROUPS, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(_GROUPS, outputs)
        self.past: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.past = nn.Sequential(projection, nn.GroupNorm(_GROUPS, outputs))

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.first_norm(self.first(images)))
        return functional.relu(self.second_norm(self.second(hidden)) + self.past(images))


def _resnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.GroupNorm(_GROUPS, 32), nn.ReLU()),
        *(_Residual(32, 32, 1), _Residual(32, 32, 1), _Residual(32, 64, 2), _Residual(64, 64, 1)),
        *(_Residual(64, 128, 2), _Residual(128, 128, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
    )


def _channels_last(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same model with filters stored channels last, which its activations then follow from the first layer on."""
    return lambda: build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# ------------------------------------------------------------------------------------------------------------ series


class _LastState(nn.Module):
    """Torch's LSTM or GRU, and a linear layer on its last state: float[n, steps, channels] -> float[n, 2]."""

    def __init__(self, recurrent: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(recurrent.hidden_size, 2)

    def forward(self, series: Tensor) -> Tensor:
        if self.recurrent.batch_first:
            states = self.recurrent(series)[0][:, -1]
        else:
            states = self.recurrent(series.transpose(0, 1))[0][-1]
        logits: Tensor = self.head(states)
        return logits


class _Steps(nn.Module):
    """The same with torch's cells, one step of one layer at a time."""

    def __init__(self, kind: type[nn.LSTMCell] | type[nn.GRUCell], layers: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList([kind(HIDDEN if layer else CHANNELS, HIDDEN) for layer in range(layers)])
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, series: Tensor) -> Tensor:
        states = list(series.unbind(1))
        for cell in self.cells:
            found = None
            for t, inputs in enumerate(states):
                found = cell(inputs, found)
                states[t] = found[0] if isinstance(found, tuple) else found
        logits: Tensor = self.head(states[-1])
        return logits


def _recurrent(kind: type[nn.LSTM] | type[nn.GRU], layers: int, steps: int) -> Family:
    cell: type[nn.LSTMCell] | type[nn.GRUCell] = nn.LSTMCell if issubclass(kind, nn.LSTM) else nn.GRUCell

    def build(*, batch_first: bool = True) -> nn.Module:
        return _LastState(kind(CHANNELS, HIDDEN, layers, batch_first=batch_first))

    variants: dict[str, Callable[[], nn.Module]] = {
        "time_first": lambda: build(batch_first=False),
        "cells": lambda: _Steps(cell, layers),
    }
    return Family(build, _numbers(steps, CHANNELS), 2, variants)


def _catalogue_lstm() -> nn.Module:
    return _begun(Recurrent("lstm", VARIABLES, FEATURES, 2, CATALOGUE_HIDDEN, layers=1, summaries=False))


def _catalogue_lstm_by_torch() -> nn.Module:
    return _LastState(nn.LSTM(2 * VARIABLES + 1 + FEATURES, CATALOGUE_HIDDEN, batch_first=True))


def _begun(model: nn.Module) -> nn.Module:
    """The catalogue's heads begin at zero, where no other layer has a gradient: this one begins away from it."""
    *_, head = (module for module in model.modules() if isinstance(module, nn.Linear))
    nn.init.normal_(head.weight, std=head.in_features**-0.5)
    return model


# ------------------------------------------------------------------------------------------------------------- texts


class _Attention(nn.Module):
    """One encoder layer with its normalisations first, by hand: float[n, tokens, width] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.queries_keys_values, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.queries_keys_values(self.attention_norm(hidden)).unflatten(2, (3, HEADS, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4).unbind(0)
        found = functional.scaled_dot_product_attention(queries, keys, values)
        hidden = hidden + self.out(found.transpose(1, 2).flatten(2))
        result: Tensor = hidden + self.narrow(functional.relu(self.widen(self.norm(hidden))))
        return result


def _torch_attention() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)


class _Encoder(nn.Module):
    """Tokens int64[n, tokens], at learned places, through encoder layers; their mean -> float[n, 2]."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.Sequential(*(layer() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        # of every record its own places: whoever takes gradients record by record sees whose they are
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1).contiguous()
        hidden = self.layers(self.token(tokens) + self.place(places))
        logits: Tensor = self.head(self.norm(hidden).mean(1))
        return logits


# ------------------------------------------------------------------------------------------------------------ tables


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


FAMILIES: dict[str, Family] = {
    "cnn28": Family(
        _small_cnn, _numbers(1, SMALL_PIXELS, SMALL_PIXELS), 10, {"channels_last": _channels_last(_small_cnn)}
    ),
    "cnn28-catalogue": Family(
        _catalogue_cnn, _numbers(1, SMALL_PIXELS, SMALL_PIXELS), 10, {"channels_last": _channels_last(_catalogue_cnn)}
    ),
    "resnet64": Family(_resnet, _numbers(3, PIXELS, PIXELS), 10, {"channels_last": _channels_last(_resnet)}),
    **{
        f"{kind.__name__.lower()}_L{layers}_T{steps}": _recurrent(kind, layers, steps)
        for kind in (nn.LSTM, nn.GRU)
        for steps in (48, 200)
        for layers in (1, 2)
    },
    "lstm-catalogue": Family(_catalogue_lstm, _stays(48), 2, {"torch_lstm": _catalogue_lstm_by_torch}),
    "transformer": Family(
        lambda: _Encoder(_torch_attention), _tokens, 2, {"attention_by_hand": lambda: _Encoder(_Attention)}
    ),
    "mlp": Family(_mlp, _numbers(256), 10),
    "linear": Family(lambda: nn.Linear(512, 10), _numbers(512), 10),
}
QUICK = ("cnn28", "lstm_L1_T48", "gru_L1_T48", "mlp")

TINY = "tiny"
"""Of the tests: through all the code in no time, and in no table."""
_TINY = Family(
    lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)),
    _numbers(6),
    3,
    {"without_bias": lambda: nn.Linear(6, 3, bias=False)},
)


def family(name: str) -> Family:
    """One of ``FAMILIES``, or the tests' own."""
    return _TINY if name == TINY else FAMILIES[name]
