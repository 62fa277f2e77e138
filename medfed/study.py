"""The study: a declarative training plan that a hospital can read, approve by its hash, and hold everybody to.

A study is data. It holds no code, no randomness and no default for anything that carries a guarantee. Its identity is
the SHA-256 of its canonical bytes; every message, mask and ledger row of a run is bound to that hash.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medfed.coupling import refuse_coupling
from medfed.data_contract import DataContract, Finite, NumericFeature
from medfed.errors import ConfigError, PrivacyError
from medfed.model_choice import CLASSIC, READS, SOLVES, ModelChoice, Recurrent, Sha256
from medfed.seams import Files
from medfed.task_choice import Classification, Task
from medfed.toml_files import StrictModel, read_values, validate, without_unset
from medfed.wire import enc

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")]


class Header(StrictModel):
    format: Literal[1]
    name: Name
    purpose: Annotated[str, Field(min_length=1, max_length=500)]
    expires: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]

    @model_validator(mode="after")
    def _date(self) -> Header:
        datetime.date.fromisoformat(self.expires)
        return self


class Momentum(StrictModel):
    """Heavy-ball momentum: v = momentum * v + g; w = w - rate * v."""

    kind: Literal["momentum"]
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)]


class Adam(StrictModel):
    """Adam (Kingma and Ba 2015, algorithm 1) on the released mean gradient."""

    kind: Literal["adam"]
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)]
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)]
    stabilizer: Annotated[float, Field(gt=0.0, le=1.0)]


Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class DpAdamBC(StrictModel):
    """Adam whose second moment is corrected for the noise (Tang, Panchal, Lecuyer 2024, arXiv:2312.14334, algorithm 1).

    w = w - rate * m / sqrt(max(v - variance of the noise, floor)), with m and v Adam's moments, corrected for their start. The
    variance is public: of a coordinate of the mean that the step is made of. ``floor``: in squared units of that mean.
    """

    kind: Literal["dp-adambc"]
    beta1: Decay
    beta2: Decay
    floor: Annotated[float, Field(ge=1e-18, le=1.0)]


Tau = Annotated[float, Field(ge=1e-9, le=1.0)]


class FedAdagrad(StrictModel):
    """FedAdagrad (Reddi et al. 2021, algorithm 2): v = v + g^2, from tau^2; w = w - rate * m / (sqrt(v) + tau).

    ``g`` is the released mean gradient, or minus the mean update; m = beta1 * m + (1 - beta1) * g, uncorrected.
    """

    kind: Literal["fedadagrad"]
    beta1: Decay
    tau: Tau


class FedYogi(StrictModel):
    """FedYogi (the same): v = v - (1 - beta2) * g^2 * sign(v - g^2)."""

    kind: Literal["fedyogi"]
    beta1: Decay
    beta2: Decay
    tau: Tau


class FedAdam(StrictModel):
    """FedAdam (the same): v = beta2 * v + (1 - beta2) * g^2."""

    kind: Literal["fedadam"]
    beta1: Decay
    beta2: Decay
    tau: Tau


ServerStep = Momentum | Adam | DpAdamBC | FedAdagrad | FedYogi | FedAdam
LocalStep = Momentum | DpAdamBC


class LocalSteps(StrictModel):
    """What a hospital does in a round of ``aggregate = "update"``: so many private gradient steps of its own.

    Every step is one privacy event. ``step``: how it follows the noised gradient; None: along it. Its moments begin anew in
    every round. ``proximal``: FedProx's mu, the pull back to the round's first weights; 0 for none.
    ``sum_range`` bounds a coordinate of one step's clipped sum: beyond it the sum saturates before the noise. A study has
    it; of a task's recipe it is left out, as it depends on the hospitals.
    """

    steps: Annotated[int, Field(ge=1, le=10_000)]
    learning_rate: Annotated[float, Field(gt=0.0, le=1e6)]
    proximal: Annotated[float, Field(ge=0.0, le=1e6)]
    sum_range: Annotated[float, Field(gt=0.0, le=1e9)] | None = None
    step: Annotated[LocalStep, Field(discriminator="kind")] | None = None

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(handler(self), "step")

    @property
    def longest_step(self) -> float:
        """At most so many times as long as the largest gradient of a round is a step before its rate, in each coordinate."""
        if self.step is None:
            return 1.0
        if isinstance(self.step, Momentum):
            return min(float(self.steps), 1.0 / (1.0 - self.step.momentum))
        return 1.0 / math.sqrt(self.step.floor)  # the first moment is a weighted mean of gradients

    @property
    def noise_spread(self) -> float | None:
        """Standard deviation of where noise alone leads in a round at rate 1, in those of one gradient's noise.

        None where that depends on the data: DP-AdamBC scales by what it sees.
        """
        if isinstance(self.step, DpAdamBC):
            return None
        decay = 0.0 if self.step is None else self.step.momentum
        # a step's noise is in the velocities that follow as well
        reach = ((1.0 - decay**left) / (1.0 - decay) for left in range(1, self.steps + 1))
        return math.sqrt(math.fsum(each * each for each in reach))

    @model_validator(mode="after")
    def _stays_finite(self) -> LocalSteps:
        if self.learning_rate * self.proximal > 1.0:
            raise ValueError("learning_rate * proximal exceeds 1: the pull back would overshoot")
        return self


AUGMENTED = frozenset({"image", "views", "volume"})
"""Kinds of record that may be augmented."""


class Augmentation(StrictModel):
    """Changed copies of each image that a step uses, drawn anew in every step from the hospital's secret key.

    A record's ``copies``, itself the first, count as records of its patient: their gradients are averaged before the clip, so
    that a patient moves a sum no further than without. They cost time, not privacy. All bounds are public: ``shift`` in pixels;
    ``turn_degrees`` and ``quarter_turns`` about the middle; ``flip``: left and right exchanged, every other time; ``crop``: the
    share of a side that may be cut off; ``contrast`` and ``brightness``: an encoded value v becomes v (1 + c) + b.
    """

    copies: Annotated[int, Field(ge=2, le=64)]
    shift: Annotated[float, Field(ge=0.0, le=64.0)] = 0.0
    turn_degrees: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    quarter_turns: bool = False
    flip: bool = False
    crop: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    contrast: Annotated[float, Field(ge=0.0, le=0.9)] = 0.0
    brightness: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0


class Training(StrictModel):
    """``learning_rates`` is a table of [first round, rate] of the server step; rounds count from 1.

    ``aggregate``: what is summed in a round, one clipped gradient sum, or the updates of ``local`` steps at the hospitals.
    The released model is the mean of the weights after each of the last ``average_last_rounds`` rounds; with ``ema_decay`` the
    exponential moving average of those after each round, in which a round counts ``ema_decay`` times what the next one does.
    Noise is calibrated for ``rounds + spare_attempts`` attempts: a round that is lost after an upload costs a spare.
    """

    aggregate: Literal["gradient", "update"]
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    spare_attempts: Annotated[int, Field(ge=0, le=10_000)]
    learning_rates: Annotated[list[Annotated[list[Finite], Field(min_length=2, max_length=2)]], Field(min_length=1)]
    average_last_rounds: Annotated[int, Field(ge=1, le=100_000)]
    server_step: Annotated[ServerStep, Field(discriminator="kind")]
    local: LocalSteps | None = None
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    augmentation: Augmentation | None = None

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(handler(self), "ema_decay", "augmentation")

    @model_validator(mode="after")
    def _agrees(self) -> Training:
        if self.ema_decay is not None and self.average_last_rounds != 1:
            raise ValueError("ema_decay averages over all rounds: it needs average_last_rounds = 1")
        if self.aggregate == "update" and isinstance(self.server_step, DpAdamBC):
            raise ValueError(
                'server_step "dp-adambc" is for aggregate = "gradient": how much noise is in an update depends on the data; '
                "use it in [training.local]"
            )
        return self

    @model_validator(mode="after")
    def _has_local_steps(self) -> Training:
        if self.aggregate == "update" and self.local is None:
            raise ValueError('aggregate = "update" needs [training.local]')
        if self.aggregate == "gradient" and self.local is not None:
            raise ValueError('[training.local] is for aggregate = "update"')
        return self

    @model_validator(mode="after")
    def _tables(self) -> Training:
        starts = [row[0] for row in self.learning_rates]
        if starts[0] != 1 or any(b <= a for a, b in itertools.pairwise(starts)):
            raise ValueError("learning_rates must begin with round 1 and ascend")
        if any(start != int(start) or not 0 < rate <= 1e6 for start, rate in self.learning_rates):
            raise ValueError("learning_rates holds [whole round, positive rate]")
        if self.average_last_rounds > self.rounds:
            raise ValueError("average_last_rounds exceeds rounds")
        return self

    @property
    def attempts(self) -> int:
        """Length of the fixed list of attempts that approval reserves."""
        return self.rounds + self.spare_attempts

    @property
    def events_per_attempt(self) -> int:
        """Privacy events of one attempt: its local steps, or the one gradient sum."""
        return 1 if self.local is None else self.local.steps

    def learning_rate(self, round_number: int) -> float:
        """The rate of round ``round_number`` = 1, 2, ..."""
        return [rate for start, rate in self.learning_rates if start <= round_number][-1]


class Privacy(StrictModel):
    """Everything the guarantee rests on. ``epsilon`` is the study's claim for all attempts; hospitals recompute it."""

    unit: Literal["patient", "record"]
    adjacency: Literal["add-remove"]
    mode: Literal["local", "distributed"]
    sampling_rate: Annotated[float, Field(gt=0.0, le=1.0)]
    clipping_norm: Annotated[float, Field(ge=1e-6, le=1000.0)]
    noise_multiplier: Annotated[float, Field(ge=0.3, le=10_000.0)]
    delta: Annotated[float, Field(gt=0.0, le=0.01)]
    epsilon: Annotated[float, Field(gt=0.0, le=100.0)]


class Statistics(StrictModel):
    """Optional: before round 1, mean and scale of the numeric features from one noised sum over patients.

    They then take the place of each feature's ``center`` and ``scale``. It is an event of its own, of all patients (no
    sampling), with noise of its own, and part of the study's epsilon. ``attempts``: most that may be made at it; all are
    counted. ``least_scale``: no standard deviation is taken for less, in halves of a feature's [minimum, maximum].
    ``range`` bounds a coordinate of a hospital's sum, about its patients: beyond it the sum saturates before the noise; of a
    task's recipe it is left out, as it depends on the hospitals.
    """

    noise_multiplier: Annotated[float, Field(ge=0.3, le=10_000.0)]
    attempts: Annotated[int, Field(ge=1, le=100)]
    least_scale: Annotated[float, Field(ge=1e-6, le=1.0)]
    range: Annotated[float, Field(gt=0.0, le=1e9)] | None = None


class Metrics(StrictModel):
    """Optional: after the last round, one noised sum of counts over held-out patients, who never train (``medfed/metrics``).

    Each of them is in that event and in no other of the study, so it costs them what it costs, and those who train nothing.
    ``noise_multiplier``: noise / sensitivity; of a task's recipe it may be left out: the noise that costs a held-out patient no
    more than training costs another. ``attempts``: most that may be made; all are counted. ``range`` bounds a cell of one
    hospital: beyond it the count saturates before the noise; of a task's recipe it is left out.
    """

    bins: Annotated[int, Field(ge=2, le=1000, multiple_of=2)]
    attempts: Annotated[int, Field(ge=1, le=100)]
    noise_multiplier: Annotated[float, Field(ge=0.3, le=10_000.0)] | None = None
    range: Annotated[float, Field(gt=0.0, le=1e9)] | None = None


class Quantization(StrictModel):
    """The grid of what is masked and summed.

    ``range`` bounds a coordinate of one hospital's word: of its clipped sum, which saturates beyond it before the noise;
    with ``aggregate = "update"`` of its weighted update, where saturation costs utility only. ``rounding``: to the nearest
    point of the grid, or at random to one of the two beside it, which is right in the mean: for updates alone, whose noise is in
    them before they are rounded.
    """

    ring_bits: Literal[16, 32]
    range: Annotated[float, Field(gt=0.0, le=1e9)]
    rounding: Literal["nearest", "stochastic"] = "nearest"


class Cohort(StrictModel):
    """Who is summed. ``hospitals``: in the roster when the study begins. ``colluders``: c, how many may conspire with the
    coordinator. ``fewest_survivors``: m, no sum of fewer is ever opened; ``hospitals`` where every one is needed (strict).
    ``most_hospitals``: no sum of more: the ring and its grid are sized for so many, joiners included.
    """

    hospitals: Annotated[int, Field(ge=3, le=128)]
    colluders: Annotated[int, Field(ge=1, le=126)]
    fewest_survivors: Annotated[int, Field(ge=3, le=128)]
    most_hospitals: Annotated[int, Field(ge=3, le=128)]
    roster_sha256: Sha256

    @model_validator(mode="after")
    def _honest(self) -> Cohort:
        if self.hospitals - self.colluders < 2:
            raise ValueError("hospitals - colluders must be at least 2")
        if not least_survivors(self.hospitals, self.colluders) <= self.fewest_survivors <= self.hospitals:
            raise ValueError(
                f"{self.hospitals} hospitals of which {self.colluders} may conspire need fewest_survivors of "
                f"{least_survivors(self.hospitals, self.colluders)} to {self.hospitals}"
            )
        if self.most_hospitals < self.hospitals:
            raise ValueError("most_hospitals is less than hospitals")
        return self

    @property
    def drop_outs(self) -> int:
        """How many of ``hospitals`` a round can do without."""
        return self.hospitals - self.fewest_survivors

    @property
    def honest_survivors(self) -> int:
        """m - c: at least so many honest hospitals are in every sum that is opened."""
        return self.fewest_survivors - self.colluders


def least_survivors(hospitals: int, colluders: int) -> int:
    """The smallest m for n hospitals of which c may conspire: floor((n + c + 1) / 2) + 1, and n where that is more.

    m + t > n + c with t = m - 1: beside a certificate at most n - m honest hospitals released fast, so c colluders hold fewer
    than t shares of a drop-out's self mask. Two certificates in one round would need 2m <= n + c votes. *Source* design of the
    secure aggregation, section 7.
    """
    return min(hospitals, (hospitals + colluders + 1) // 2 + 1)


class Deadlines(StrictModel):
    """Seconds. With ``slot_s`` every upload leaves a whole number of slots after its request arrived."""

    setup_s: Annotated[float, Field(ge=1.0, le=604_800.0)]
    round_s: Annotated[float, Field(ge=1.0, le=604_800.0)]
    slot_s: Annotated[float, Field(gt=0.0, le=86_400.0)] | None = None


StageKind = Literal["statistics", "training", "metrics"]


@dataclass(frozen=True, slots=True)
class Stage:
    """Rounds of one kind, ``first_round`` to ``last_round`` of 1, 2, ..., and the most ``attempts`` that may be made at them.

    All of them are counted, so a hospital refuses one more, and any at another kind's expense.
    """

    kind: StageKind
    first_round: int
    last_round: int
    attempts: int


class Study(StrictModel):
    """The whole plan."""

    study: Header
    task: Task
    data: DataContract
    model: ModelChoice
    statistics: Statistics | None = None
    training: Training
    metrics: Metrics | None = None
    privacy: Privacy
    quantization: Quantization
    cohort: Cohort
    deadlines: Deadlines

    @model_validator(mode="after")
    def _fits(self) -> Study:
        if self.statistics is not None:
            if self.statistics.range is None:
                raise ValueError("statistics.range is missing")
            numbers = [feature for feature in self.data.features if isinstance(feature, NumericFeature)]
            if self.data.kind != "table" or not numbers:
                raise ValueError("statistics are of a table's numeric features")
            if self.model.name not in ("logistic-regression", "mlp") or self.model.pretrained is not None:
                # shift and stretch end in the first layer, which must be known and linear
                raise ValueError(f"statistics are for logistic-regression and mlp, not for {self.model.name}")
            for feature in numbers:
                if not feature.is_resolved:
                    # else 0 / 0: whether a hospital can answer at all would depend on one patient's value
                    raise ValueError(
                        f"statistics cannot tell the ends of {feature.name}'s range apart: widen it or move its center"
                    )
        if self.metrics is not None and (self.metrics.range is None or self.metrics.noise_multiplier is None):
            raise ValueError("metrics.range or metrics.noise_multiplier is missing")
        if self.training.local is not None and self.training.local.sum_range is None:
            raise ValueError("training.local.sum_range is missing")
        if self.training.aggregate == "update" and self.privacy.mode != "local":
            raise ValueError(
                'aggregate = "update" needs privacy.mode = "local": clipping does not bound how far one patient moves the '
                "weights after several local steps, so shares of noise inside the secure sum would not hide it"
            )
        if self.quantization.rounding == "stochastic" and self.training.aggregate != "update":
            raise ValueError(
                'rounding = "stochastic" is for aggregate = "update": the price of rounding before noise is not known'
            )
        if self.model.first_model_sha256 is None:
            raise ValueError("model.first_model_sha256 is missing")
        if self.data.kind not in READS[self.model.name]:
            raise ValueError(f"{self.model.name} does not take records of kind {self.data.kind}")
        if self.training.augmentation is not None and self.data.kind not in AUGMENTED:
            raise ValueError(f"augmentation is for images, not for records of kind {self.data.kind}")
        augmentation = self.training.augmentation
        if augmentation is not None and augmentation.quarter_turns and self.data.shape[-1] != self.data.shape[-2]:
            raise ValueError("quarter_turns need images as high as wide")
        if self.task.kind not in SOLVES.get(self.model.name, CLASSIC):
            raise ValueError(f"{self.model.name} is not for tasks of kind {self.task.kind}")
        if (self.task.kind == "tagging") != (self.data.text is not None and self.data.text.tokens == "given-words"):
            raise ValueError('a tagging task needs a text of tokens = "given-words", and no other task takes one')
        fading = isinstance(self.model, Recurrent) and self.model.decay is True
        if fading and self.data.series is not None and self.data.series.fill != "forward":
            raise ValueError('decay is of values that are carried forward: fill = "forward"')
        if self.metrics is not None and not isinstance(self.task, Classification):
            raise ValueError("metrics through the masked sum are for binary and multiclass tasks")
        return self

    @property
    def sums_to_train(self) -> int:
        """How many sums lead to the released weights: the training's rounds, and before them the statistics if any."""
        return self.training.rounds + (self.statistics is not None)

    @property
    def released_sums(self) -> int:
        """How many sums a run opens: those that train, and after them the metrics if there are any."""
        return self.sums_to_train + (self.metrics is not None)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The kinds of rounds, in order: each follows the one before, and the last one ends the run."""
        stages: list[Stage] = []
        parts: tuple[tuple[StageKind, Statistics | Training | Metrics | None, int], ...] = (
            ("statistics", self.statistics, 1),
            ("training", self.training, self.training.rounds),
            ("metrics", self.metrics, 1),
        )
        for kind, part, rounds in parts:
            if part is not None:
                before = stages[-1].last_round if stages else 0
                stages.append(Stage(kind, before + 1, before + rounds, part.attempts))
        return tuple(stages)

    @property
    def rounds_by_kind(self) -> dict[str, int]:
        """How many of the released sums are of statistics, training and metrics; kinds that the study has not are left out."""
        return {stage.kind: stage.last_round - stage.first_round + 1 for stage in self.stages}

    def kind_of_round(self, number: int) -> StageKind:
        """What round ``number`` = 1, 2, ... of ``released_sums`` is about."""
        return next(stage.kind for stage in self.stages if stage.first_round <= number <= stage.last_round)

    @property
    def attempts(self) -> int:
        """Length of the fixed list of attempts that approval reserves."""
        return sum(stage.attempts for stage in self.stages)

    def canonical_bytes(self) -> bytes:
        """The one byte form of this study: JSON, keys sorted, shortest round-trip numbers, ASCII."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        ).encode()

    def hash(self) -> bytes:
        """SHA-256 over the canonical bytes, 32 bytes."""
        return hashlib.sha256(enc(b"medfed/study/v1", self.canonical_bytes())).digest()

    def expired(self, wall_s: float) -> bool:
        """Whether the last day of the study is over, in UTC."""
        today = datetime.datetime.fromtimestamp(wall_s, datetime.UTC).date()
        return today > datetime.date.fromisoformat(self.study.expires)


def load_study(files: Files, path: Path) -> Study:
    """Read ``study.toml``; every fault is one ``ConfigError`` line (MF-100 for a folder), a seed anywhere in it MF-133, what
    would couple patients MF-160."""
    if path.is_dir():
        raise ConfigError(100, f"{path.name} is a folder", "name the study's file in it, such as study.toml")
    values = read_values(files, path)
    refuse_coupling(values, path.name)
    try:
        return validate(values, path.name, Study)
    except ConfigError as error:
        if error.code == 202 and "seed" in error.what.lower():
            raise PrivacyError(133, f"{path.name} sets randomness", "a study holds no seed; remove it") from error
        raise
