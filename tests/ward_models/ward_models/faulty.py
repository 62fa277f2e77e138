"""Models that must be refused, each for one fault: ``settings = {fault = "..."}``. All are of tables."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional


class Plain(nn.Module):
    """Without a fault; the others change one thing."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.first, self.head = nn.Linear(inputs, 6), nn.Linear(6, outputs)

    def between(self, hidden):
        return hidden

    def forward(self, records):
        return self.head(torch.tanh(self.between(self.first(records))))


class BatchMean(Plain):
    def between(self, hidden):
        return hidden - hidden.mean(0)


class HiddenBatchMean(Plain):
    """Without a gradient that would show it."""

    def between(self, hidden):
        return hidden - hidden.detach().mean(0)


class ByRank(Plain):
    """By a record's rank in the batch."""

    def between(self, hidden):
        return hidden * (1 + hidden[:, :1].argsort(0).argsort(0) / 100)


class ByPlace(Plain):
    def between(self, hidden):
        return hidden * (1 + torch.arange(len(hidden))[:, None] / 100)


class BySize(Plain):
    def between(self, hidden):
        return hidden / (1 + (len(hidden) > 4))


class WhenSpoiled(Plain):
    """One bad record spoils all."""

    def between(self, hidden):
        return hidden * 0 if bool(torch.isnan(hidden).any()) else hidden


class MixedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(0)


class HiddenBackward(Plain):
    """Outputs of each record alone, gradients mixed."""

    def between(self, hidden):
        return MixedBackward.apply(hidden)


class ScaledBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / len(gradient)


class MeanGradient(Plain):
    """As many libraries do: the gradient of a mean over the batch, which clipping then takes for that of a record."""

    def between(self, hidden):
        return ScaledBackward.apply(hidden)


class Chance(Plain):
    def between(self, hidden):
        return hidden + torch.rand(hidden.shape)


class ConstantByChance(Plain):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.constant = float(torch.rand((), device="cpu"))

    def between(self, hidden):
        return hidden + self.constant


class Remembers(Plain):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.counter = itertools.count()

    def between(self, hidden):
        return hidden + next(self.counter) / 10


class Writes(Plain):
    """Moves its own weights while it is asked, by less than its outputs would show at once."""

    def forward(self, records):
        found = super().forward(records)
        with torch.no_grad():
            self.head.bias.mul_(1 + 1e-15).add_(1e-14)
        return found


class Holds(Plain):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.ones(6))

    def between(self, hidden):
        return hidden * self.scale


class Buffer(Plain):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer("seen", torch.zeros(6))


class Tensor(Plain):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.constant = torch.rand(6)


class Hooked(Plain):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.first.register_forward_hook(lambda layer, taken, given: given - given.mean(0))


class Frozen(Plain):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.first.weight.requires_grad_(False)


class Dropping(Plain):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.drop = nn.Dropout(0.5)


class Normed(Plain):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.norm = nn.BatchNorm1d(6)


class Replaced(Plain):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.first.forward = lambda records: functional.linear(records - records.mean(0), self.first.weight)


class Borrows(Plain):
    """Takes a layer's weight without calling the layer: its gradient by record is seen by nobody."""

    def between(self, hidden):
        return hidden + functional.linear(hidden, self.first.weight @ self.first.weight.T)


class Answers(Plain):
    def taped_forward(self, tape, *records):
        return self.forward(records[0])


class Mute(Plain):
    def forward(self, records):
        return super().forward(records) * 0


class Flat(Plain):
    def forward(self, records):
        return super().forward(records).squeeze()


class Raises(Plain):
    def forward(self, records):
        raise RuntimeError("patient 4711 is ill")


class Stepwise(Plain):
    """Takes the first dimension for time."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.steps = nn.GRU(6, 6)


class Endless(Plain):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.head = nn.Linear(6 * 10**9, outputs)


def faulty(form, outputs, settings):
    kinds = {kind.__name__: kind for kind in Plain.__subclasses__()}
    if settings["fault"] == "NoModel":
        return math.pi
    if settings["fault"] == "Sequential":  # no module of its own, and nothing wrong
        return nn.Sequential(nn.Linear(form.shape[0], 4), nn.Tanh(), nn.Linear(4, outputs))
    return kinds.get(settings["fault"], Plain)(form.shape[0], outputs)
