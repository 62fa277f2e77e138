"""Four models of a group's own: of tables, images, texts and series. Each function gets (form, outputs, settings)."""

import torch
from torch import nn


class Gated(nn.Module):
    """Of a table: one layer says what, another how much of it."""

    def __init__(self, inputs, outputs, width):
        super().__init__()
        self.what, self.much, self.head = nn.Linear(inputs, width), nn.Linear(inputs, width), nn.Linear(width, outputs)

    def forward(self, records):
        return self.head(torch.tanh(self.what(records)) * torch.sigmoid(self.much(records)))


class Tower(nn.Module):
    """Of an image: two convolutions, one added to the other, and the mean over places."""

    def __init__(self, outputs, channels):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, channels, 3, 2, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm, self.head = nn.GroupNorm(2, channels), nn.Linear(channels, outputs)

    def forward(self, images):
        seen = torch.relu(self.first(images))
        return self.head(self.norm(seen + self.second(seen)).mean((2, 3)))


class Notes(nn.Module):
    """Of a text: the mean of its words, and the largest."""

    def __init__(self, tokens, outputs, width):
        super().__init__()
        self.words, self.head = nn.Embedding(tokens, width), nn.Linear(2 * width, outputs)

    def forward(self, tokens):
        shown, words = (tokens > 0)[:, :, None], self.words(tokens)
        mean = (words * shown).sum(1) / shown.sum(1).clamp(min=1)
        return self.head(torch.cat([mean, torch.where(shown, words, -9.0).amax(1)], 1))


class Stays(nn.Module):
    """Of a series: a GRU of torch's, and its last state."""

    def __init__(self, channels, outputs, width):
        super().__init__()
        self.steps, self.head = nn.GRU(channels, width, batch_first=True), nn.Linear(width, outputs)

    def forward(self, series):
        return self.head(self.steps(series)[0][:, -1])


def gated(form, outputs, settings):
    return Gated(form.shape[0], outputs, settings["width"])


def tower(form, outputs, settings):
    return Tower(outputs, settings["channels"])


def notes(form, outputs, settings):
    return Notes(form.tokens, outputs, settings["width"])


def stays(form, outputs, settings):
    return Stays(form.shape[1], outputs, settings["width"])
