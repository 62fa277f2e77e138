"""The rules for torch's own LSTM and GRU against torch, one record at a time, in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from medfed.errors import UnsupportedModel
from medfed.privacy.gradients.recurrent_layers import TapedGru, TapedLstm, taped_gru, taped_lstm
from medfed.recurrence import Way

KINDS = (nn.LSTM, nn.GRU)


@dataclass
class NotedTape:
    """Keeps what it is told of each record's gradient."""

    dtype: torch.dtype | None = None
    each: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def outer(self, weight: nn.Parameter, inputs: Tensor, gradient: Tensor) -> None:
        self._add(weight, torch.einsum("nto,nti->noi", gradient.double(), inputs.double()))

    def samples(self, parameter: nn.Parameter, each: Tensor) -> None:
        self._add(parameter, each.double())

    def rows(self, parameter: nn.Parameter, index: Tensor, gradient: Tensor) -> None:
        raise AssertionError("a recurrence has no rows")

    def _add(self, parameter: nn.Parameter, each: Tensor) -> None:
        assert parameter not in self.each
        self.each[parameter] = each


@dataclass
class Case:
    module: nn.LSTM | nn.GRU
    inputs: Tensor  # [n, steps, i], whatever the module wants
    lengths: Tensor | None  # None: not packed
    is_sorted: bool
    first: tuple[Tensor, ...]
    weigh: Tensor


def make(
    kind: type[nn.LSTM | nn.GRU],
    records: int,
    steps: int,
    hidden: int,
    *,
    layers: int,
    bidirectional: bool,
    bias: bool,
    batch_first: bool,
    packing: str,
    has_first: bool,
    seed: int,
) -> Case:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).normal_(generator=draw)

    module = kind(3, hidden, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional).double()
    for weight in module.parameters():
        weight.data = 0.6 * normal(*weight.shape)
    lengths = None
    if packing != "none":
        lengths = torch.randint(1, steps + 1, (records,), generator=draw)
        lengths[int(torch.randint(records, (), generator=draw))] = steps
        if packing == "sorted":
            lengths = lengths.sort(descending=True).values
    many = layers * (2 if bidirectional else 1)
    first = tuple(normal(many, records, hidden) for _ in range(2 if kind is nn.LSTM else 1)) if has_first else ()
    weigh = normal(records, steps, hidden * (2 if bidirectional else 1))
    return Case(module, normal(records, steps, 3), lengths, packing == "sorted", first, weigh)


def hx(first: tuple[Tensor, ...], kind: type[nn.Module]) -> object:
    return None if not first else first if kind is nn.LSTM else first[0]


def feed(module: nn.LSTM | nn.GRU, case: Case, inputs: Tensor) -> Tensor | PackedSequence:
    series = inputs if module.batch_first else inputs.transpose(0, 1)
    if case.lengths is None:
        return series
    return pack_padded_sequence(series, case.lengths, module.batch_first, enforce_sorted=case.is_sorted)


def losses(module: nn.LSTM | nn.GRU, answer: object, weigh: Tensor) -> Tensor:
    """[n], of the output and of all last states and cells."""
    output, last = answer
    if isinstance(output, PackedSequence):
        output = pad_packed_sequence(output, batch_first=True)[0]
    elif not module.batch_first:
        output = output.transpose(0, 1)
    found = (output * weigh[:, : output.shape[1]]).sum((1, 2))
    for at, values in enumerate(last if isinstance(last, tuple) else (last,)):
        scale = torch.arange(1, len(values) + 1, dtype=values.dtype)[:, None, None] - 0.3 * at
        found = found + (values.sin() * scale).sum((0, 2))
    return found


def expected(case: Case) -> dict[str, Tensor]:
    """By torch, record by record: of the inputs, the first states and each parameter."""
    every: list[dict[str, Tensor]] = []
    for record in range(len(case.inputs)):
        module = copy.deepcopy(case.module)
        steps = case.inputs.shape[1] if case.lengths is None else int(case.lengths[record])
        own = case.inputs[record : record + 1].clone().requires_grad_()
        first = tuple(value[:, record : record + 1].clone().requires_grad_() for value in case.first)
        series = own[:, :steps] if module.batch_first else own[:, :steps].transpose(0, 1)
        answer = module(series, hx(first, type(module)))
        losses(module, answer, case.weigh[record : record + 1]).sum().backward()
        found = {name: weight.grad for name, weight in module.named_parameters()}
        every.append(found | {"inputs": own.grad[0]} | {f"first{i}": v.grad[:, 0] for i, v in enumerate(first)})
    return {name: torch.stack([each[name] for each in every]) for name in every[0]}


def check(case: Case, dtype: torch.dtype, way: Way) -> None:
    wanted, tolerance = expected(case), 1e-10 if dtype == torch.float64 else 1e-5
    module, tape = copy.deepcopy(case.module).to(dtype), NotedTape()
    rule = TapedLstm if isinstance(module, nn.LSTM) else TapedGru
    inputs = case.inputs.to(dtype, copy=True).requires_grad_()
    first = tuple(value.to(dtype, copy=True).requires_grad_() for value in case.first)
    answer = rule(module, tape, way)(feed(module, case, inputs), hx(first, type(module)))
    with torch.no_grad():
        true = module(feed(module, case, inputs), hx(first, type(module)))
    same_form(answer, true, tolerance)
    losses(module, answer, case.weigh.to(dtype)).sum().backward()
    found = {name: tape.each[weight] for name, weight in module.named_parameters()}
    found |= {"inputs": inputs.grad} | {f"first{i}": v.grad.transpose(0, 1) for i, v in enumerate(first)}
    assert all(weight.grad is None for weight in module.parameters())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((found[name].double() - value).norm()) <= tolerance * (1 + float(value.norm())), name


def same_form(mine: object, true: object, tolerance: float) -> None:
    """Tuples, packed series and tensors alike."""
    if isinstance(true, Tensor):
        torch.testing.assert_close(mine, true, rtol=0, atol=tolerance)
        return
    assert isinstance(mine, tuple) and len(mine) == len(true)
    for a, b in zip(mine, true, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            same_form(a, b, tolerance)


cases = st.builds(
    make,
    st.sampled_from(KINDS),
    st.sampled_from([1, 2, 3, 5]),
    st.integers(1, 5),
    st.sampled_from([1, 4, 5]),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    packing=st.sampled_from(["none", "sorted", "unsorted"]),
    has_first=st.booleans(),
    seed=st.integers(0, 1000),
)


@given(cases, st.booleans())
@settings(max_examples=25, deadline=None)
def test_layers_answer_as_torch_s_and_tell_each_record_s_gradient(case: Case, by_library: bool) -> None:
    check(case, torch.float64, Way(by_library=by_library))
    check(case, torch.float32, Way(by_library=by_library))


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_last_states_come_back_packed_as_torch_packs_them(kind: type[nn.LSTM | nn.GRU]) -> None:
    case = make(
        kind,
        4,
        6,
        4,
        layers=2,
        bidirectional=True,
        bias=True,
        batch_first=True,
        packing="unsorted",
        has_first=True,
        seed=2,
    )
    rule = taped_lstm if kind is nn.LSTM else taped_gru
    packed = feed(case.module, case, case.inputs)
    mine, theirs = (f(packed, hx(case.first, kind)) for f in (rule(case.module, NotedTape()), case.module))
    assert isinstance(mine[0], PackedSequence)
    assert torch.equal(mine[0].batch_sizes, theirs[0].batch_sizes)
    assert torch.equal(mine[0].unsorted_indices, theirs[0].unsorted_indices)
    torch.testing.assert_close(mine[0].data, theirs[0].data)


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (nn.LSTM(3, 8, proj_size=2), "proj_size = 2"),
        (nn.LSTM(3, 8, 2, dropout=0.1), "dropout = 0.1"),
        (nn.GRU(3, 8, 2, dropout=0.5), "dropout = 0.5"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(module: nn.LSTM | nn.GRU, what: str) -> None:
    rule = taped_lstm if isinstance(module, nn.LSTM) else taped_gru
    with pytest.raises(UnsupportedModel, match=f"MF-160 {type(module).__name__} with {what}"):
        rule(module, NotedTape())


def test_series_without_a_batch_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no batch"):
        taped_gru(nn.GRU(3, 4), NotedTape())(torch.zeros(5, 3))
