"""Invented notes for trials without data: whose drugs and problems are tagged word by word, to learn to find them; and what
a marked drug has to do with a marked problem.

Drugs have endings of their own, as real ones have, and most are met in one note only: a tagger has to look at how a
word is built and at what stands beside it.
"""

from __future__ import annotations

import numpy as np

from medfed.simulations.extract import PATIENT_COLUMN, Extract

_STEMS = ("ka", "lo", "mire", "to", "ve", "sani", "du", "pra", "xi", "bero")
_ENDINGS = ("pril", "statin", "olol", "cillin", "azole")
_PROBLEMS = ("chest pain", "shortness of breath", "nausea", "ankle swelling", "fever", "dry cough", "night sweats")
_BEFORE_DRUG = ("takes", "was started on", "stopped", "is allergic to", "doubled")
_BEFORE_PROBLEM = ("reports", "denies", "was seen for", "woke with", "has less")
_PLAIN = (
    "slept badly",
    "walks the dog",
    "lives alone",
    "will come back in a week",
    "takes the stairs",
    "was seen early",
)
_DOSES = ("5 mg", "20 mg", "500 mg", "")

Phrase = tuple[list[str], list[str]]


def mentions(generator: np.random.Generator, prefix: str, count: int) -> Extract:
    """Columns ``words`` and ``tags`` (O, B-Drug, I-Drug, B-Problem, I-Problem), both parted by blanks."""
    notes = [_note(generator) for _ in range(count)]
    columns = {
        PATIENT_COLUMN: tuple(f"{prefix}-{row:05d}" for row in range(count)),
        "words": tuple(" ".join(words) for words, _ in notes),
        "tags": tuple(" ".join(tags) for _, tags in notes),
    }
    return Extract(columns)


def _note(generator: np.random.Generator) -> Phrase:
    makers = (_drug, _problem, _plain)
    parts = [makers[int(generator.integers(len(makers)))](generator) for _ in range(int(generator.integers(3, 6)))]
    words = [word for said, _ in parts for word in [*said, ","]]
    tags = [tag for _, tags in parts for tag in [*tags, "O"]]
    return [*words[:-1], "."], tags


def _drug(generator: np.random.Generator) -> Phrase:
    before = _one(generator, _BEFORE_DRUG).split()
    stems = [_one(generator, _STEMS) for _ in range(int(generator.integers(1, 4)))]
    name = "".join(stems) + _one(generator, _ENDINGS)
    dose = _one(generator, _DOSES).split()
    return [*before, name, *dose], [*["O"] * len(before), "B-Drug", *["I-Drug"] * len(dose)]


def _problem(generator: np.random.Generator) -> Phrase:
    before, problem = _one(generator, _BEFORE_PROBLEM).split(), _one(generator, _PROBLEMS).split()
    return [*before, *problem], [*["O"] * len(before), "B-Problem", *["I-Problem"] * (len(problem) - 1)]


def _plain(generator: np.random.Generator) -> Phrase:
    words = _one(generator, _PLAIN).split()
    return words, ["O"] * len(words)


# ------------------------------------------------------------------------------------------------------------- relations

_RELATIONS = (
    ("{drug} was given for {problem}", "for {problem} she takes {drug}"),
    ("{problem} began after {drug}", "{drug} was stopped because of {problem}"),
    ("{problem} was there before {drug}", "{drug} goes on , {problem} is seen to elsewhere"),
)
"""By class: the drug treats the problem, it brought it about, the one has nothing to do with the other."""


def relations(generator: np.random.Generator, prefix: str, count: int) -> Extract:
    """Columns ``note`` and ``relation``: of the pair between the words drugbegin, drugend, problembegin, problemend; the note's
    other pairs are as likely of any class, so that who does not heed the marks can only guess."""
    relation = generator.integers(0, len(_RELATIONS), count)
    columns = {
        PATIENT_COLUMN: tuple(f"{prefix}-{row:05d}" for row in range(count)),
        "note": tuple(_related(generator, int(value)) for value in relation),
        "relation": tuple(str(value) for value in relation.tolist()),
    }
    return Extract(columns)


def _related(generator: np.random.Generator, relation: int) -> str:
    pairs = [(relation, "drugbegin {} drugend", "problembegin {} problemend")]
    pairs += [(int(generator.integers(len(_RELATIONS))), "{}", "{}") for _ in range(2)]
    said = []
    for kind, drug, problem in pairs:
        stems = [_one(generator, _STEMS) for _ in range(2)]
        name = "".join(stems) + _one(generator, _ENDINGS)
        said.append(
            _one(generator, _RELATIONS[kind]).format(
                drug=drug.format(name), problem=problem.format(_one(generator, _PROBLEMS))
            )
        )
    return ". ".join(said[place] for place in generator.permutation(len(said))) + "."


def _one(generator: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(generator.integers(len(choices)))]
