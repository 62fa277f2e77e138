"""The recurrences both ways, step by step and by torch's kernels, against autograd of one record in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medfed.models.recurrent import GruLayer, LstmLayer
from medfed.recurrence import Cell, Way, Weights, have_compiled_cell, taped
from medfed.recurrent_cells import cells_for
from medfed.recurrent_library import ends

CELLS: tuple[Cell, ...] = ("lstm", "gru")
COMPILED = [False, pytest.param(True, marks=pytest.mark.skipif(not have_compiled_cell(), reason="no compiled cell"))]
ULP = 2.0**-24


@dataclass
class NotedTape:
    """Keeps what it is given, and what that says of each record's gradient."""

    dtype: torch.dtype | None = None
    each: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    given: list[Tensor] = field(default_factory=list)

    def outer(self, weight: nn.Parameter, inputs: Tensor, gradient: Tensor) -> None:
        self.given += [inputs, gradient]
        self._add(weight, torch.einsum("nto,nti->noi", gradient.double(), inputs.double()))

    def samples(self, parameter: nn.Parameter, each: Tensor) -> None:
        self.given.append(each)
        self._add(parameter, each.double())

    def rows(self, parameter: nn.Parameter, index: Tensor, gradient: Tensor) -> None:
        raise AssertionError("a recurrence has no rows")

    def _add(self, parameter: nn.Parameter, each: Tensor) -> None:
        self.each[parameter] = self.each[parameter] + each if parameter in self.each else each


@dataclass
class Case:
    cell: Cell
    inputs: Tensor
    inside: Tensor | None
    weights: Weights
    first: tuple[Tensor, ...]
    backwards: bool
    weigh: list[Tensor]
    """What each result is multiplied with to make a loss."""

    def to(self, dtype: torch.dtype) -> Case:
        parameters = (self.weights.of_inputs, self.weights.of_states, self.weights.input_bias, self.weights.state_bias)
        copies = [None if each is None else nn.Parameter(each.detach().to(dtype)) for each in parameters]
        return Case(
            self.cell,
            self.inputs.to(dtype),
            self.inside,
            Weights(*copies),
            tuple(value.to(dtype) for value in self.first),
            self.backwards,
            [each.to(dtype) for each in self.weigh],
        )


def make(
    cell: Cell,
    records: int,
    steps: int,
    width: int,
    hidden: int,
    *,
    seed: int = 0,
    biases: int = 2,
    mask: str = "none",
    has_first: bool = False,
    backwards: bool = False,
) -> Case:
    """Of float64. ``mask``: none, ends (each record has its own) or gaps."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).normal_(generator=draw)

    gates = (4 if cell == "lstm" else 3) * hidden
    of = [normal(gates, width), normal(gates, hidden), *(normal(gates) for _ in range(biases))]
    inside = None
    if mask == "gaps":
        inside = normal(records, steps) < 0.5
    elif mask == "ends":
        inside = torch.arange(steps) < torch.randint(steps + 1, (records, 1), generator=draw)
    values = 2 if cell == "lstm" else 1
    first = tuple(normal(records, hidden) for _ in range(values)) if has_first else ()
    weigh = [normal(records, steps, hidden), *(normal(records, hidden) for _ in range(values))]
    weights = Weights(*(nn.Parameter(0.7 * each) for each in of))
    return Case(cell, normal(records, steps, width), inside, weights, first, backwards, weigh)


def parameters_of(weights: Weights) -> list[nn.Parameter]:
    every = (weights.of_inputs, weights.of_states, weights.input_bias, weights.state_bias)
    return [each for each in every if each is not None]


def one_step(case: Case, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of one record, as the textbooks write it."""
    of = case.weights
    by_input, by_state = of.of_inputs @ x, of.of_states @ state[0]
    by_input = by_input if of.input_bias is None else by_input + of.input_bias
    by_state = by_state if of.state_bias is None else by_state + of.state_bias
    if case.cell == "lstm":
        enter, forget, candidate, output = (by_input + by_state).chunk(4)
        cell = forget.sigmoid() * state[1] + enter.sigmoid() * candidate.tanh()
        return output.sigmoid() * cell.tanh(), cell
    (r, z, n), (of_r, of_z, of_n) = by_input.chunk(3), by_state.chunk(3)
    reset, update = (r + of_r).sigmoid(), (z + of_z).sigmoid()
    return ((1 - update) * (n + reset * of_n).tanh() + update * state[0],)


def expected(case: Case) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Results, and record by record the gradients by inputs, first states and parameters."""
    results, gradients = [], []
    for record in range(len(case.inputs)):
        x = case.inputs[record].clone().requires_grad_()
        hidden = case.weights.of_states.shape[1]
        values = 2 if case.cell == "lstm" else 1
        first = [value[record].clone().requires_grad_() for value in case.first]
        state = tuple(first) or (x.new_zeros(hidden),) * values
        states: list[Tensor] = [state[0]] * len(x)
        for t in reversed(range(len(x))) if case.backwards else range(len(x)):
            if case.inside is None or case.inside[record, t]:
                state = one_step(case, x[t], state)
            states[t] = state[0]
        found = [torch.stack(states), *state]
        loss = sum((value * weigh[record]).sum() for value, weigh in zip(found, case.weigh, strict=True))
        leaves = [x, *first, *parameters_of(case.weights)]
        loss = loss + sum(0.0 * leaf.sum() for leaf in leaves)  # with no step inside there would be nothing to go back
        gradients.append(list(torch.autograd.grad(loss, leaves)))
        results.append([value.detach() for value in found])
    return [torch.stack(each) for each in zip(*results, strict=True)], [
        torch.stack(each) for each in zip(*gradients, strict=True)
    ]


def found(case: Case, way: Way) -> tuple[list[Tensor], list[Tensor], NotedTape]:
    tape = NotedTape()
    inputs = case.inputs.clone().requires_grad_()
    first = tuple(value.clone().requires_grad_() for value in case.first)
    way = Way(case.backwards, way.compiled, way.by_library)
    results = taped(case.cell, tape, inputs, case.weights, case.inside, first, way)
    torch.autograd.backward(results, case.weigh)
    parameters = parameters_of(case.weights)
    assert all(each.grad is None for each in parameters)
    gradients = [inputs.grad, *(value.grad for value in first), *(tape.each[each] for each in parameters)]
    return [value.detach() for value in results], gradients, tape


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert actual.shape == wanted.shape
    assert float((actual.double() - wanted).norm()) <= tolerance * (1.0 + float(wanted.norm()))


def check(case: Case, way: Way, dtype: torch.dtype) -> None:
    results, gradients = expected(case)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    mine, taken, _ = found(case.to(dtype), way)
    for actual, wanted in zip(mine, results, strict=True):
        assert_near(actual, wanted, tolerance)
    for actual, wanted in zip(taken, gradients, strict=True):
        assert_near(actual, wanted, tolerance)


cases = st.builds(
    make,
    st.sampled_from(CELLS),
    st.sampled_from([1, 2, 3, 5]),
    st.integers(1, 6),
    st.sampled_from([1, 3, 4]),
    st.sampled_from([1, 3, 4, 5, 8, 17]),
    seed=st.integers(0, 1000),
    biases=st.integers(0, 2),
    mask=st.sampled_from(["none", "ends", "gaps"]),
    has_first=st.booleans(),
    backwards=st.booleans(),
)


@given(cases)
@settings(max_examples=40, deadline=None)
def test_gradients_are_those_of_each_record_alone_step_by_step(case: Case) -> None:
    check(case, Way(by_library=False), torch.float64)
    check(case, Way(by_library=False), torch.float32)
    check(case, Way(compiled=False, by_library=False), torch.float32)


@given(cases)
@settings(max_examples=40, deadline=None)
def test_gradients_are_those_of_each_record_alone_by_the_library(case: Case) -> None:
    """What a GPU is to do, through torch's kernels for the CPU. Of a mask with gaps it is the loop."""
    check(case, Way(by_library=True), torch.float64)
    check(case, Way(by_library=True), torch.float32)


def test_only_ends_go_to_the_library() -> None:
    ending = torch.tensor([[True, True, False], [True] * 3, [False] * 3])
    assert torch.equal(ends(ending), torch.tensor([2, 3, 0]))
    assert ends(torch.tensor([[True, False, True]])) is None
    assert ends(torch.tensor([[False, True]])) is None


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backwards", [False, True])
def test_steps_outside_keep_the_state_to_the_last_bit(cell: Cell, backwards: bool, compiled: bool) -> None:
    case = make(cell, 5, 9, 3, 8, mask="gaps", has_first=True, backwards=backwards).to(torch.float32)
    inputs = torch.where(case.inside[:, :, None], case.inputs, float("inf"))
    way = Way(backwards, compiled, False)
    states, *last = taped(cell, NotedTape(), inputs, case.weights, case.inside, case.first, way)
    before = [case.first[0], *states.unbind(1)[:-1]]
    if backwards:
        before = [*states.unbind(1)[1:], case.first[0]]
    for t, state in enumerate(before):
        outside = ~case.inside[:, t]
        assert torch.equal(states[outside, t], state[outside])
    nobody = torch.zeros_like(case.inside)
    kept = taped(cell, NotedTape(), inputs, case.weights, nobody, case.first, way)[1:]
    assert all(torch.equal(a, b) for a, b in zip(kept, case.first, strict=True))
    assert torch.equal(last[0], states[:, 0 if backwards else -1])


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("records", "hidden"), [(64, 16), (32, 5), (7, 12)])
def test_what_a_record_leaves_is_the_same_bits_beside_any_others(
    cell: Cell, records: int, hidden: int, compiled: bool
) -> None:
    case = make(cell, records, 7, 10, hidden, mask="gaps").to(torch.float32)
    other = make(cell, records, 7, 10, hidden, mask="gaps", seed=1).to(torch.float32)
    kept = torch.arange(records) % 3 == 0
    mixed = Case(
        cell,
        torch.where(kept[:, None, None], case.inputs, other.inputs * 9),
        torch.where(kept[:, None], case.inside, other.inside),
        case.weights,
        (),
        False,
        [torch.where(kept.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(case.weigh, other.weigh, strict=True)],
    )
    mixed.inputs[1] = float("nan")
    mixed.inside[1] = True
    way = Way(compiled=compiled)
    (mine, taken, left), (theirs, also, same) = found(case, way), found(mixed, way)
    for a, b in zip([*mine, taken[0], *left.given], [*theirs, also[0], *same.given], strict=True):
        assert torch.equal(a[kept], b[kept])
    assert torch.isnan(theirs[0][1]).all() and torch.isnan(same.given[1][1]).any()
    assert all(torch.isfinite(value[2:]).all() for value in same.given)


@pytest.mark.skipif(not have_compiled_cell(), reason="no compiled cell")
class TestCompiledCell:
    def gates(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sigmoid and tanh of all values, as a GRU's gates."""
        state = torch.zeros(1, len(values))
        gates = torch.cat([values, torch.zeros_like(values), values])[None]
        cells_for(gates).gru_forward(
            gates, torch.zeros_like(gates), torch.zeros_like(gates[0]), state, None, torch.empty_like(state)
        )
        reset, _, candidate = gates[0].chunk(3)
        return reset, candidate

    def test_functions_are_exact_to_a_few_units_in_the_last_place(self) -> None:
        values = torch.cat(
            [torch.linspace(-86, 86, 400_001), torch.logspace(-30, 0, 4001), -torch.logspace(-30, 0, 4001)]
        )
        sigmoid, tanh = self.gates(values)
        true, wide = values.double().sigmoid(), values.double().tanh()
        assert float(((sigmoid - true) / true).abs().max()) < 4 * ULP
        assert float(((tanh - wide) / wide)[values != 0].abs().max()) < 4 * ULP

    def test_large_numbers_saturate_and_what_is_no_number_stays_none(self) -> None:
        huge = torch.tensor([torch.inf, 3e38, 100.0, -100.0, -3e38, -torch.inf])
        sigmoid, tanh = self.gates(huge)
        assert sigmoid[:3].tolist() == [1.0] * 3 and float(sigmoid[3:].max()) < 1e-37
        assert tanh.tolist() == [1.0] * 3 + [-1.0] * 3
        assert all(torch.isnan(each).all() for each in self.gates(torch.full((37,), torch.nan)))

    def test_a_value_is_the_same_bits_at_any_place_of_a_row(self) -> None:
        values = torch.linspace(-9, 9, 53)
        reference = self.gates(values)
        for shift in range(1, 53, 5):
            for mine, known in zip(self.gates(values.roll(shift)), reference, strict=True):
                assert torch.equal(mine, known.roll(shift))

    @pytest.mark.parametrize("cell", CELLS)
    def test_it_is_torch_s_operations_in_rounding(self, cell: Cell) -> None:
        case = make(cell, 5, 12, 3, 20, mask="gaps", has_first=True).to(torch.float32)
        (mine, taken, _), (theirs, also, _) = found(case, Way()), found(case, Way(compiled=False))
        for a, b in zip([*mine, *taken], [*theirs, *also], strict=True):
            assert_near(a, b.double(), 2e-6)

    def test_it_is_for_float32_on_the_cpu(self) -> None:
        compiled = type(cells_for(torch.zeros(1)))
        assert type(cells_for(torch.zeros(1), compiled=False)) is not compiled
        assert type(cells_for(torch.zeros(1, dtype=torch.float64))) is not compiled
        assert type(cells_for(torch.zeros(1, dtype=torch.bfloat16))) is not compiled


@pytest.mark.parametrize("cell", CELLS)
def test_infinite_inputs_saturate_and_leave_states_finite(cell: Cell) -> None:
    case = make(cell, 3, 4, 1, 8).to(torch.float32)
    states = taped(cell, NotedTape(), case.inputs.sign() * 3e38, case.weights)[0]
    assert torch.isfinite(states).all()


@pytest.mark.parametrize("cell", CELLS)
def test_frozen_weights_are_not_written(cell: Cell) -> None:
    case = make(cell, 3, 4, 2, 4).to(torch.float32)
    case.weights.of_inputs.requires_grad_(False)
    case.weights.state_bias.requires_grad_(False)
    tape = NotedTape()
    taped(cell, tape, case.inputs, case.weights)[0].sum().backward()
    assert set(tape.each) == {case.weights.of_states, case.weights.input_bias}
    with torch.no_grad():
        assert not taped(cell, tape, case.inputs, case.weights)[0].requires_grad


@pytest.mark.parametrize("cell", CELLS)
def test_first_layer_of_records_without_gradient_and_of_no_records(cell: Cell) -> None:
    for records in (0, 1):
        case = make(cell, records, 4, 2, 5).to(torch.float32)
        tape = NotedTape()
        taped(cell, tape, case.inputs, case.weights)[0].sum().backward()
        assert len(tape.each) == 4 and all(len(each) == records for each in tape.each.values())


@pytest.mark.parametrize("cell", CELLS)
def test_backward_pass_is_made_once(cell: Cell) -> None:
    case = make(cell, 2, 3, 2, 4).to(torch.float32)
    loss = taped(cell, NotedTape(), case.inputs, case.weights)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.parametrize("cell", CELLS)
def test_states_changed_in_place_are_noticed(cell: Cell) -> None:
    case = make(cell, 2, 3, 2, 4).to(torch.float32)
    states = taped(cell, NotedTape(), case.inputs, case.weights)[0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        states.mul_(2.0).sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_short_products_come_near(cell: Cell) -> None:
    case = make(cell, 4, 5, 3, 8).to(torch.float32)
    tape = NotedTape(torch.bfloat16)
    inputs = case.inputs.clone().requires_grad_()
    states = taped(cell, tape, inputs, case.weights)[0]
    assert states.dtype == torch.float32
    states.backward(case.weigh[0])
    whole = NotedTape()
    taped(cell, whole, case.inputs, case.weights)[0].backward(case.weigh[0])
    assert inputs.grad.dtype == torch.float32 and all(each.dtype == torch.bfloat16 for each in tape.given[:4])
    for parameter, each in whole.each.items():
        assert_near(tape.each[parameter], each, 0.05)


@pytest.mark.parametrize("layer", [LstmLayer, GruLayer])
def test_layer_of_the_catalogue_with_a_tape_is_the_layer(layer: type[LstmLayer | GruLayer]) -> None:
    torch.manual_seed(3)
    made = layer(3, 6)
    x, inside = torch.randn(5, 7, 3), torch.rand(5, 7) < 0.7
    tape = NotedTape()
    mine, plain = made.taped_forward(tape, x, inside), made(x, inside)
    torch.testing.assert_close(mine, plain)
    weigh = torch.randn_like(plain)
    mine.backward(weigh)
    assert all(each.grad is None for each in made.parameters())
    plain.backward(weigh)
    for parameter in made.parameters():
        torch.testing.assert_close(tape.each[parameter].sum(0).float(), parameter.grad, rtol=1e-4, atol=1e-5)
