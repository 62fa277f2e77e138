"""The kinds of task that a study may name: what is predicted, from which columns, with which public constants. A closed list.

``models/tasks`` says what each means: its loss, its predictions, its metrics.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medfed.data_contract import Column, Scale
from medfed.toml_files import StrictModel, without_unset

Prior = Annotated[float, Field(gt=0.0, lt=1.0)]
Weights = Annotated[list[Scale], Field(min_length=1, max_length=1000)]


class Classification(StrictModel):
    """One of ``classes`` classes, numbered from 0 in column ``label``.

    All constants are public, one a class: ``class_weights`` multiply the loss of a record by its class; ``priors`` are added to
    the logits in training as their logarithms (logit adjustment, Menon et al. 2021, arXiv:2007.07314), so that what the model
    says is as if all classes were as common. ``focusing``: gamma of the focal loss (Lin et al. 2017, arXiv:1708.02002).
    """

    kind: Literal["binary", "multiclass"]
    label: Column
    classes: Annotated[int, Field(ge=2, le=1000)]
    class_weights: Annotated[list[Scale], Field(max_length=1000)] | None = None
    focusing: Annotated[float, Field(gt=0.0, le=5.0)] | None = None
    priors: Annotated[list[Prior], Field(max_length=1000)] | None = None

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(handler(self), "focusing", "priors")

    @model_validator(mode="after")
    def _agree(self) -> Classification:
        if self.kind == "binary" and self.classes != 2:
            raise ValueError("a binary task has classes = 2")
        for name, values in (("class_weights", self.class_weights), ("priors", self.priors)):
            if values is not None and len(values) != self.classes:
                raise ValueError(f"{name} needs one number a class")
        if self.priors is not None and abs(sum(self.priors) - 1.0) > 1e-6:
            raise ValueError("priors must sum to 1")
        return self

    @property
    def outputs(self) -> int:
        """Number of logits: 1 for a binary task, else one a class."""
        return 1 if self.kind == "binary" else self.classes

    @property
    def columns(self) -> list[str]:
        """Of the table with the patients: what the labels are made of."""
        return [self.label]


class MultiLabel(StrictModel):
    """Several yes-or-no findings of one record, each in a column of ``labels``: 0, 1, or empty where it is not known.

    A record's loss is the mean over the findings that are known of it. ``positive_weights``: public, one a finding, times
    the loss where it is 1.
    """

    kind: Literal["multilabel"]
    labels: Annotated[list[Column], Field(min_length=1, max_length=1000)]
    positive_weights: Weights | None = None

    @model_validator(mode="after")
    def _agree(self) -> MultiLabel:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label is listed twice")
        if self.positive_weights is not None and len(self.positive_weights) != len(self.labels):
            raise ValueError("positive_weights needs one weight a label")
        return self

    @property
    def outputs(self) -> int:
        return len(self.labels)

    @property
    def columns(self) -> list[str]:
        return list(self.labels)


class Tagging(StrictModel):
    """A tag for each word of a text: column ``label`` holds as many tags, parted by blanks, as the text has words.

    Tags are ``O`` and, for each of ``entities``, ``B-NAME`` where one begins and ``I-NAME`` where it goes on.
    ``tag_weights``: public, one a tag in that order, times the loss of a word with that tag.
    """

    kind: Literal["tagging"]
    label: Column
    entities: Annotated[list[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$")]], Field(min_length=1)]
    tag_weights: Weights | None = None

    @model_validator(mode="after")
    def _agree(self) -> Tagging:
        if len(set(self.entities)) != len(self.entities) or len(self.entities) > 100:
            raise ValueError("entities must differ, at most 100")
        if self.tag_weights is not None and len(self.tag_weights) != len(self.tags):
            raise ValueError("tag_weights needs one weight a tag")
        return self

    @property
    def tags(self) -> list[str]:
        return ["O", *(f"{part}-{name}" for name in self.entities for part in "BI")]

    @property
    def outputs(self) -> int:
        """Logits of each word."""
        return len(self.tags)

    @property
    def columns(self) -> list[str]:
        return [self.label]


class Survival(StrictModel):
    """Time to an event that not everybody lives to have: column ``time`` in ``unit``, column ``event`` 1 if it came, 0 if until
    then it had not (censored).

    ``hazard``: the logit of the chance that the event comes in each interval that ends at one of ``edges`` and in which one is
    still at risk (discrete time: Gensheimer and Narasimhan 2019, PeerJ 7:e6257). ``weibull``: two numbers, the logarithms of
    scale, in units of the last of ``edges``, and of shape; where the study says ``shape``, a public constant, the first alone.
    Both are sums over records. Cox's partial likelihood compares patients with each other and is not offered, with privacy or
    without.
    """

    kind: Literal["survival"]
    time: Column
    event: Column
    unit: Annotated[str, Field(min_length=1, max_length=32)]
    head: Literal["hazard", "weibull"]
    edges: Annotated[list[Scale], Field(min_length=1, max_length=256)]
    shape: Annotated[float, Field(ge=0.1, le=10.0)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Survival:
        if any(after <= before for before, after in itertools.pairwise(self.edges)):
            raise ValueError("edges must ascend")
        if self.shape is not None and self.head != "weibull":
            raise ValueError('shape goes with head = "weibull"')
        if self.time == self.event:
            raise ValueError("time and event are two columns")
        return self

    @property
    def outputs(self) -> int:
        if self.head == "hazard":
            return len(self.edges)
        return 2 if self.shape is None else 1

    @property
    def columns(self) -> list[str]:
        return [self.time, self.event]


class Reconstruction(StrictModel):
    """Records from themselves: what a model cannot give back is unusual. ``label``: a column of 0 and 1 that says what is
    unusual; it is never trained on, only for the metric. Without it nothing but the error is measured.

    ``divergence``: of a variational autoencoder, the weight of its latent numbers' divergence from the standard normal
    distribution; of another autoencoder 0.
    """

    kind: Literal["reconstruction"]
    divergence: Annotated[float, Field(ge=0.0, le=100.0)]
    label: Column | None = None

    @property
    def outputs(self) -> int:
        """Error and divergence; a model says its latent numbers behind them."""
        return 2

    @property
    def columns(self) -> list[str]:
        return [] if self.label is None else [self.label]


class Effect(StrictModel):
    """What a treatment changes: column ``outcome`` 0 or 1, column ``treatment`` 0 or 1; one logit of the outcome for each arm.

    Only the arm that a record was in has a loss (Shalit et al. 2017, arXiv:1606.03976, without the balancing term, which couples
    patients). That the difference is an effect rests on assumptions that no data can check: ``assumptions`` says them.
    ``truth``: of semi-synthetic data, two columns with the outcome's chance in both arms, never trained on.
    """

    kind: Literal["effect"]
    outcome: Column
    treatment: Column
    assumptions: Annotated[str, Field(min_length=1, max_length=2000)]
    truth: Annotated[list[Column], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Effect:
        if len(set(self.columns)) != len(self.columns):
            raise ValueError("a column is named twice")
        return self

    @property
    def outputs(self) -> int:
        return 2

    @property
    def columns(self) -> list[str]:
        return [self.outcome, self.treatment, *(self.truth or [])]


Task = Annotated[
    Classification | MultiLabel | Tagging | Survival | Reconstruction | Effect, Field(discriminator="kind")
]

TaskKind = Literal["binary", "multiclass", "multilabel", "tagging", "survival", "reconstruction", "effect"]


def target_in_words(task: Task) -> str:
    """What is predicted, in a line for people."""
    match task:
        case Classification():
            return f"{task.label}, one of {task.classes} classes"
        case MultiLabel():
            return f"{', '.join(task.labels)}, each 0 or 1"
        case Tagging():
            return f"{task.label}, where each {', '.join(task.entities)} stands in a text"
        case Survival():
            return f"{task.event} after {task.time} ({task.unit})"
        case Reconstruction():
            measured = "" if task.label is None else f"; {task.label} says which are unusual, to measure only"
            return f"the record itself{measured}"
        case Effect():
            return f"{task.outcome} with and without {task.treatment}"


def cautions(task: Task) -> list[str]:
    """What must be said with whatever a model of this task says, a line each."""
    match task:
        case Effect():
            return [f"Assumptions: {task.assumptions}"]
        case Reconstruction():
            return ["An anomaly score says how unlike the records of training a record is, not what is wrong with it."]
    return []
