"""Every view that a malicious coordinator can show, searched in full: no sum below m - c honest hospitals opens.

``release_model`` says what hospitals may answer and what follows from it; ``test_release_rule_party`` holds it against the
real party. The controls show that the search finds the sums that weaker rules give away.
"""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest

from medfed.privacy.secagg.protocol import derive_thresholds

_spec = importlib.util.spec_from_file_location("release_model", Path(__file__).with_name("release_model.py"))
model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(model)
Setting = model.Setting

WITHOUT_VOTES = Setting(5, 1, 3, 2, votes=False)
WITH_FEW_SHARES = Setting(6, 1, 4, 2)
SHIPPED_WITHOUT_VOTES = Setting(5, 1, 4, 3, votes=False)
TWO_CERTIFICATES = Setting(5, 2, 3, 2)


def holds(setting):
    """The inequality of the design's section 7. Without it a search may take hours."""
    return not setting.shares or setting.survivors + setting.shares > setting.hospitals + setting.colluders


def derived(sizes):
    """All settings that hospitals of these sizes of cohort derive, for every c and ``fewest_survivors`` a study may have."""
    found = set()
    for hospitals in sizes:
        for colluders in range(1, hospitals - 1):
            for fewest in range(colluders + 2, hospitals + 1):
                thresholds = derive_thresholds(hospitals, colluders, fewest)
                found.add(Setting(hospitals, colluders, thresholds.survivors, thresholds.shares))
    return sorted(found, key=str)


def allowed(sizes):
    """All settings with recovery where the inequality holds, derived or not."""
    settings = (
        Setting(hospitals, colluders, survivors, shares)
        for hospitals in sizes
        for colluders in range(1, hospitals - 1)
        for survivors in range(2, hospitals)
        for shares in range(colluders + 1, survivors)
    )
    return [setting for setting in settings if holds(setting)]


DERIVED = [setting for setting in derived(range(3, 7)) if holds(setting)]


def opened_sums(setting, views):
    """All subsets of honest hospitals whose sum some view opens."""
    return set().union(*(model.isolated(held) for held in {model.known(setting, view) for view in views}))


def smallest(sums):
    return min(found.bit_count() for found in sums)


# --------------------------------------------------------------------------------------------------------------- the search


def test_derived_thresholds_keep_the_inequality_and_two_honest_hospitals():
    settings = derived([*range(3, 30), 128])
    assert len(settings) > 1000
    for setting in settings:
        assert holds(setting)
        assert setting.survivors - setting.colluders >= 2
        assert setting.colluders < setting.shares < setting.survivors or setting.survivors == setting.hospitals


@pytest.mark.parametrize("setting", DERIVED, ids=str)
def test_release_rule_no_view_isolates_fewer_than_m_minus_c(setting):
    sums = opened_sums(setting, model.every_view(setting))
    assert smallest(sums) == setting.survivors - setting.colluders  # that few, and no fewer


@pytest.mark.parametrize("setting", DERIVED, ids=str)
def test_release_rule_a_view_opens_everybody_or_the_honest_part_of_its_one_certificate(setting):
    """One sum at most: there is no difference of two."""
    for view in model.every_view(setting):
        sums = model.isolated(model.known(setting, view))
        certified = {answer.released for answer in view} - {0, setting.everybody}
        assert len(certified) <= 1
        assert len(sums) <= 1
        assert set(sums) <= {setting.all_honest} | {found & setting.all_honest for found in certified}


@pytest.mark.parametrize("setting", [*DERIVED, SHIPPED_WITHOUT_VOTES, TWO_CERTIFICATES], ids=str)
def test_strongest_views_open_what_all_views_open(setting):
    """The reduced search, which larger cohorts need, finds the same sums."""
    assert opened_sums(setting, model.strongest_views(setting)) == opened_sums(setting, model.every_view(setting))


@pytest.mark.parametrize("setting", allowed(range(3, 10)), ids=str)
def test_release_rule_holds_wherever_the_inequality_does(setting):
    sums = opened_sums(setting, model.strongest_views(setting))
    assert smallest(sums) == setting.survivors - setting.colluders


@pytest.mark.soak
@pytest.mark.parametrize("setting", [each for each in derived([7]) if 5 < each.survivors < 7], ids=str)
def test_release_rule_seven_hospitals_in_full(setting):
    """But for m = 5: 10^8 views, of which the strongest are above."""
    sums = opened_sums(setting, model.every_view(setting))
    assert smallest(sums) == setting.survivors - setting.colluders


@pytest.mark.parametrize(
    ("setting", "honest"), [(WITHOUT_VOTES, 1), (WITH_FEW_SHARES, 2), (SHIPPED_WITHOUT_VOTES, 2)], ids=str
)
def test_weaker_rule_isolates(setting, honest):
    """Controls: the search does find what the rule prevents."""
    sums = opened_sums(setting, model.strongest_views(setting))
    assert smallest(sums) == honest < setting.survivors - setting.colluders


@pytest.mark.parametrize(
    ("setting", "search"),
    [
        *((setting, model.every_view) for setting in derived([5]) if holds(setting)),
        *((setting, model.strongest_views) for setting in (WITHOUT_VOTES, WITH_FEW_SHARES, TWO_CERTIFICATES)),
    ],
    ids=str,
)
def test_isolated_subsets_are_all_that_linear_combinations_give(setting, search):
    """Pads and self masks still secret are the unknowns: combinations of uploads without any are spanned by the smallest sums.

    The matrix is a graph's incidence matrix, totally unimodular: its rank is the same in every ring.
    """
    for held in {model.known(setting, view) for view in search(setting)}:
        identity = np.eye(len(held.closed), dtype=int)
        secret = [identity[i] for i in setting.honest if not held.opened >> i & 1]
        pairs = itertools.combinations(setting.honest, 2)
        secret += [identity[i] - identity[j] for i, j in pairs if held.closed[i] >> j & 1]
        sums = model.isolated(held)
        smallest_sums = [found for found in sums if not any(other & found == other != found for other in sums)]
        rank = np.linalg.matrix_rank(np.array(secret)) if secret else 0
        assert len(identity) - rank == len(smallest_sums)
        assert all(not one & ~other or one & ~other in sums for one in sums for other in sums)  # differences
