"""The sums behind explanations: what of a model's outputs is explained, integrated gradients of it, and Grad-CAM. By captum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from medfed.data_contract import CategoryFeature, Feature
from medfed.errors import ConfigError
from medfed.models.loading import TrainedModel
from medfed.models.reasons import Floats, TableReasons
from medfed.models.records import Inputs
from medfed.task_choice import Classification, Effect, MultiLabel, Reconstruction, Survival, Tagging, Task

Score = Callable[[Tensor, Tensor], Tensor]  # (outputs [n, ...], inputs [n, ...]) -> what is explained, [n]
_STEPS = (64, 256)
_GAP = 0.02  # with more between the sum and the distance, the longer way is taken
_PLACES = 2  # a side, of what is left of a blurred image: how light its quarters are
_VALUES_AT_ONCE = 1 << 20


def require_captum() -> None:
    try:
        import captum  # noqa: F401
    except ImportError as error:
        raise ConfigError(320, "captum is not installed, which explains", "pip install 'medfed[explain]'") from error


def explained_output(task: Task, outputs: Tensor) -> tuple[str, Score]:
    """In words, and as a number: which of a model's outputs [1, ...] an explanation is about."""
    match task:
        case Classification(kind="binary"):
            return "log-odds of class 1", lambda found, given: found[:, 0]
        case Classification():
            chosen = int(outputs[0].argmax())
            # logits mean something beside each other only
            return (
                f"logit of class {chosen} over the mean of all",
                lambda found, given: found[:, chosen] - found.mean(1),
            )
        case MultiLabel():
            chosen = int(outputs[0].argmax())
            return f"log-odds of {task.labels[chosen]}", lambda found, given: found[:, chosen]
        case Survival(head="weibull"):
            return "minus the logarithm of the time scale", lambda found, given: -found[:, 0]
        case Survival():
            return "sum of the hazards' logits", lambda found, given: found.sum(1)
        case Effect():
            return "difference of the two arms' logits", lambda found, given: found[:, 1] - found[:, 0]
        case Tagging():
            return _surest_word(task, outputs)
        case Reconstruction():
            return "anomaly score", lambda found, given: found[:, 0] + task.divergence * found[:, 1]


def _surest_word(task: Tagging, outputs: Tensor) -> tuple[str, Score]:
    """The tag of an entity that stands out most over O: of one word, as every word has outputs of its own."""
    over = outputs[0, :, 1:] - outputs[0, :, :1]
    word, tag = divmod(int(over.argmax()), over.shape[1])
    return (
        f"logit of {task.tags[tag + 1]} over O at word {word + 1}",
        lambda found, given: found[:, word, tag + 1] - found[:, word, 0],
    )


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One record as a batch, and the number that is explained of it."""

    model: nn.Module
    inputs: Tensor
    output: str
    score: Score

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.score(self.model(inputs), inputs)


def asked_of(trained: TrainedModel, record: Inputs) -> Asked:
    inputs = torch.from_numpy(np.ascontiguousarray(record))[None]
    trained.model.eval()
    with torch.no_grad():
        output, score = explained_output(trained.study.task, trained.model(inputs))
    return Asked(trained.model, inputs, output, score)


def integrated_gradients(function: Callable[..., Tensor], given: Tensor, baseline: Tensor, *more: Tensor) -> Floats:
    """float64 of ``given``'s shape without its first axis: how much each value moved ``function`` on the way from ``baseline``.

    ``more``: what else the function takes, as it is. *Guarantee*: the contributions add up to the function's difference
    between both ends, up to the error of
    ``_STEPS`` Gauss-Legendre points.
    """
    from captum.attr import IntegratedGradients

    at_once = max(1, _VALUES_AT_ONCE // max(1, given.numel()))
    with torch.no_grad():
        wanted = float(function(given, *more) - function(baseline, *more))
    for steps in _STEPS:
        attributed = IntegratedGradients(function).attribute(
            given,
            baselines=baseline,
            additional_forward_args=more or None,
            n_steps=steps,
            internal_batch_size=min(steps, at_once),
        )
        found = np.asarray(attributed[0].detach().double().numpy())
        if abs(float(found.sum()) - wanted) <= _GAP * max(1.0, abs(wanted)):
            break
    return found


def from_embedded(asked: Asked) -> Floats:
    """Of a model that looks tokens up: integrated gradients of what it finds, from zeros; [*tokens, d] without the first axis."""
    embedding = next((layer for layer in asked.model.modules() if isinstance(layer, nn.Embedding)), None)
    if embedding is None:
        raise ConfigError(203, "a model without an embedding cannot be explained", "leave --explain out")

    def replaced(embedded: Tensor, tokens: Tensor) -> Tensor:
        hook = embedding.register_forward_hook(lambda layer, inputs, output: embedded)
        try:
            return asked(tokens)
        finally:
            hook.remove()

    embedded = embedding(asked.inputs).detach()
    return integrated_gradients(replaced, embedded, torch.zeros_like(embedded), asked.inputs)


def blurred(images: Tensor) -> Tensor:
    """float[n, channels, height, width] -> the same shape: means over a coarse grid, smoothed.

    The baseline of an image: a flat one would not do, as a normalisation makes the faintest trace of an image upon it as
    strong as the image, so that all that happens would happen at the very beginning of the way (Sturmfels et al. 2020,
    Distill, "Visualizing the impact of feature attribution baselines", on blurred ones).
    """
    size = [int(side) for side in images.shape[2:]]
    coarse = functional.adaptive_avg_pool2d(images, _PLACES)
    return functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)


# ------------------------------------------------------------------------------------------------------------- features


def usual(features: list[Feature]) -> NDArray[np.float32]:
    """The baseline of a table: numbers at their center, categories at their first level; float32[p]."""
    parts = [
        np.full(feature.width, -feature.center / feature.scale) if isinstance(feature, CategoryFeature) else np.zeros(1)
        for feature in features
    ]
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)


def of_features(output: str, features: list[Feature], encoded: NDArray[np.floating], found: Floats) -> TableReasons:
    """From values and contributions float[p] to one a feature."""
    values, sums, at = [], [], 0
    for feature in features:
        part = slice(at, at + feature.width)
        values.append(decoded(feature, encoded[part]))
        sums.append(float(found[part].sum()))
        at += feature.width
    return TableReasons(output, tuple(feature.name for feature in features), tuple(values), np.array(sums))


def decoded(feature: Feature, encoded: NDArray[np.floating]) -> str:
    """An encoded feature float[width] as the study writes it: a number with its unit, or the level."""
    raw = encoded.astype(np.float64) * feature.scale + feature.center
    if isinstance(feature, CategoryFeature):
        return feature.levels[int(raw.argmax()) + 1 if raw.max() > 0.5 else 0]
    return f"{raw[0]:.5g} {feature.unit}".strip()


# ---------------------------------------------------------------------------------------------------------- Grad-CAM


def grad_cam(asked: Asked) -> Floats | None:
    """Where the last layer with places saw what raises the output: float64[(depth,) height, width], 0 to 1; None without one."""
    from captum.attr import LayerGradCam

    layer = _last_with_places(asked)
    if layer is None:
        return None
    found = LayerGradCam(asked, layer).attribute(asked.inputs, relu_attributions=True).detach()
    size = [int(side) for side in asked.inputs.shape[2:]]
    mode = "bilinear" if len(size) == 2 else "trilinear"
    wide = functional.interpolate(found, size=size, mode=mode, align_corners=False)[0, 0].double().numpy()
    return np.asarray(wide / wide.max()) if wide.max() > 0 else np.zeros_like(wide)


def _last_with_places(asked: Asked) -> nn.Module | None:
    """The last layer called whose result is float[1, channels, (depth,) height, width] with more than one place."""
    seen: list[nn.Module] = []

    def look(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == asked.inputs.dim() and output[0, 0].numel() > 1:
            seen.append(layer)

    hooks = [layer.register_forward_hook(look) for layer in asked.model.modules() if not list(layer.children())]
    try:
        with torch.no_grad():
            asked(asked.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[-1] if seen else None
