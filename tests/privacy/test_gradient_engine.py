"""The gradient engine against a float64 loop of one record at a time, for every layer and every model of the catalogue."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from medfed.errors import LocalProtocolError, UnsupportedModel
from medfed.models import convolutional, recurrent, tabular, transformer
from medfed.privacy.gradients import engine, patient_tape
from medfed.privacy.gradients.engine import CLIPPING_MARGIN, Engine, clipped_sum
from medfed.privacy.gradients.fixed_batches import steady_arithmetic
from medfed.privacy.gradients.layers import without_rule
from medfed.privacy.gradients.opacus_engine import clipped_sum as by_opacus
from medfed.privacy.gradients.patient_tape import Products
from medfed.privacy.gradients.taped_model import TapedModel

RECORDS = 70
CPU = torch.device("cpu")


def losses(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


class Mean(nn.Module):
    """Over places or steps, after moving them to the end."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, inputs):
        return inputs.mean(self.dim)


class First(nn.Module):
    """The output of a recurrent layer: mean over steps, or all."""

    def __init__(self, layer, mean=True):
        super().__init__()
        self.layer, self.mean = layer, mean

    def forward(self, inputs):
        states = self.layer(inputs)[0]
        return states.mean(1) if self.mean else states


class Tokens(nn.Module):
    """Token and place embeddings, a Transformer layer of torch's, a head."""

    def __init__(self, layer=None, decoder=False):
        super().__init__()
        self.token, self.place = nn.Embedding(20, 8, padding_idx=0), nn.Embedding(12, 8)
        self.layer, self.norm, self.head = layer, nn.LayerNorm(8), nn.Linear(8, 3)
        self.decoder = decoder

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        seen = self.token(tokens) + self.place(places)
        if self.decoder:
            causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
            seen = self.layer(seen[:, :4], seen[:, 4:], tgt_mask=causal)
        elif self.layer is not None:
            seen = self.layer(seen, src_key_padding_mask=(tokens == 0) & (places > 0))
        return self.head(self.norm(seen).mean(1))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(inputs)))))


class TiedTokens(nn.Module):
    """A table of words that is also the last layer's weight."""

    def __init__(self):
        super().__init__()
        self.token, self.inner, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.out.weight = self.token.weight

    def forward(self, tokens):
        return self.out(torch.tanh(self.inner(self.token(tokens).mean(1))))[:, :3]


def encoder(**settings):
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **settings)


def numbers(*shape):
    return lambda: torch.randn(RECORDS, *shape)


def tokens():
    drawn = torch.randint(1, 20, (RECORDS, 12))
    drawn[torch.arange(12) >= torch.randint(2, 13, (RECORDS, 1))] = 0
    return drawn


def series():
    found = torch.randn(RECORDS, 6, 9)
    found[:, :, 6] = (torch.arange(6) < torch.randint(1, 7, (RECORDS, 1))).float()
    return found


LAYERS = {
    "linear": (lambda: nn.Linear(6, 3), numbers(6)),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Linear(9, 3)), numbers(6)),
    "linear over steps": (lambda: nn.Sequential(nn.Linear(6, 40), nn.Tanh(), Mean(1), nn.Linear(40, 3)), numbers(5, 6)),
    "linear over few steps": (
        lambda: nn.Sequential(nn.Linear(6, 70), nn.Tanh(), nn.Linear(70, 70), nn.Tanh(), Mean(1), nn.Linear(70, 3)),
        numbers(3, 6),
    ),
    "linear over places": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Mean((1, 2)), nn.Linear(8, 3)),
        numbers(2, 3, 6),
    ),
    "embedding": (lambda: Tokens(), tokens),
    "tied embedding": (TiedTokens, tokens),
    "layer used twice": (Twice, numbers(6)),
    "encoder layer": (lambda: Tokens(encoder(norm_first=True)), tokens),
    "encoder layer, norm last": (lambda: Tokens(encoder(activation="gelu", bias=False)), tokens),
    "decoder layer": (
        lambda: Tokens(nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True), decoder=True),
        tokens,
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.ReLU(), Mean(2), nn.Linear(4, 3)),
        numbers(3, 9),
    ),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, 1, 1, groups=2),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Conv2d(4, 6, (2, 3), 2, dilation=(2, 1)),
            Mean((2, 3)),
            nn.Linear(6, 3),
        ),
        numbers(2, 7, 6),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 4, 3, padding="same"), nn.Tanh(), Mean((2, 3, 4)), nn.Linear(4, 3)),
        numbers(1, 4, 5, 3),
    ),
    "rms norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 3)), numbers(6)),
    "torch lstm": (
        lambda: nn.Sequential(First(nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True)), nn.Linear(10, 3)),
        numbers(7, 4),
    ),
    "torch gru": (
        lambda: nn.Sequential(First(nn.GRU(4, 5, 2, batch_first=True, bidirectional=True)), nn.Linear(10, 3)),
        numbers(7, 4),
    ),
}
CATALOGUE = {
    "logistic regression": (lambda: tabular.logistic_regression(6, 3), numbers(6)),
    "mlp": (lambda: tabular.mlp(6, 3, [5, 4]), numbers(6)),
    "cnn, mean": (lambda: convolutional.cnn(9, 8, 3, [4, 8], 2, 2, "mean"), numbers(1, 9, 8)),
    "cnn, places": (lambda: convolutional.cnn(9, 8, 3, [4, 8], 1, 2, "places"), numbers(1, 9, 8)),
    "lstm": (lambda: recurrent.Recurrent("lstm", 3, 2, 3, 5, 2, True), series),
    "gru": (lambda: recurrent.Recurrent("gru", 3, 2, 3, 5, 2, False), series),
    "transformer of texts": (lambda: transformer.TextTransformer(20, 3, 8, 2, 1, 12), tokens),
    "transformer of series": (lambda: transformer.SeriesTransformer(9, 6, 3, 8, 2, 1, 12), series),
}
FAMILIES = LAYERS | CATALOGUE


def make(family):
    """model at random weights, inputs, labels of 70 records."""
    torch.manual_seed(3)
    build, draw = FAMILIES[family]
    model, inputs = build(), draw()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape)
    return model, inputs, torch.randint(0, 3, (RECORDS,))


def owners():
    """Patient 1 has far more records than a batch of 8 holds, the others one to a few; those of one patient together."""
    generator = np.random.default_rng(9)
    return np.sort(np.where(generator.random(RECORDS) < 0.4, 1, generator.integers(2, 25, RECORDS))).astype(np.int64)


@functools.cache
def gradients_one_by_one(family):
    """Of each record by a float64 loop of one at a time, without any engine: float64[70, d]."""
    return of_each(*make(family))


def of_each(model, inputs, labels):
    double = copy.deepcopy(model).double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    weights, each = [weight for weight in double.parameters() if weight.requires_grad], []
    for row in range(len(inputs)):
        loss = losses(double(inputs[row : row + 1]), labels[row : row + 1])[0]
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        parts = [torch.zeros_like(w) if part is None else part for part, w in zip(found, weights, strict=True)]
        each.append(torch.cat([part.flatten() for part in parts]).detach().numpy())
    return np.array(each)


def means(each, patients):
    """The mean gradient of each patient: float64[patients, d]."""
    return np.array([each[patients == patient].mean(0) for patient in dict.fromkeys(patients.tolist())])


def clipped(means, clipping_norm):
    norms = np.linalg.norm(means, axis=1)
    return (means * np.minimum(1.0, clipping_norm / norms)[:, None]).sum(0)


def summed(model, inputs, labels, patients, clipping_norm, batch=8, chosen=None, **settings):
    chosen = np.arange(len(patients)) if chosen is None else chosen
    bound = clipping_norm * (1 + CLIPPING_MARGIN)
    return clipped_sum(model, losses, inputs, labels, patients, chosen, bound, batch=batch, device=CPU, **settings)


def relative(first, second):
    return np.linalg.norm(first - second) / np.linalg.norm(second)


@pytest.mark.parametrize("family", FAMILIES)
def test_sum_equals_float64_loop_of_one_record(family):
    """Patients as they come, one record each; and with up to thirty records, in batches of all sizes."""
    model, inputs, labels = make(family)
    for patients in (np.arange(RECORDS), owners()):
        gradients = means(gradients_one_by_one(family), patients)
        norms = np.linalg.norm(gradients, axis=1)
        bound = float(np.median(norms)) * 1.01
        expected = clipped(gradients, bound)
        for batch in (1, 8, 64):
            found = summed(model, inputs, labels, patients, bound, batch)
            assert found.total.dtype == np.float64
            assert relative(found.total, expected) < 1e-5
            assert found.statistics.patients == len(gradients)
            assert found.statistics.clipped == (norms > bound).sum()
        # the control: a clipping norm 5 % off is seen
        assert relative(clipped(gradients, bound * 1.05), expected) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_patients_equal_float64_ones(family):
    model, inputs, labels = make(family)
    taped = TapedModel(model, losses, CPU)
    found = taped.slots(inputs[:64], labels[:64]).squared_norms.sqrt().numpy()
    np.testing.assert_allclose(found, np.linalg.norm(gradients_one_by_one(family)[:64], axis=1), rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_record_of_one_patient_leaves_every_other_factor_and_gradient_bit_equal(family):
    """By that alone a patient moves only what is its own."""
    model, inputs, labels = make(family)
    taped = TapedModel(model, losses, CPU)
    before = taped.slots(inputs[:64], labels[:64]).copy()
    changed = inputs.clone()
    changed[17] = inputs[69]
    after = taped.slots(changed[:64], labels[:64])
    same = torch.arange(64)
    same[17] = -1
    assert after.same_bits(before, same)
    assert after.squared_norms[17] != before.squared_norms[17]


AGREEING = ["linear over steps", "embedding", "conv1d", "conv3d", "cnn, mean", "lstm", "transformer of texts"]


@pytest.mark.parametrize("family", AGREEING)
def test_opacus_finds_the_same_sum(family):
    model, inputs, labels = make(family)
    patients = owners()
    ours = summed(model, inputs, labels, patients, 0.3).total
    theirs = by_opacus(model, losses, inputs, labels, patients, 25, 0.3 * (1 + 1e-4))
    assert relative(ours, theirs) < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    records=st.integers(0, 21),
    spread=st.integers(1, 21),
    batch=st.sampled_from([1, 4, 16]),
    family=st.sampled_from(["linear over steps", "tied embedding", "cnn, mean", "lstm", "encoder layer", "mlp"]),
    seed=st.integers(0, 99),
)
def test_any_number_of_records_and_patients_is_summed_exactly(records, spread, batch, family, seed):
    model, inputs, labels = make(family)
    patients = np.sort(np.random.default_rng(seed).integers(0, spread, records)).astype(np.int64)
    found = summed(model, inputs[:records], labels[:records], patients, 0.2, batch)
    if not records:
        assert not found.total.any() and found.statistics.batches == 0
        return
    expected = clipped(means(gradients_one_by_one(family)[:records], patients), 0.2)
    assert np.linalg.norm(found.total - expected) <= 1e-5 * 0.2 * len(set(patients.tolist()))


def test_nobody_chosen_gives_zeros():
    model, inputs, labels = make("cnn, mean")
    found = summed(model, inputs, labels, owners(), 0.2, chosen=np.zeros(0, np.int64))
    assert found.total.shape == (sum(weight.numel() for weight in model.parameters()),)
    assert not found.total.any()


def test_order_of_patients_and_of_chosen_rows_changes_nothing_but_rounding():
    model, inputs, labels = make("cnn, mean")
    patients = owners()
    turns = np.random.default_rng(1).permutation(25)[patients]
    chosen = np.lexsort((patients, turns))[5:]
    chosen = chosen[np.argsort(turns[chosen], kind="stable")]
    shuffled = summed(model, inputs, labels, patients, 0.3, chosen=chosen).total
    straight = summed(model, inputs, labels, patients, 0.3, chosen=np.sort(chosen)).total
    assert relative(shuffled, straight) < 1e-6


@pytest.mark.parametrize("family", ["cnn, mean", "embedding", "lstm", "linear over few steps"])
def test_sums_of_many_hospitals_in_one_call_are_those_of_each(family):
    model, inputs, labels = make(family)
    sizes = [0, 3, 1, 25, 0, 30, 11]
    segments = np.repeat(np.arange(7), sizes)
    patients = np.arange(RECORDS) // 2  # of two records each, some cut apart by a hospital's end: two patients then
    patients = patients + 100 * segments
    together, statistics = Engine(model, losses, CPU).clipped_sums(
        inputs, labels, patients, np.arange(RECORDS), segments, 7, 0.3, batch=8
    )
    ends = np.cumsum(sizes)
    for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        rows = np.arange(end - size, end)
        alone = clipped_sum(model, losses, inputs, labels, patients, rows, 0.3, batch=8, device=CPU)
        np.testing.assert_allclose(together[number], alone.total, atol=1e-6)
    assert statistics.patients == len(set(patients.tolist()))


def test_frozen_parameters_are_left_out():
    model, inputs, labels = make("cnn, mean")
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    expected = clipped(of_each(model, inputs, labels), 0.2)
    assert relative(summed(model, inputs, labels, np.arange(RECORDS), 0.2).total, expected) < 1e-5


@pytest.mark.parametrize(
    "family", ["linear", "linear over few steps", "cnn, places", "lstm", "transformer of series", "rms norm"]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_patient_that_is_not_finite_contributes_zero(family, bad):
    model, inputs, labels = make(family)
    spoiled = inputs.clone()
    spoiled[5] = bad
    patients = owners()
    others = patients != patients[5]
    found = summed(model, spoiled, labels, patients, 0.3)
    expected = summed(model, inputs[others], labels[others], patients[others], 0.3)
    limit = 0.3 * (1 + 1e-6) if bad == 1e38 else 1e-6  # a huge record may still have a gradient: then it is clipped
    assert np.isfinite(found.total).all()
    assert np.linalg.norm(found.total - expected.total) <= limit


def test_model_is_left_as_it_was():
    model, inputs, labels = make("transformer of texts")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    summed(model, inputs, labels, owners(), 0.3)
    assert not model.training and all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["linear over steps", "conv2d", "encoder layer", "embedding", "lstm", "cnn, mean"])
def test_bfloat16_keeps_norms_and_sums_wide(family):
    """The gradient is bfloat16's; that it is clipped exactly shows where every patient is: the sum of one is of length C."""
    model, inputs, labels = make(family)
    patients = np.arange(RECORDS)
    wide = summed(model, inputs, labels, patients, 0.2).total
    short = summed(model, inputs, labels, patients, 0.2, dtype=torch.bfloat16).total
    assert 0 < relative(short, wide) < 0.05
    alone = summed(model, inputs[:1], labels[:1], patients[:1], 1e-3, dtype=torch.bfloat16).total
    assert np.linalg.norm(alone) == pytest.approx(1e-3, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- refusals


class Free(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head(inputs * self.scale)


class Elsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head(self.inner(inputs) @ self.inner.weight)


class WithoutBatch(nn.Module):
    """The places' embedding is looked up once for all records, whose gradients it then adds up unseen."""

    def __init__(self):
        super().__init__()
        self.place, self.head = nn.Embedding(5, 6), nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head((inputs + self.place(torch.arange(5))).mean(1))


@pytest.mark.parametrize(
    ("model", "shape", "name"),
    [
        (Free(), (6,), "the model: Free has no rule"),
        (nn.Sequential(nn.Linear(6, 3), nn.Bilinear(3, 3, 3)), (6,), "1: Bilinear has no rule"),
        (nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), (6,), "1: BatchNorm1d mixes patients"),
        (Elsewhere(), (6,), "inner.weight is used outside its layer"),
        (WithoutBatch(), (5, 6), "sees 5 records of 8"),
        (nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)), (6,), "Dropout with p = 0.5"),
        (nn.Embedding(5, 3, max_norm=1.0), (), "max_norm"),
        (Tokens(nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)), (), "dropout"),
        (nn.LSTM(6, 3, proj_size=2), (5, 6), "proj_size"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(model, shape, name):
    inputs = torch.randn(8, *shape) if shape else torch.randint(0, 5, (8, 4))
    with pytest.raises(UnsupportedModel, match=f"MF-160 .*{name}"):
        clipped_sum(
            model,
            losses,
            inputs,
            torch.zeros(8, dtype=torch.int64),
            np.arange(8),
            np.arange(8),
            1.0,
            batch=8,
            device=CPU,
        )


def test_layers_without_a_rule_are_named_for_the_way_through_opacus():
    assert without_rule(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Bilinear(2, 2, 2))) == "2: Bilinear"
    assert without_rule(Free()) == "the model: Free"
    assert all(without_rule(build()) is None for build, _ in FAMILIES.values())


def test_loss_of_the_whole_batch_is_refused():
    model, inputs, labels = make("linear")
    with pytest.raises(UnsupportedModel, match="the loss has shape"):
        clipped_sum(model, F.cross_entropy, inputs, labels, np.arange(RECORDS), np.arange(8), 1.0, batch=8, device=CPU)


@pytest.mark.parametrize("clipping_norm", [0.0, -1.0, 1e-7, float("nan"), float("inf")])
def test_clipping_norm_that_is_none_is_refused(clipping_norm):
    model, inputs, labels = make("linear")
    with pytest.raises(LocalProtocolError, match="MF-180"):
        summed(model, inputs, labels, np.arange(RECORDS), clipping_norm)


# --------------------------------------------------------------------------------- weights and records chosen to break C


def one_patient(case):
    """(model, inputs) of a patient whose gradient is large while the numbers it is made of have no squares in float32, or
    cancel: found by a hostile review of an engine that took norms from Gram matrices."""
    inner, head = nn.Linear(64, 64), nn.Linear(8 * 64, 2)
    inputs, slope = torch.zeros(1, 8, 64), torch.zeros(8, 64)
    if case == "inputs without squares":
        inputs[0, 0], slope[0], slope[1] = 1e-19, 1e18, -1e18
    elif case == "gradients without squares":
        inputs[0, 0], slope[0], slope[1] = 1e18, 2e-19, 1e-3
    elif case == "terms that overflow":
        inputs[0, 0], inputs[0, 1], slope[0], slope[1] = 1.2e19, -1.2e19, 1.0, 1.0 + 1e-4
    else:
        inputs[0, :2], slope[0], slope[1] = 1e6, 1.0, -1.0 - 2**-20
    with torch.no_grad():
        for parameter in (*inner.parameters(), *head.parameters()):
            parameter.zero_()
        head.weight[1] = slope.flatten()
    for parameter in head.parameters():
        parameter.requires_grad_(False)
    return nn.Sequential(inner, nn.Flatten(), head), inputs


CHOSEN = ["inputs without squares", "gradients without squares", "terms that overflow", "terms that cancel"]


@pytest.mark.parametrize("case", CHOSEN)
def test_patient_of_many_steps_moves_the_sum_by_at_most_c_whatever_the_numbers(case):
    model, inputs = one_patient(case)
    none = torch.zeros(1, dtype=torch.int64)
    for bound in (1.0, 0.01):
        found = clipped_sum(model, losses, inputs, none, none.numpy(), none.numpy(), bound, batch=4, device=CPU)
        assert np.linalg.norm(found.total) <= bound


@pytest.mark.parametrize("case", CHOSEN[:2])
def test_norm_from_gram_matrices_would_let_that_patient_through(case):
    """The control: the cheaper norm that this engine does not take."""
    model, inputs = one_patient(case)
    inner, head = model[0], model[2]
    slope = head.weight[1].detach().view(1, 8, 64) / 2  # the loss's gradient by the second logit is a half
    with steady_arithmetic():
        squared = ((inputs @ inputs.mT) * (slope @ slope.mT)).sum()
    gradient = slope[0].T @ inputs[0]
    assert inner.weight.shape == gradient.shape
    assert float(squared) < 1.0 < float(gradient.norm())


def test_chain_of_additions_through_all_patients_cannot_push_terms_out():
    """Sixty-three patients whose steps cancel to little, and one that ends the cancelling late: its coming and going moves the
    sum by no more than C, as each one's gradient is rounded by itself (through one product over patients and steps: 1.03 C)."""
    steps, width = 6, 64
    layer = nn.LSTM(width, width, batch_first=True, bias=False)
    head = nn.Linear(steps * width, 2, bias=False)
    model = nn.Sequential(First(layer, mean=False), nn.Flatten(), head)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        head.weight[1] = 4.0
        head.weight[1, -width:] = 8.0
    head.weight.requires_grad_(False)
    small = -0.49 * 2.0**-17
    size = 2 * 1.005 + 4 * abs(small)
    bound = size / 64 * width
    ordinary = [1.005, small, small, -1.005, small, small]
    late = [1.0, small, small, -(1.0 - size / 64 * 0.9999), small, small]
    inputs = torch.tensor([ordinary] * 63 + [late])[:, :, None].expand(-1, -1, width).contiguous()
    labels, everybody = torch.zeros(64, dtype=torch.int64), np.arange(64)
    sums = [
        clipped_sum(model, losses, inputs, labels, everybody, rows, bound, batch=64, device=CPU).total
        for rows in (everybody, everybody[:63])
    ]
    assert np.linalg.norm(sums[0] - sums[1]) <= bound


@pytest.mark.parametrize("chosen", [[0, 2, 1, 3], [2, 0, 1, 2]])
def test_records_of_a_patient_that_do_not_stand_together_are_refused(chosen):
    """They would be clipped as those of two."""
    model, inputs, labels = make("linear")
    patients = np.array([7, 7, 3, 7])
    with pytest.raises(LocalProtocolError, match="MF-180 records of a patient"):
        summed(model, inputs[:4], labels[:4], patients, 0.2, chosen=np.array(chosen))


def test_hospitals_out_of_order_are_refused():
    model, inputs, labels = make("linear")
    with pytest.raises(LocalProtocolError, match="MF-180"):
        Engine(model, losses, CPU).clipped_sums(
            inputs[:2], labels[:2], np.arange(2), np.arange(2), np.array([1, 0]), 2, 0.2, batch=8
        )


def test_norms_of_numbers_whose_squares_vanish_in_float32_are_seen():
    tiny = Products(torch.full((1, 4), 1e30), torch.full((1, 4), 1e-27))
    assert tiny.squared_norms().item() == pytest.approx(16e6, rel=1e-5)


def test_squares_of_long_rows_are_right_to_1e_6():
    each = torch.randn(2, 3_000_001, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(patient_tape.squares(each), each.double().square().sum(1), rtol=1e-6)


def test_batches_depend_on_a_patient_s_own_records_alone():
    """The width of its place; so that what it is computed with does not change with the others."""
    counts = [1, 3, 70, 1, 2, 4, 9]
    owners_ = np.repeat(np.arange(7), counts)
    found = {}
    for batch in engine._batches(owners_, np.zeros(len(owners_), np.int64), 8):
        assert batch.places.size == 8
        for places, shares in zip(batch.places, batch.shares, strict=True):
            rows = places[places >= 0]
            for owner in set(owners_[rows].tolist()):
                found.setdefault(owner, []).append((batch.of_each, len(rows), float(shares.sum())))
    assert {owner: {width for width, _, _ in seen} for owner, seen in found.items()} == {
        0: {1}, 1: {4}, 2: {8}, 3: {1}, 4: {2}, 5: {4}, 6: {8},
    }  # fmt: skip
    for owner, count in enumerate(counts):
        assert sum(rows for _, rows, _ in found[owner]) == count
        assert sum(share for _, _, share in found[owner]) == pytest.approx(1.0)


def test_every_chosen_row_is_in_one_place():
    generator = np.random.default_rng(0)
    for batch_size, spread in itertools.product([1, 2, 16, 64], [1, 5, 50]):
        owners_ = np.sort(generator.integers(0, spread, 100))
        batches = list(engine._batches(owners_, np.zeros(100, np.int64), batch_size))
        rows = np.concatenate([batch.places[batch.places >= 0] for batch in batches])
        assert sorted(rows.tolist()) == list(range(100))
