"""What one attempt does to patients, from records to the opened sum, by production's functions and without transport.

clip -> saturate and round -> noise (``local_steps.noised_sum``) -> mask (``Party``) -> vote and release, if somebody may
drop out -> unmask (``Aggregator``). Ledger, messages and deadlines are left out: they move bytes, and change none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medfed.advance import ModelState, advance, first_state, task_hash
from medfed.client.approved import Approved
from medfed.client.compute import Compute
from medfed.client.local_steps import Noise, noised_sum
from medfed.client.trainer import Patients, number_patients
from medfed.identity import Identity
from medfed.models import catalogue
from medfed.models.parameters import count
from medfed.models.records import Records
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.plan import Plan, make_plan
from medfed.privacy.quantize import unwrap
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.party import MaskedUpload, Party
from medfed.privacy.secagg.protocol import HEADER_BYTES, AggregatorConfig, SecaggConfig, view_words
from medfed.roster import Enrolment, Roster
from medfed.seams import Entropy
from medfed.simulations.audits.setting import Setting
from medfed.study import Cohort, Study

RING_BITS = 32
NOMINAL_PATIENTS = 100_000


@dataclass(frozen=True, slots=True)
class Shape:
    """The few decisions by which the audited studies differ. ``features``: of a linear model, which adds a bias."""

    features: int
    mode: Literal["local", "distributed"]
    noise_multiplier: float
    sampling_rate: float = 1.0
    hospitals: int = 3
    colluders: int = 1
    drop_outs: int = 0
    rounds: int = 1
    delta: float = 1e-5
    learning_rate: float = 1.0
    most_records: int = 2
    """Of one patient in a sum."""


def audited_study(shape: Shape) -> Study:
    """A study of a linear model whose gradients the auditor can aim: a patient's is residual * (features, 1)."""
    feature = {"kind": "number", "unit": "1", "minimum": -1e9, "maximum": 1e9, "center": 0.0, "scale": 1.0}
    return Study.model_validate(
        {
            "study": {"format": 1, "name": "audit", "purpose": "Audit the mechanism.", "expires": "2099-12-31"},
            "task": {"kind": "binary", "label": "ill", "classes": 2},
            "data": {
                "max_records_per_patient": shape.most_records,
                "features": [{"name": f"f{number}", "outside": "refuse"} | feature for number in range(shape.features)],
            },
            "model": {"name": "logistic-regression", "hidden": [], "first_model_sha256": "00" * 32},
            "training": {
                "aggregate": "gradient",
                "rounds": shape.rounds,
                "spare_attempts": 0,
                "learning_rates": [[1, shape.learning_rate]],
                "average_last_rounds": 1,
                "server_step": {"kind": "momentum", "momentum": 0.0},
            },
            "privacy": {
                "unit": "patient",
                "adjacency": "add-remove",
                "mode": shape.mode,
                "sampling_rate": shape.sampling_rate,
                "clipping_norm": 1.0,
                "noise_multiplier": shape.noise_multiplier,
                "delta": shape.delta,
                "epsilon": 100.0,
            },
            "quantization": {"ring_bits": RING_BITS, "range": 4.0},
            "cohort": {
                "hospitals": shape.hospitals,
                "colluders": shape.colluders,
                "fewest_survivors": shape.hospitals - shape.drop_outs,
                "most_hospitals": shape.hospitals,
                "roster_sha256": "00" * 32,
            },
            "deadlines": {"setup_s": 120.0, "round_s": 60.0},
        }
    )


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """One attempt as the auditor sees it, who knows everything.

    ``total``: the opened sum, int64[d], over ``survivors``. ``vectors``: what each hospital masked, int64[n, d]. ``uploads``:
    what each sent, arrived or not, read as two's complement, int64[n, d]. Positions from 0; the patient in question is at 0,
    and the last are colluders.
    """

    total: NDArray[np.int64]
    vectors: NDArray[np.int64]
    uploads: NDArray[np.int64]
    survivors: tuple[int, ...]


class RealPath:
    """One session of a study's hospitals and coordinator, in one process.

    ``noise``: production's, or a broken one, for controls and for tests.
    """

    def __init__(self, study: Study, setting: Setting, owner: str, noise: Noise = discrete_gaussian) -> None:
        """``owner`` keeps apart the randomness of paths that stem from one seed."""
        self.study = study
        self.model = catalogue.build(study)
        self.plan: Plan = make_plan(study, count(self.model))
        positions = range(study.cohort.hospitals)
        self._survivors = _survivors(study.cohort)
        self._noise = noise
        self._entropy: list[Entropy] = [setting.entropy(f"{owner}/hospital-{position}") for position in positions]
        identities = [Identity.from_seed(entropy.draw("identity", 32)) for entropy in self._entropy]
        self._roster = _roster(identities)
        nobody = self.patients(np.zeros((0, *study.data.shape), np.float32), [], [])
        first = first_state(np.zeros(self.plan.words, np.float32), study)
        self._hospitals = [
            Approved(
                study, self._roster, position, self.plan, self.model, first, nobody, nobody.records, Path(), Compute()
            )
            for position in positions
        ]
        self._parties, self._aggregator = self._session(identities)
        self.first = first
        self._attempt = 0

    def _session(self, identities: Sequence[Identity]) -> tuple[list[Party], Aggregator]:
        shared = AggregatorConfig.of(self.study, self._roster, self.plan.ring_words)
        parties = [
            Party(SecaggConfig(shared, position), identity.sign, self._entropy[position])
            for position, identity in enumerate(identities)
        ]
        aggregator = Aggregator.from_offers(shared, [party.offer() for party in parties])
        for party in parties:
            party.accept(aggregator.offers())
        return parties, aggregator

    def patients(self, inputs: NDArray[np.float32], labels: Sequence[int], names: Sequence[str]) -> Patients:
        """Encoded records as a hospital holds them: float32[n, p], a label and a patient's name each."""
        return number_patients(self.study, Records(inputs, np.array(labels, np.int64), tuple(names)))

    def attempt(self, state: ModelState, patients: Patients) -> Opened:
        """One attempt at a model: ``patients`` are at hospital 0, nobody is at the others."""
        hospitals = [replace(self._hospitals[0], patients=patients), *self._hospitals[1:]]
        vectors = [
            noised_sum(hospital, state.weights, entropy, self._noise)
            for hospital, entropy in zip(hospitals, self._entropy, strict=True)
        ]
        task = task_hash(self.study.hash(), state)
        self._attempt += 1
        self._aggregator.open_round(self._attempt, task)
        uploads = []
        for position, (party, vector) in enumerate(zip(self._parties, vectors, strict=True)):
            party.open_round(self._attempt, task)
            masked = party.mask(vector)
            if position in self._survivors:
                self._aggregator.add_upload(masked.payload)
            uploads.append(self._read(masked))
        self._release()
        total = unwrap(self._aggregator.total()).astype(np.int64)
        for party in self._parties:
            party.close_round()
        self._aggregator.close_round()
        return Opened(total, np.array(vectors), np.array(uploads), self._survivors)

    def _release(self) -> None:
        """What the survivors are asked for before their sum opens; nothing in strict mode, where it is open."""
        aggregator = self._aggregator
        if aggregator.cohort.is_strict:
            return
        survivors = aggregator.freeze()
        if survivors != aggregator.cohort.members:
            for position in survivors:
                aggregator.add_vote(position, self._parties[position].vote(survivors))
        votes = aggregator.certificate()
        for position in survivors:
            boxes = aggregator.boxes_for(position)
            aggregator.add_release(position, self._parties[position].release(survivors, votes, boxes))

    def next_state(self, state: ModelState, opened: Opened) -> ModelState:
        """The model after a round, by the server step that all sides compute."""
        return advance(
            state,
            opened.total,
            self.study,
            grid_exponent=self.plan.exponent,
            nominal_patients=self._roster.patients_of(opened.survivors),
            roster_patients=self._roster.nominal_patients,
            noise_variance=self.plan.noise_variance(len(opened.survivors)),
        )

    def _read(self, masked: MaskedUpload) -> NDArray[np.int64]:
        size = self.plan.ring_words * self.plan.ring_bits // 8
        words = view_words(masked.payload[HEADER_BYTES : HEADER_BYTES + size], self.plan.ring_bits)
        return unwrap(words).astype(np.int64)


def _survivors(cohort: Cohort) -> tuple[int, ...]:
    """Positions whose uploads arrive. The last honest hospitals drop out: that leaves the least noise a sum may have."""
    honest = cohort.hospitals - cohort.colluders
    return (*range(honest - cohort.drop_outs), *range(honest, cohort.hospitals))


def _roster(identities: Sequence[Identity]) -> Roster:
    """Enough of a roster for masks and signatures: documents that nobody sent and nobody checks."""
    hospitals = [
        Enrolment(
            format="medfed-enrolment-1",
            hospital=f"hospital-{position}",
            identity=identity.public.hex(),
            node_key="none",
            nominal_patients=NOMINAL_PATIENTS,
            signature="0" * 128,
        )
        for position, identity in enumerate(identities)
    ]
    return Roster(format="medfed-roster-1", coordinator=identities[0].public.hex(), hospitals=hospitals)
