"""Tagged texts: as many tags as words, sentences on one side of the split, whole at one hospital."""

from __future__ import annotations

import os

import pytest

from medfed.errors import DataError
from medfed.seams import SystemFiles
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.datasets import DATASETS
from medfed.simulations.extract import PATIENT_COLUMN, Cohort

FILES = SystemFiles()
needs_data = pytest.mark.skipif("MEDFED_DATA" not in os.environ, reason="the public data are found through MEDFED_DATA")


def parts(cohort: Cohort) -> list[dict[str, tuple[str, ...]]]:
    """Training columns of all hospitals together, and test columns."""
    names = (PATIENT_COLUMN, "words", "tags")
    training = {name: sum((each.training.columns[name] for each in cohort.hospitals), ()) for name in names}
    test = {name: sum((each.test.columns[name] for each in cohort.hospitals), ()) for name in names}
    return [training, test]


@needs_data
def test_corpus_has_its_official_number_of_entities_and_no_test_sentence_in_training() -> None:
    training, test = parts(load_cohort(FILES, "ncbi-disease", 1, None))
    begun = sum(tags.split().count("B-Disease") for tags in test["tags"])
    assert begun == 960  # Dogan et al. 2014, table 3
    assert not any(tags.startswith("I-") for tags in test["tags"])  # no entity lies across two records
    assert len(set(test[PATIENT_COLUMN])) == 940
    assert set(training["words"]) & set(test["words"]) <= {"."}  # the end of a sentence of one word too many
    assert not set(training[PATIENT_COLUMN]) & set(test[PATIENT_COLUMN])
    for columns in (training, test):
        lengths = [len(words.split()) for words in columns["words"]]
        assert lengths == [len(tags.split()) for tags in columns["tags"]]
        assert max(lengths) == 64
        assert set(" ".join(columns["tags"]).split()) == {"O", "B-Disease", "I-Disease"}


@needs_data
def test_sentence_is_whole_at_one_hospital_and_dealt_by_the_seed() -> None:
    one, other = (load_cohort(FILES, "ncbi-disease", seed, 3) for seed in (1, 2))
    owners = [set(each.training.patients) for each in one.hospitals]
    assert len(owners) == 3 and len(set.union(*owners)) == sum(map(len, owners))
    assert max(map(len, owners)) - min(map(len, owners)) <= 1
    assert any(len(each.training.patients) > len(set(each.training.patients)) for each in one.hospitals)
    assert set(one.hospitals[0].training.patients) != set(other.hospitals[0].training.patients)


@pytest.mark.parametrize("text", ["Word O\n", "Word\tO\tO\n", "two words\tO\n", "\tO\n"])
def test_file_that_is_not_in_the_form_of_conll_is_refused(tmp_path, monkeypatch, text: str) -> None:
    folder = tmp_path / DATASETS["ncbi-disease"].folder
    folder.mkdir()
    for name in ("train", "devel", "test"):
        (folder / f"{name}.tsv").write_text(text)
    monkeypatch.setenv("MEDFED_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"MF-301 train.tsv is not the file it should be"):
        load_cohort(FILES, "ncbi-disease", 1, None)


def test_invented_notes_have_a_tag_for_each_word_and_drugs_that_are_new() -> None:
    training, test = parts(load_cohort(FILES, "synthetic-mentions", 1, 3, 40))
    names = []
    for columns in (training, test):
        assert [len(words.split()) for words in columns["words"]] == [len(tags.split()) for tags in columns["tags"]]
        pairs = zip(" ".join(columns["words"]).split(), " ".join(columns["tags"]).split(), strict=True)
        names.append({word for word, tag in pairs if tag == "B-Drug"})
    assert len(names[1] - names[0]) > len(names[1]) / 2
