"""What a simulation's report says of epsilon: never less than it is."""

from types import SimpleNamespace

import pytest

from medfed.simulations import report


@pytest.mark.parametrize(
    ("epsilon", "said"),
    [
        (1.0, "more than 2.72 times as likely"),
        (4.7, "more than 110 times (a limit too weak to mean much) as likely"),
        (30.0, "more than 10^14 times (a limit too weak to mean much) as likely"),
    ],
)
def test_factor_is_rounded_up(epsilon: float, said: str) -> None:
    assert said in report.epsilon_in_words(SimpleNamespace(epsilon=epsilon, unit="patient", delta=1e-3))


def test_costs_are_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SimpleNamespace(own_epsilon=12.3411, metrics_epsilon=None)
    assignment = SimpleNamespace(plan=plan)
    first = SimpleNamespace(
        assignment=assignment, checkpoint=SimpleNamespace(last_attempt=3), attempts_asked="3 rounds"
    )
    result = SimpleNamespace(
        epsilon=7.99925, unit="patient", delta=1e-3, mode="local", rounds=3, attempts_approved=5, seeds=(1,)
    )
    monkeypatch.setattr(report, "spent", lambda _: 3.00004)
    text = "\n".join(report._cost(first, result))
    assert "**epsilon 8, delta" in text
    assert "epsilon 3.001" in text
    assert "gives epsilon 12.35." in text
