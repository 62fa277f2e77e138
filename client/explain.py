"""What a study asks of a hospital, for the person who decides: one card, shown as plain words or as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TypedDict

from medfed.client.approval import Review, coordinator_fingerprint
from medfed.client.ledger import ApprovalOutlook, Caps
from medfed.data_contract import DataContract, Feature, NumericFeature, Series, Text, Variable
from medfed.display import block, shown
from medfed.model_choice import Own, described
from medfed.privacy.plan import Plan
from medfed.privacy.secagg.messages import OFFER_BYTES
from medfed.privacy.secagg.protocol import AggregatorConfig
from medfed.privacy.statement import NOT_CLAIMED, holds_against
from medfed.study import Study
from medfed.task_choice import target_in_words
from medfed.volume_part import Volume
from medfed.wire import release_size_bytes, upload_size_bytes
from medfed.wording import asked_attempts, counted


class Cost(TypedDict):
    """Epsilons of one study, upper bounds, at ``delta``. ``epsilon`` counts all attempts: that is what is reserved; the smaller
    of ``epsilon_rdp`` and ``epsilon_pld`` (null where that bound has none), as ``accountant`` says. ``epsilon_without_spares``:
    of a patient who trains; ``metrics_epsilon``: of one held out for the metrics, in full from the first attempt on, null
    without."""

    epsilon: float
    epsilon_rdp: float
    epsilon_pld: float | None
    accountant: str
    epsilon_without_spares: float
    epsilon_own_noise_alone: float
    delta: float
    rounds: int
    spare_attempts: int
    local_steps: int
    statistics_attempts: int
    metrics_attempts: int
    metrics_epsilon: float | None
    max_epsilon_study: float


class Lifetime(TypedDict):
    """Epsilons at ``delta`` of all studies on these patients together, as of a list known beforehand. ``filter_after``: what
    the privacy filter holds against ``cap``, true also when studies are chosen by earlier results."""

    before: float
    after: float
    filter_after: float
    cap: float
    delta: float


class Participant(TypedDict):
    """A hospital of the roster. ``confirmed``: this hospital holds its document from itself, or it is this hospital."""

    hospital: str
    fingerprint: str
    declared_patients: int
    is_this_hospital: bool
    confirmed: bool


class Leaving(TypedDict):
    """Bytes on the wire, the same for every hospital; ``values``: numbers in one masked vector. ``release_bytes_per_round``: what
    opens the sum, once uploads are in; 0 where nothing is ever opened."""

    key_offer_bytes: int
    upload_bytes_per_round: int
    release_bytes_per_round: int
    values: int


class Code(TypedDict):
    """The package that makes an own model, as ``models/own_packages`` knows it; ``package_sha256`` is of all its files."""

    package: str
    package_sha256: str
    entry_point: str


class Card(TypedDict):
    """Everything the decision rests on. Texts are as the study has them: ``in_words`` makes them safe to show.

    ``studies_in_common``: other studies of this ledger on these patients' account; ``studies_apart``: those on none of them.
    """

    study: str
    study_sha256: str
    purpose: str
    expires: str
    predicted: str
    predicted_columns: list[str]
    copies: int
    columns: list[str]
    series: list[str]
    max_records_per_patient: int
    model: str
    code: Code | None
    parameters: int
    records: int
    patients: int
    training_patients: int
    holdout_patients: int
    mode: str
    unit: str
    holds_against: str
    not_claimed: str
    cost: Cost
    lifetime: Lifetime
    studies_in_common: int
    studies_apart: int
    hospitals: list[Participant]
    colluders: int
    fewest_survivors: int
    most_hospitals: int
    coordinator: str
    coordinator_confirmed: bool
    leaves: Leaving


def cost(study: Study, plan: Plan, caps: Caps) -> Cost:
    """What the study alone costs a patient."""
    return Cost(
        epsilon=plan.epsilon,
        epsilon_rdp=plan.bounds.rdp,
        epsilon_pld=plan.bounds.pld,
        accountant=plan.bounds.accountant,
        # statistics are paid for with the first attempt
        epsilon_without_spares=plan.trained_epsilon_after(study.training.rounds),
        epsilon_own_noise_alone=plan.own_epsilon,
        delta=plan.delta,
        rounds=study.training.rounds,
        spare_attempts=study.training.spare_attempts,
        local_steps=plan.events_per_attempt,
        statistics_attempts=0 if study.statistics is None else study.statistics.attempts,
        metrics_attempts=0 if study.metrics is None else study.metrics.attempts,
        metrics_epsilon=plan.metrics_epsilon,
        max_epsilon_study=caps.max_epsilon_study,
    )


def card(reviewed: Review, outlook: ApprovalOutlook, caps: Caps, *, coordinator_confirmed: bool) -> Card:
    """Gather what ``in_words`` tells."""
    study, plan, patients = reviewed.study, reviewed.plan, reviewed.records.patients
    return Card(
        study=study.study.name,
        study_sha256=study.hash().hex(),
        purpose=study.study.purpose,
        expires=study.study.expires,
        predicted=target_in_words(study.task),
        predicted_columns=study.task.columns,
        copies=1 if study.training.augmentation is None else study.training.augmentation.copies,
        columns=list(_columns(study.data)),
        series=[] if study.data.series is None else list(_series(study.data.series)),
        max_records_per_patient=study.data.max_records_per_patient,
        model=described(study.model),
        code=_code(study),
        parameters=plan.words,
        records=len(patients),
        patients=len(set(patients)),
        training_patients=reviewed.training_patients,
        holdout_patients=reviewed.holdout_patients,
        mode=study.privacy.mode,
        unit=study.privacy.unit,
        holds_against=holds_against(study),
        not_claimed=NOT_CLAIMED,
        cost=cost(study, plan, caps),
        lifetime=Lifetime(
            before=outlook.lifetime_before,
            after=outlook.lifetime_after,
            filter_after=outlook.filter_after,
            cap=caps.max_epsilon_lifetime,
            delta=caps.lifetime_delta,
        ),
        studies_in_common=len(outlook.account),
        studies_apart=outlook.apart,
        hospitals=_participants(reviewed),
        colluders=study.cohort.colluders,
        fewest_survivors=study.cohort.fewest_survivors,
        most_hospitals=study.cohort.most_hospitals,
        coordinator=coordinator_fingerprint(reviewed.roster),
        coordinator_confirmed=coordinator_confirmed,
        leaves=_leaving(reviewed),
    )


def _code(study: Study) -> Code | None:
    own = study.model
    if not isinstance(own, Own):
        return None
    return Code(package=own.package, package_sha256=own.package_sha256, entry_point=own.entry_point)


def _participants(reviewed: Review) -> list[Participant]:
    return [
        Participant(
            hospital=entry.hospital,
            fingerprint=entry.fingerprint,
            declared_patients=entry.nominal_patients,
            is_this_hospital=position == reviewed.position,
            confirmed=entry not in reviewed.unconfirmed,
        )
        for position, entry in enumerate(reviewed.roster.hospitals)
    ]


def _leaving(reviewed: Review) -> Leaving:
    study, roster, words = reviewed.study, reviewed.roster, reviewed.plan.ring_words
    cohort = AggregatorConfig.of(study, roster, words).everybody
    release = 0 if cohort.is_strict else release_size_bytes(cohort.release_bytes)
    upload = upload_size_bytes(cohort.upload_bytes)
    return Leaving(
        key_offer_bytes=OFFER_BYTES, upload_bytes_per_round=upload, release_bytes_per_round=release, values=words
    )


def _columns(data: DataContract) -> Iterator[str]:
    yield from (_column(feature) for feature in data.features)
    if data.image is not None:
        size = f"{data.image.height} x {data.image.width} pixels (height x width)"
        other = "is brought to it by averaging" if data.image.resize == "area" else "is an error"
        many = "image it names" if data.image.views is None else f"images it names, {data.image.views} at most"
        yield f"{data.image.column}: the {many}, grey, {size}; another size {other}; nothing else of the file"
    if data.volume is not None:
        yield from _volume(data.volume)
    if data.text is not None:
        yield f"{data.text.column}: {_text(data.text)}"
    yield from _further_parts(data)


def _volume(volume: Volume) -> Iterator[str]:
    size = f"{volume.depth} x {volume.height} x {volume.width} voxels (depth x height x width)"
    other = "is brought to it by averaging" if volume.resize == "area" else "is an error"
    yield (
        f"{volume.column}: the volume it names (NIfTI), {size}, values from {volume.lower:g} to {volume.upper:g}; another size "
        f"{other}; nothing else of the file"
    )


def _further_parts(data: DataContract) -> Iterator[str]:
    if data.molecule is not None:
        larger = "is an error" if data.molecule.larger == "refuse" else "is cut to its first ones"
        yield f"{data.molecule.column}: a molecule's SMILES, at most {data.molecule.atoms} atoms; a larger one {larger}"
    if data.fingerprint is not None:
        made = f"{data.fingerprint.bits} bits of neighborhoods of up to {data.fingerprint.radius} bonds"
        yield f"{data.fingerprint.column}: a molecule's SMILES, made into {made}"
    if data.events is not None:
        yield (
            f"coded events: the last {data.events.length} of each record, each code as one of {data.events.buckets} numbers by "
            "its hash, and how long before the last one it was; no list of codes is made"
        )
    if data.block is not None:
        block = data.block
        outside = "outside is an error" if block.outside == "refuse" else "outside counts as the bound"
        yield f"{block.prefix}1 to {block.prefix}{block.count}: {block.minimum:g} to {block.maximum:g} {block.unit}, {outside}"
    if data.mixed is not None and data.mixed.may_lack:
        yield f"a record may be without: {', '.join(data.mixed.may_lack)}"


def _text(text: Text) -> str:
    if text.tokens == "bytes":
        return f"a text, its first {text.length} bytes"
    if text.tokens == "public-vocabulary":
        return f"a text, its first {text.length} word pieces of a public vocabulary, of which you keep a copy"
    if text.tokens == "given-words":
        return (
            f"a text whose words are parted by blanks, its first {text.length}, each by hashes of the word, its beginnings, its "
            f"ends and its shape into {text.buckets} numbers; no list of words is made"
        )
    return (
        f"a text, its first {text.length} words, each as one of {text.buckets} numbers by its hash; "
        "no list of words is made"
    )


def _series(series: Series) -> Iterator[str]:
    """What is read at all, then every variable with its bounds, by what becomes of a value outside them."""
    absent = "the last one before it" if series.fill == "forward" else "its center"
    yield (
        f"measurements over time: {len(series.variables)} variables, in {series.steps} steps of {series.step_hours:g} h; "
        f"several in a step are averaged, in a step without one counts {absent}"
    )
    for outside, becomes in (("refuse", "is an error"), ("clip", "counts as the bound")):
        listed = [_variable(variable) for variable in series.variables if variable.outside == outside]
        if listed:
            yield f"outside {becomes}: {'; '.join(listed)}"


def _variable(variable: Variable) -> str:
    unit = f" {variable.unit}" if variable.unit else ""
    return f"{variable.name} {variable.minimum:g} to {variable.maximum:g}{unit}"


def _column(feature: Feature) -> str:
    if isinstance(feature, NumericFeature):
        outside = "outside is an error" if feature.outside == "refuse" else "outside counts as the bound"
        missing = "" if feature.missing is None else f", missing counts as {feature.missing:g}"
        unit = f" {feature.unit}" if feature.unit else ""
        return f"{feature.name}: {feature.minimum:g} to {feature.maximum:g}{unit}, {outside}{missing}"
    missing = "" if feature.missing is None else f", missing counts as {feature.missing}"
    return f"{feature.name}: one of {', '.join(feature.levels)}{missing}"


# ------------------------------------------------------------------------------------------------------- in plain words


def in_words(asked: Card) -> list[str]:
    """The card as lines for a terminal; every text that came with the study is escaped and marked."""
    return [*_what(asked), "", *_cost(asked), "", *_who(asked), "", *_leaves(asked)]


def _what(asked: Card) -> Iterator[str]:
    yield f"Study {shown(asked['study'])}, until {asked['expires']}"
    yield f"  hash {asked['study_sha256']}"
    yield "It says of itself:"
    yield from block(asked["purpose"])
    yield ""
    yield f"It reads from your records, at most {asked['max_records_per_patient']} of a patient:"
    yield from (f"  - {shown(column)}" for column in asked["columns"])
    for place, paragraph in enumerate(asked["series"]):
        first, later = ("    | ", "    | ") if place else ("  - ", "    ")
        yield from textwrap.wrap(shown(paragraph), 100, initial_indent=first, subsequent_indent=later)
    yield f"  - what is predicted: {shown(asked['predicted'])}"
    yield (
        f"Your data fit: {counted(asked['records'], 'record')} of {counted(asked['patients'], 'patient')}, "
        f"{asked['holdout_patients']} of them set aside and never trained on."
    )
    yield f"It trains: {asked['model']}, {asked['parameters']} parameters."
    if asked["copies"] > 1:
        yield f"It makes {asked['copies'] - 1} changed copies of each image in every step, which count with the image."
    if asked["code"] is not None:
        yield from _runs(asked["code"])


def _runs(code: Code) -> Iterator[str]:
    yield ""
    yield f"IT RUNS CODE THAT IS NOT MEDFED'S: package {code['package']}, as installed here, with this process's rights,"
    yield "on your records. medfed has found that its model keeps made-up patients apart, which catches mistakes; against code"
    yield "that means ill it is no help. You answer for whose wheel this is. Approval holds for exactly these files:"
    yield f"  {code['package_sha256']} (compare it with the authors' by telephone)"


def _cost(asked: Card) -> Iterator[str]:
    price, lifetime = asked["cost"], asked["lifetime"]
    yield f"What it costs each {asked['unit']} (delta {price['delta']:g}):"
    yield (
        f"  epsilon {_figure(price['epsilon'])} for {attempts_in_words(price)}; {_figure(price['epsilon_without_spares'])} "
        f"of one who trains if no spare is needed; your cap for a study is {price['max_epsilon_study']:g}"
    )
    yield f"  {bound_in_words(price)}"
    if price["statistics_attempts"]:
        yield (
            f"  that counts {counted(price['statistics_attempts'], 'noised sum')} over all your training patients before "
            "round 1, charged in full with the first attempt: mean and scale of the numbers above"
        )
    if price["metrics_epsilon"] is not None:
        yield (
            f"  the {counted(asked['holdout_patients'], 'patient')} set aside: in noised counts after the last round, at most "
            f"{counted(price['metrics_attempts'], 'attempt')}, and in nothing else"
        )
        yield (
            f"  they pay {_figure(price['metrics_epsilon'])} for it, charged in full with the study's first attempt; the study's "
            "epsilon is that of whoever pays more"
        )
    if price["local_steps"] > 1:
        yield f"  that counts {price['local_steps']} private steps here in every round; only what they come to leaves"
    yield (
        f"  these patients' lifetime: {_figure(lifetime['before'])} before, {_figure(lifetime['after'])} with this study "
        f"(delta {lifetime['delta']:g}); the privacy filter counts {_figure(lifetime['filter_after'])} against your cap "
        f"{lifetime['cap']:g}"
    )
    yield from _account(asked["studies_in_common"], asked["studies_apart"])
    yield f"  mode {asked['mode']}: holds against {asked['holds_against']}"
    if asked["mode"] == "distributed":
        yield (
            f"  your own noise alone, should the secure sum fail: epsilon {_figure(price['epsilon_own_noise_alone'])}"
        )
    yield f"  not claimed: {asked['not_claimed']}"


def _account(in_common: int, apart: int) -> Iterator[str]:
    """Whether the ledger knows these patients; if it knows others only, a person should wonder."""
    if in_common:
        yield f"  other studies in this ledger: {in_common} on these patients, counted above; {apart} on others"
    elif apart:
        yield f"  NO PATIENT IN COMMON with any of the other studies in this ledger ({apart}): is that so? The same people"
        yield "  under new ids would begin a fresh budget, and medfed cannot tell"


def attempts_in_words(price: Cost) -> str:
    """What ``epsilon`` counts."""
    return asked_attempts(
        price["rounds"], price["spare_attempts"], price["statistics_attempts"], price["metrics_attempts"]
    )


def bound_in_words(price: Cost) -> str:
    """Which of the two bounds ``epsilon`` is, and what the other says."""
    if price["epsilon_pld"] is None:
        return "by Renyi divergence; the noise is outside what loss distributions are proven for"
    rdp, pld = _figure(price["epsilon_rdp"]), _figure(price["epsilon_pld"])
    if price["accountant"] == "pld":
        return f"by the privacy loss distribution; Renyi divergence, which the lifetime counts, says {rdp}"
    return f"by Renyi divergence; the privacy loss distribution says {pld}"


def _who(asked: Card) -> Iterator[str]:
    hospitals = asked["hospitals"]
    colluders = asked["colluders"]
    yield f"Who takes part: {counted(len(hospitals), 'hospital')}, of which {colluders} may conspire with the coordinator."
    for entry in hospitals:
        mark = "this hospital" if entry["is_this_hospital"] else "confirmed" if entry["confirmed"] else "UNCONFIRMED"
        yield f"  {mark:13} {shown(entry['hospital'])}, {entry['declared_patients']} patients declared"
        yield f"  {'':13} {entry['fingerprint']}"
    if asked["fewest_survivors"] < len(hospitals):
        yield f"  a round can do without {len(hospitals) - asked['fewest_survivors']} of them"
    if asked["most_hospitals"] > len(hospitals):
        yield f"  more may join, up to {asked['most_hospitals']} in a sum; you are asked before any of them does"
    unconfirmed = sum(not entry["confirmed"] for entry in hospitals)
    if unconfirmed:
        yield (
            f"  {unconfirmed} UNCONFIRMED: could be the coordinator's inventions; they use up {unconfirmed} of the "
            f"{asked['colluders']} colluders allowed for"
        )
    mark = "confirmed in hospital.toml" if asked["coordinator_confirmed"] else "UNCONFIRMED: compare by telephone"
    yield f"  coordinator: {asked['coordinator']} ({mark})"


def _leaves(asked: Card) -> Iterator[str]:
    leaves, has_metrics = asked["leaves"], asked["cost"]["metrics_attempts"] > 0
    yield "What leaves this hospital:"
    yield (
        f"  each attempt one masked, noised vector of {leaves['values']} numbers: {leaves['upload_bytes_per_round']} bytes, "
        "the same length whatever your data"
    )
    yield f"  each session one public key offer of {leaves['key_offer_bytes']} bytes, and signed acknowledgements or refusals"
    counts = "no counts but the noised ones of patients set aside" if has_metrics else "no counts, no metrics"
    yield f"  nothing else: no records, {counts}, no names"


def _figure(epsilon: float) -> str:
    """Three decimals, rounded up."""
    return f"{-(-epsilon * 1000 // 1) / 1000:.3f}" if epsilon < 1e12 else "without bound"
