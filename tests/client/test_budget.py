"""The budget for a terminal: what is spent reads rounded up, what is left rounded down."""

from medfed.client.budget import Account, Budget, StudyBudget, budget_in_words


def test_bounds_are_rounded_up_and_what_is_left_down() -> None:
    study = StudyBudget(
        study="sepsis",
        study_sha256="ab" * 32,
        state="open",
        delta=1e-3,
        epsilon_spent=1.00001,
        epsilon_reserved=7.99925,
        epsilon_rdp=8.99921,
        epsilon_pld=7.99925,
        accountant="pld",
        epsilon_left=6.99924,
        attempts_used=1,
        attempts_left=4,
    )
    account = Account(
        studies=["ab" * 32],
        epsilon_spent=1.00002,
        epsilon_reserved=3.33333,
        epsilon_filter=5.00001,
        epsilon_left=1.66666,
    )
    spent = Budget(
        max_epsilon_study=8.0, max_epsilon_lifetime=10.0, lifetime_delta=1e-3, studies=[study], accounts=[account]
    )
    _, of_study, of_account = budget_in_words(spent)
    assert "spent 1.001 of 8 reserved" in of_study
    assert "by RDP 9)" in of_study
    assert "spent 1.001, reserved 3.334, left for other studies 1.666;" in of_account
    assert "counts 5.001 against the cap 10" in of_account
