"""The self-test of fixed batches: it passes what keeps records apart, and sees every way in which slots can differ."""

import pytest
import torch
from torch import Tensor, nn

from medfed.errors import UnsupportedModel
from medfed.models import convolutional, recurrent, transformer
from medfed.models.rowwise import RowLinear
from medfed.privacy.gradients import slot_test
from medfed.privacy.gradients.slot_test import settle_batch

CPU = torch.device("cpu")


def losses(logits, labels):
    return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")


def rows(width):
    def examples(generator, count):
        return torch.randn(count, width, generator=generator), torch.randint(2, (count,), generator=generator)

    return examples


def settled(model, examples):
    torch.manual_seed(0)
    return settle_batch(model, losses, examples, device=CPU)


def test_slots_of_row_by_row_sums_are_alike():
    assert settled(nn.Sequential(RowLinear(9, 5), nn.ReLU(), RowLinear(5, 1)), rows(9)) == 64


@pytest.mark.parametrize(
    ("most", "size"), [({64: 64 * 40, 32: 0}, 64), ({64: 64 * 39, 32: 32 * 40}, 32), ({64: 9, 32: 9}, 1)]
)
def test_batch_stays_within_the_memory_for_gradients(monkeypatch, most, size):
    monkeypatch.setattr(slot_test, "_GRADIENT_BYTES", most)
    assert settled(RowLinear(9, 1), rows(9)) == size, "the model has 10 weights of 4 bytes"


class OtherOrderInOneSlot(nn.Module):
    """Adds up from the other end in the last slot: differs by rounding alone."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(9, 6), nn.Linear(6, 1)

    def forward(self, inputs):
        return self.last(torch.tanh(_Reordered.apply(self.inner(inputs), inputs)))


class _Reordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, inputs: Tensor) -> Tensor:
        hidden = hidden.clone()
        if len(hidden) > 1:
            hidden[-1] = torch.nextafter(hidden[-1], torch.tensor(9.0))
        return hidden

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


class SeesItsNeighbor(OtherOrderInOneSlot):
    """The last place depends on who stands in the slot before."""

    def forward(self, inputs):
        hidden = self.inner(inputs)
        seen = (inputs.detach().roll(1, 0).sum(1, keepdim=True) > 0) & (len(inputs) > 1)
        return self.last(torch.tanh(torch.where(seen, hidden * (1 + 2**-23), hidden)))


class SpoiltByItsNeighbor(OtherOrderInOneSlot):
    """0 times not-a-number: harmless beside every finite record."""

    def forward(self, inputs):
        others = inputs.detach().sum(0, keepdim=True) if len(inputs) > 1 else 0.0
        return self.last(torch.tanh(self.inner(inputs + 0.0 * others)))


@pytest.mark.parametrize("kind", [OtherOrderInOneSlot, SeesItsNeighbor, SpoiltByItsNeighbor])
def test_slots_that_differ_are_seen(kind):
    assert settled(kind(), rows(9)) == 1


def test_batch_that_fails_is_halved():
    class WideOnly(OtherOrderInOneSlot):
        def forward(self, inputs):
            hidden = self.inner(inputs) if len(inputs) <= 32 else _Reordered.apply(self.inner(inputs), inputs)
            return self.last(hidden)

    class Rowwise(WideOnly):
        def __init__(self):
            nn.Module.__init__(self)
            self.inner, self.last = RowLinear(9, 6), RowLinear(6, 1)

    assert settled(Rowwise(), rows(9)) == 32


def test_torch_s_own_vectorised_and_scalar_paths_are_told_apart(monkeypatch):
    """Of 2 x 24 values the first 32 fill vector registers, the other 16 are computed by other code: not 64 x anything."""
    alone = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    together = torch.sigmoid(alone)
    if torch.equal(torch.stack([torch.sigmoid(value) for value in alone]), together):
        pytest.skip("this machine's torch has one path only")

    class Curved(nn.Sequential):
        def __init__(self):
            super().__init__(RowLinear(24, 24), nn.Sigmoid(), RowLinear(24, 1))

    assert settled(Curved(), rows(24)) == 64
    monkeypatch.setattr(slot_test, "_SIZES", (2,))
    monkeypatch.setattr(slot_test, "_GRADIENT_BYTES", {2: 1 << 28})
    assert settled(Curved(), rows(24)) == 1


def test_gradients_that_are_all_zero_prove_nothing():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = RowLinear(9, 1)

        def forward(self, inputs):
            return self.layer(inputs) * 0.0

    assert settled(Silent(), rows(9)) == 1


class Borrowed(nn.Module):
    """Uses a layer's weight behind its back."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(9, 1)

    def forward(self, inputs):
        return self.layer(inputs) + (inputs**2) @ self.layer.weight.T


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(9, 1)
        self.register_buffer("total", torch.zeros(9))

    def forward(self, inputs):
        self.total += inputs.detach().sum(0)
        return self.layer(inputs)


@pytest.mark.parametrize("kind", [Borrowed, Counting])
def test_model_that_couples_records_is_refused(kind):
    with pytest.raises(UnsupportedModel, match="MF-160"):
        settled(kind(), rows(9))


DEEP = {
    "cnn": (
        lambda: convolutional.cnn(28, 28, 1, [16, 32, 32], 2, 4, "mean"),
        lambda generator, count: (torch.randn(count, 1, 28, 28, generator=generator), torch.arange(count) % 2),
    ),
    "lstm": (
        lambda: recurrent.Recurrent("lstm", 7, 2, 1, 16, 1, True),
        lambda generator, count: (torch.randn(count, 12, 17, generator=generator), torch.arange(count) % 2),
    ),
    "transformer": (
        lambda: transformer.TextTransformer(256, 1, 32, 2, 1, 32),
        lambda generator, count: (torch.randint(257, (count, 24), generator=generator) % 256, torch.arange(count) % 2),
    ),
}


@pytest.mark.parametrize("family", DEEP)
def test_models_of_the_catalogue_settle_without_refusal(family):
    make, examples = DEEP[family]
    assert settled(make(), examples) in (1, 32, 64)


@pytest.mark.parametrize(("width", "size"), [(64, 64), (1024, 32), (4096, 1)])
def test_batch_of_the_gradient_engine_stays_within_the_memory_for_gradients(width, size):
    """Over steps a gradient is held in full: 0.03, 4 and 64 MiB a record."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(width, width // 2, bias=False), nn.Linear(width // 2, 1)
            if width > 64:
                self.more = nn.Linear(width // 2, width, bias=False)

        def forward(self, inputs):
            hidden = self.inner(inputs)
            if width > 64:
                hidden = hidden + self.more(hidden)[..., : width // 2]
            return self.last(torch.tanh(hidden).mean(1))

    def examples(generator, count):
        return torch.randn(count, 2, width, generator=generator), torch.randint(2, (count,), generator=generator)

    assert slot_test.settle_taped_batch(Steps(), losses, examples, device=CPU) == size
