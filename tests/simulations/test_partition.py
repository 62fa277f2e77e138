"""One table -> many hospitals: whole patients, each once, and the skew that was asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import ConfigError, DataError, PrivacyError
from medfed.simulations.partition import FEWEST_PATIENTS, Partition, divide, parse_partition

IID = Partition("iid")
SITE = Partition("column", column="site")


def generator(seed=1):
    return np.random.default_rng(seed)


def skew(alpha):
    return Partition("dirichlet", alpha=alpha)


def shares_of_class_one(parts, labels):
    return np.array([labels[part].mean() for part in parts.values()])


@given(
    patients=st.integers(6, 80),
    hospitals=st.integers(3, 8),
    classes=st.integers(1, 5),
    alpha=st.sampled_from([None, 0.001, 0.3, 100.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_divide_gives_every_patient_to_one_hospital_and_none_fewer_than_two(patients, hospitals, classes, alpha, seed):
    labels = generator(seed).integers(0, classes, patients)
    partition = IID if alpha is None else skew(alpha)
    if patients < hospitals * FEWEST_PATIENTS:
        with pytest.raises(ConfigError, match="MF-203"):
            divide(partition, labels, [], hospitals, generator(seed))
        return
    parts = divide(partition, labels, [], hospitals, generator(seed))
    assert len(parts) == hospitals
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(patients))
    sizes = [len(part) for part in parts.values()]
    assert min(sizes) >= FEWEST_PATIENTS
    assert max(sizes) - min(sizes) <= 1


def test_divide_by_dirichlet_skews_labels_the_more_the_smaller_alpha_is():
    labels = generator().integers(0, 2, 1000)
    spreads = [
        shares_of_class_one(divide(skew(a), labels, [], 10, generator()), labels).std() for a in (0.1, 1.0, 1000.0)
    ]
    assert spreads[0] > spreads[1] > 0.2
    assert spreads[2] < 0.1  # 100 draws each: about 0.05
    assert shares_of_class_one(divide(IID, labels, [], 10, generator()), labels).std() < 0.1


def test_divide_by_dirichlet_of_the_same_seed_is_the_same():
    labels = generator().integers(0, 3, 60)
    one, same, other = (divide(skew(0.3), labels, [], 4, generator(seed)) for seed in (5, 5, 6))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not all(np.array_equal(one[name], other[name]) for name in one)


def test_divide_by_column_takes_the_sites_and_names_them_for_folders():
    sites = ["Köln/1", "Rome", "../x", "Rome", "../x", "Köln/1"]
    parts = divide(SITE, np.zeros(6, np.int64), sites, 0, generator())
    assert {name: part.tolist() for name, part in parts.items()} == {
        "site-.._x": [2, 4],
        "site-K_ln_1": [0, 5],
        "site-Rome": [1, 3],
    }


def test_divide_by_column_keeps_sites_apart_whose_names_look_alike_in_a_folder():
    sites = ["a/b", "a:b", "A b"] * 2
    assert len(divide(SITE, np.zeros(6, np.int64), sites, 0, generator())) == 3


@pytest.mark.parametrize(
    ("sites", "error", "code"),
    [
        (["a", "a", "b", "b"], PrivacyError, "MF-140"),
        (["a", "a", "b", "b", "c"], DataError, "MF-301"),
        (["a", "a", "b", "b", "c", ""], DataError, "MF-301"),
        ([str(n // 2) for n in range(258)], ConfigError, "MF-203"),
    ],
)
def test_divide_by_column_refuses_sites_that_cannot_be_hospitals(sites, error, code):
    with pytest.raises(error, match=code):
        divide(SITE, np.zeros(len(sites), np.int64), sites, 0, generator())


def test_parse_partition_reads_what_its_words_say():
    assert parse_partition("iid") == IID
    assert parse_partition("dirichlet:0.3") == skew(0.3)
    assert parse_partition("column:where they were") == Partition("column", column="where they were")
    assert "Dirichlet 0.3" in str(skew(0.3))


@pytest.mark.parametrize(
    "text", ["", "dirichlet", "dirichlet:", "dirichlet:0", "dirichlet:nan", "column:", "iid:3", "random"]
)
def test_parse_partition_refuses_anything_else(text):
    with pytest.raises(ConfigError, match="MF-203"):
        parse_partition(text)
