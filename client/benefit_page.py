"""What ``medfed-client benefit`` found, as a page and as a picture."""

from __future__ import annotations

from medfed.client.benefit import DIFFERENCES, FEWEST_IN_GROUP, MODELS, Benefit, Figure
from medfed.client.explanation_pictures import canvas, png
from medfed.wording import counted

_COLORS = {"global": "#1f5fa8", "local only": "#6b6b6b", "personalized": "#b8432f"}
_MOST_GROUPS = 40


def shown(figure: Figure, *, signed: bool = False) -> str:
    """``0.881 (0.842 to 0.917)``; with ``signed`` also the sign of a gain."""
    form = "+.3f" if signed else ".3f"
    if figure["value"] is None:
        return "undefined"
    if figure["low"] is None or figure["high"] is None:
        return f"{figure['value']:{form}} (no interval)"
    return f"{figure['value']:{form}} ({figure['low']:{form}} to {figure['high']:{form}})"


def page(found: Benefit) -> str:
    """``benefit.md``."""
    every, primary = found["groups"][0], found["primary"]
    lines = [f"# What {found['study']} is worth here", "", *(f"> **{stamp}**  " for stamp in found["stamps"]), ""]
    lines += [
        f"On {counted(found['held_out_patients'], 'patient')} that this hospital held out; {found['training_patients']} of its "
        f"patients train. *Global*: the released model. *Local only*: the same model trained on this hospital's training "
        f"patients "
        f"alone, without privacy ({found['passes']['local only']} passes). *Personalized*: the released model trained on with "
        f"them "
        f"({found['passes']['personalized']} passes). In brackets 95 % intervals over {found['samples']} bootstrap samples of "
        f"patients.",
        "",
        "This page is about this hospital's patients, exact and without noise: it stays here.",
        "",
    ]
    if not every["models"]:
        return "\n".join([*lines, f"Fewer than {FEWEST_IN_GROUP} held-out patients: no figures.", ""])
    lines += ["| metric | " + " | ".join(MODELS) + " |", "|-|" + "-|" * len(MODELS)]
    for metric in next(iter(every["models"].values())):
        lines.append(f"| {metric} | " + " | ".join(shown(every["models"][model][metric]) for model in MODELS) + " |")
    lines += ["", f"| difference of {primary} | |", "|-|-|"]
    lines += [f"| {name} | {shown(figure, signed=True)} |" for name, figure in every["differences"].items()]
    lines += ["", f"![{primary} by group](benefit.png)", "", *_by_group(found)]
    lines += [
        "",
        "An interval that holds 0 says that these patients cannot tell the two models apart. Of many groups some differ by "
        "chance.",
        "",
    ]
    return "\n".join(lines)


def _by_group(found: Benefit) -> list[str]:
    first = " - ".join(DIFFERENCES[0])
    lines = [f"| group | patients | {' | '.join(MODELS)} | {first} |", "|-|-|" + "-|" * (len(MODELS) + 1)]
    for group in found["groups"]:
        cells = [group["group"].replace("|", "\\|"), str(group["patients"])]
        if group["models"]:
            cells += [shown(group["models"][model][found["primary"]]) for model in MODELS]
            cells.append(shown(group["differences"][first], signed=True))
        else:
            cells += ["too few"] * (len(MODELS) + 1)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def picture(found: Benefit) -> bytes:
    """PNG: the primary metric of the three models, group by group, with its intervals."""
    groups = [group for group in found["groups"] if group["models"]][:_MOST_GROUPS]
    figure = canvas(7.2, 1.4 + 0.55 * max(1, len(groups)))
    axes = figure.add_subplot()
    for place, group in enumerate(groups):
        for number, model in enumerate(MODELS):
            each = group["models"][model][found["primary"]]
            if each["value"] is None:
                continue
            at = place + 0.2 * (number - 1)
            if each["low"] is not None and each["high"] is not None:
                axes.plot([each["low"], each["high"]], [at, at], color=_COLORS[model], linewidth=2, alpha=0.5)
            label = model if place == 0 else None
            axes.plot([each["value"]], [at], "o", color=_COLORS[model], markersize=6, label=label)
    names = [f"{group['group'][:40]} ({group['patients']})" for group in groups]
    axes.set_yticks(range(len(groups)), names, fontsize=8)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlabel(f"{found['primary']} on this hospital's held-out patients (95 % intervals)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e4e4e4")
    axes.set_axisbelow(True)
    if groups:
        figure.legend(loc="outside upper left", frameon=False, fontsize=9, ncols=len(MODELS))
    return png(figure)
