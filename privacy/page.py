"""``privacy.md``: the statement for people who decide about data protection, in plain words. Made from ``privacy.json`` alone."""

from __future__ import annotations

from collections.abc import Iterator

from medfed.identity import fingerprint
from medfed.privacy.statement import PrivacyFile, SignedByHospital
from medfed.roster import Roster
from medfed.wording import rounded_up, times

_UNITS = {
    "patient": "one patient: all records of one person at one hospital together",
    "record": "one single record. **A person with several records is protected less: their epsilons add up**",
}
_MODES = {
    "local": "`local`: every hospital adds all of the noise by itself and relies on nobody",
    "distributed": "`distributed`: every hospital adds a share of the noise; the shares add up inside a masked sum",
}
_NOT_PROMISED = """\
- **Anonymity.** The model is made from personal data. This statement limits what it can tell about one person; it does not make
  the data anonymous in the sense of the law.
- **Facts about people in general.** If the model learns that smoking harms, it tells so about every smoker, in the data or not.
- **Patients of two hospitals.** Their epsilons (and deltas) add up.
- **Other studies.** What several studies on the same patients cost together is in each hospital's own ledger
  (`medfed-client budget`). It is not written here, as it could tell which patients two studies share.
- **A good model.** The statement says nothing of whether the model is right or useful."""
_CHECK = """\
`medfed-client verify FOLDER` checks this folder without a network: signatures, hashes, the journal, and epsilon worked out anew
from `study.toml`. It is another check, and no less needed, that the fingerprints above are the hospitals' own: ask them by
telephone. How every byte is made is in docs/privacy_statement.md, so that the check can be done without medfed as well."""


def page(file: PrivacyFile, roster: Roster) -> str:
    """The page in Markdown. ``roster``: the one that the statement names."""
    sections = [
        ("What is promised", _promise(file)),
        ("To whom it is promised, and against whom", _against(file)),
        ("What is not promised", [_NOT_PROMISED]),
        ("How it is reached", list(_numbers(file))),
        ("Who signed", list(_signers(file, roster))),
        ("What it belongs to", list(_belongings(file))),
        ("How to check it", [_CHECK]),
    ]
    lines = [f"# Privacy statement: {file.study}", "", *_stamps(file)]
    for head, body in sections:
        lines += [f"## {head}", "", *body, ""]
    return "\n".join(lines).rstrip() + "\n"


def _stamps(file: PrivacyFile) -> list[str]:
    if not file.stamps:
        return []
    told = [f"> **{stamp}** (the coordinator's word)  " for stamp in file.stamps]
    more = "> The parties' keys were made for this rehearsal on one machine: **no hospital signed it.**"
    return [*told, *([more] if file.is_simulation else []), ""]


def _promise(file: PrivacyFile) -> list[str]:
    return [
        f"Whether or not the data of one {file.unit} were used, no conclusion that anybody draws from this model, or from "
        f"anything else that left the hospitals on the way to it, becomes more than **{times(file.epsilon)} times** as likely "
        f"(epsilon **{rounded_up(file.epsilon)}**), apart from a chance of {file.delta:g} (delta).",
        "",
        f"That counts all {file.attempts_approved} attempts that the hospitals approved. Of them {file.attempts_used} were used, "
        f"which cost epsilon {rounded_up(file.epsilon_spent)} ({times(file.epsilon_spent)} times). Epsilon is an upper bound, "
        f"not an estimate: 0 would mean that nothing can be told, and up to about 1 is considered strong.",
    ]


def _against(file: PrivacyFile) -> list[str]:
    lines = [
        f"- Protected is {_UNITS.get(file.unit, file.unit)}, of every hospital listed below.",
        f"- It holds against {file.holds_against}, whatever else they know.",
    ]
    if file.mode == "distributed":
        lines.append(
            f"- Should the masks fail, each hospital's own noise still gives epsilon {rounded_up(file.epsilon_own_noise_alone)}."
        )
    lines.append("- The hospital that treats the patient has the data anyhow; nothing is promised against it.")
    return lines


def _numbers(file: PrivacyFile) -> Iterator[str]:
    yield "| | |"
    yield "|-|-|"
    for name, value in (
        ("unit", file.unit),
        ("neighboring data sets differ by", f"{file.adjacency}: one {file.unit} more or less"),
        ("mode", _MODES[file.mode]),
        ("epsilon of the approved list of attempts", rounded_up(file.epsilon)),
        *_bounds(file),
        ("epsilon of the attempts used", rounded_up(file.epsilon_spent)),
        ("epsilon of a hospital's own noise alone", rounded_up(file.epsilon_own_noise_alone)),
        ("delta", f"{file.delta:g}"),
        ("mechanism", file.mechanism),
        ("noise multiplier", f"{file.noise_multiplier:g} times the most that one {file.unit} can move a sum"),
        ("clipping norm C", f"{file.clipping_norm:g}"),
        ("sampling", _sampling(file)),
        ("steps in an attempt", str(file.events_per_attempt)),
        (
            "attempts",
            f"{file.attempts_used} used of {file.attempts_approved} approved, {file.released_sums} sums released",
        ),
        ("of them for statistics, for metrics", f"{file.statistics_attempts}, {file.metrics_attempts}"),
        (
            "hospitals n, fewest in a sum m, conspiring hospitals withstood c",
            f"{file.cohort}, {file.fewest_survivors}, {file.colluders}",
        ),
        ("noise in a sum of all hospitals over what is needed", f"{file.excess_noise:.3g} times the variance"),
        ("chance that a sum overflows (spoils the model, not privacy)", f"{file.wrap_probability:.1g}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in file.versions.items())),
    ):
        yield f"| {name} | {value} |"


def _sampling(file: PrivacyFile) -> str:
    if file.sampling_rate == 1.0:
        return f"none: every {file.unit} is in each step"
    return f"each {file.unit} is in a step with chance {file.sampling_rate:g}, independently"


def _bounds(file: PrivacyFile) -> Iterator[tuple[str, str]]:
    used = "privacy loss distribution" if file.accountant == "pld" else "Rényi divergence"
    other = "no figure" if file.epsilon_pld is None else rounded_up(file.epsilon_pld)
    yield (
        "bound used, the smaller of two",
        f"{used} (loss distribution: {other}, Rényi: {rounded_up(file.epsilon_rdp)})",
    )
    yield (
        "what a hospital's account over several studies counts",
        f"Rényi divergence, as of epsilon {rounded_up(file.epsilon_rdp)}",
    )


def _signers(file: PrivacyFile, roster: Roster) -> Iterator[str]:
    signed = {each.position: each for each in file.hospitals}
    is_own_copy = len(signed) == 1  # no run ends with so few
    absent = [entry.hospital for position, entry in enumerate(roster.hospitals) if position not in signed]
    yield (
        "Each hospital that signed worked epsilon and the model out by itself and found them as stated here. Its signature also "
        "names the row that ended the study in its own ledger. Fingerprints are of the enrolment documents."
    )
    yield ""
    yield "| hospital | attempts charged | epsilon spent | ledger row | signed | fingerprint |"
    yield "|-|-|-|-|-|-|"
    for position, entry in enumerate(roster.hospitals):
        missing = "not in this copy" if is_own_copy else "not signed"
        yield f"| {entry.hospital} | {_charged(signed.get(position), missing)} | `{entry.fingerprint}` |"
    yield ""
    if absent and not is_own_copy:
        yield (
            f"**Not signed by {', '.join(absent)}**: by the coordinator's word they could not be reached when the run ended. "
            "What is promised holds for their patients as well, but they have not confirmed it, nor what their ledgers charged."
        )
        yield ""
    yield (
        f"Coordinator: `{fingerprint(bytes.fromhex(roster.coordinator))}`. Its word alone are the journal, the versions, and how "
        "the run is stamped, or that it is not."
    )


def _charged(mine: SignedByHospital | None, missing: str) -> str:
    if mine is None:
        return f" |  |  | **{missing}**"
    spent = mine.epsilon_spent_micro / 1e6
    return f"{mine.attempts_charged} | {rounded_up(spent)} | {mine.ledger_seq}: `{mine.ledger_sha256[:16]}…` | yes"


def _belongings(file: PrivacyFile) -> Iterator[str]:
    for name, digest in (
        ("model (`model.safetensors`)", file.model_sha256),
        ("study (`study.json`, docs/privacy_statement.md)", file.study_sha256),
        ("roster", file.roster_sha256),
        ("final model state", file.state_sha256),
        ("last line of the journal", file.journal_sha256),
    ):
        yield f"- {name}: SHA-256 `{digest}`"
    yield f"- {file.parameters} parameters were trained"
