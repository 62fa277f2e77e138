"""A released model for others: an ONNX file, and safetensors with a JSON page that says all that is needed to use it.

Layers that run by hand here (``RowLinear``, the recurrent ones, standardised filters) are replaced by plain operations that
compute the same; what comes out is checked against the model itself on made-up records.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medfed.data_contract import CategoryFeature, DataContract
from medfed.errors import ConfigError
from medfed.models import parameters
from medfed.models.convolutional import StandardizedConv2d
from medfed.models.loading import TrainedModel
from medfed.models.made_up import made_up_records
from medfed.models.recurrent import GruLayer, LstmLayer
from medfed.models.rowwise import RowLinear
from medfed.models.tasks import meaning
from medfed.task_choice import Classification, MultiLabel, Task, target_in_words

AGREEMENT = 1e-5  # of an ONNX file's outputs with the model's, beside the largest of them
MOST_STEPS = 128  # a recurrent layer is written out step by step
_SMALLEST = 1e-7
_CHECKED = 8  # made-up records


@dataclass(frozen=True, slots=True)
class Onnx:
    """An ONNX file, and how far its outputs were from the model's at most, beside the largest of them."""

    data: bytes
    distance: float


def to_onnx(trained: TrainedModel) -> Onnx:
    """Input ``records`` [n, *shape] (n any), outputs ``outputs`` as the model gives them and, of classes, ``probabilities`` as
    ``TrainedModel.predict`` gives them without a hospital's own calibration.

    *Guarantees*: run by onnxruntime on made-up records the file agrees with the model within ``AGREEMENT``. Raises
    ``ConfigError`` MF-320 without the extra, MF-203 for a model that ONNX cannot express or that does not agree.
    """
    _require_onnx()
    steps = trained.study.data.shape[0]
    written = plain(trained.model)
    if any(isinstance(layer, _PlainRecurrent) for layer in written.modules()) and steps > MOST_STEPS:
        raise ConfigError(
            203, f"a recurrent model of {steps} steps is too long for ONNX", f"at most {MOST_STEPS} steps"
        )
    inputs, _ = made_up_records(trained.study, torch.Generator().manual_seed(1), _CHECKED)
    data = _exported(_WithChances(written, trained.study.task), inputs, trained.study.model.name)
    distance = _distance(data, trained, inputs)
    if not distance <= AGREEMENT:
        raise ConfigError(
            203, f"the ONNX file would differ from the model by {distance:.1g}", "export safetensors instead"
        )
    return Onnx(data, distance)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(320, "the ONNX libraries are not installed", "pip install 'medfed[onnx]'") from error


def _exported(model: nn.Module, inputs: Tensor, name: str) -> bytes:
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model.eval(),
                (inputs,),
                input_names=["records"],
                output_names=["outputs", "probabilities"] if getattr(model, "has_chances", False) else ["outputs"],
                dynamic_shapes=({0: torch.export.Dim("n")},),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter's own text may be pages long
        what = f"model {name} cannot be written as ONNX ({type(error).__name__})"
        raise ConfigError(203, what, "export safetensors instead") from None
    finally:
        logger.setLevel(before)
    if program is None:
        raise ConfigError(203, f"model {name} cannot be written as ONNX", "export safetensors instead")
    return bytes(program.model_proto.SerializeToString())


def _distance(data: bytes, trained: TrainedModel, inputs: Tensor) -> float:
    """Of both outputs, on all the records and on one alone."""
    from onnxruntime import InferenceSession

    session = InferenceSession(data, providers=["CPUExecutionProvider"])
    worst = 0.0
    for part in (inputs, inputs[:1]):
        with torch.no_grad():
            wanted = [trained.model(part).double().numpy()]
        if len(session.get_outputs()) > 1:
            wanted.append(TrainedModel(trained.study, trained.model, trained.sha256).predict(part.numpy()))
        for own, other in zip(wanted, session.run(None, {"records": part.numpy()}), strict=True):
            size = max(1.0, float(np.abs(own).max()))
            worst = max(worst, float(np.abs(own - np.asarray(other, np.float64)).max()) / size)
    return worst if math.isfinite(worst) else math.inf


class _WithChances(nn.Module):
    """Records -> the model's outputs and, of classes, their calibrated probabilities (``models/calibration``)."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.has_chances = isinstance(task, Classification | MultiLabel)

    def forward(self, records: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(records)
        match self.task:
            case Classification():
                return outputs, _chances(self.task, outputs)
            case MultiLabel():
                weights = torch.tensor(self.task.positive_weights or [1.0])
                return outputs, torch.sigmoid(outputs - weights.log())
        return (outputs,)


def _chances(task: Classification, outputs: Tensor) -> Tensor:
    logs = torch.cat([torch.zeros_like(outputs), outputs], 1) if task.kind == "binary" else outputs
    if task.priors is not None:
        logs = logs + torch.tensor(task.priors).log()
    if task.focusing is not None:
        gamma = task.focusing
        seen = torch.softmax(logs, 1).clamp(_SMALLEST, 1.0 - _SMALLEST)
        wrong = 1.0 - seen
        logs = seen.log() - (wrong**gamma - gamma * wrong ** (gamma - 1.0) * seen * seen.log()).log()
    if task.class_weights is not None:
        logs = logs - torch.tensor(task.class_weights).log()
    return torch.softmax(logs, 1)


# ------------------------------------------------------------------------------------------------------------ plain layers


def plain(model: nn.Module) -> nn.Module:
    """A copy that computes the same of plain operations; the model stays as it is."""
    copied = copy.deepcopy(model)
    if type(copied) in _PLAIN:
        return _PLAIN[type(copied)](copied)
    for layer in list(copied.modules()):
        for name, child in list(layer.named_children()):
            if type(child) in _PLAIN:
                setattr(layer, name, _PLAIN[type(child)](child))
    return copied


class _PlainRecurrent(nn.Module):
    """float[n, steps, inputs], inside bool[n, steps] -> states float[n, steps, h], step by step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if not isinstance(layer, LstmLayer | GruLayer):
            raise TypeError(type(layer).__name__)
        self.by_input: nn.Module = layer.by_input
        self.by_state: nn.Module = layer.by_state
        self.is_lstm = isinstance(layer, LstmLayer)

    def forward(self, inputs: Tensor, inside: Tensor) -> Tensor:
        given = self.by_input(inputs)
        width = given.shape[2] // (4 if self.is_lstm else 3)
        state = torch.zeros_like(given[:, 0, :width])
        cell, states = state, []
        for step in range(inputs.shape[1]):
            counts = inside[:, step, None]
            if self.is_lstm:
                next_state, next_cell = self._lstm(given[:, step], state, cell)
                cell = torch.where(counts, next_cell, cell)
            else:
                next_state = self._gru(given[:, step], state)
            state = torch.where(counts, next_state, state)
            states.append(state)
        return torch.stack(states, 1)

    def _lstm(self, given: Tensor, state: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        enter, forget, candidate, leave = (given + self.by_state(state)).chunk(4, 1)
        following = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
        return torch.sigmoid(leave) * torch.tanh(following), following

    def _gru(self, given: Tensor, state: Tensor) -> Tensor:
        by_reset, by_update, by_candidate = given.chunk(3, 1)
        of_reset, of_update, of_candidate = self.by_state(state).chunk(3, 1)
        update = torch.sigmoid(by_update + of_update)
        candidate = torch.tanh(by_candidate + torch.sigmoid(by_reset + of_reset) * of_candidate)
        return candidate + update * (state - candidate)


def _linear(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, nn.Linear):
        raise TypeError(type(layer).__name__)
    made = nn.Linear(layer.in_features, layer.out_features)
    made.load_state_dict(layer.state_dict())
    return made


def _convolution(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, StandardizedConv2d):
        raise TypeError(type(layer).__name__)
    made = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        (layer.kernel_size[0], layer.kernel_size[1]),
        (layer.stride[0], layer.stride[1]),
        (layer.kernel_size[0] // 2, layer.kernel_size[1] // 2),
        bias=False,
    )
    with torch.no_grad():
        made.weight.copy_(layer.used_weight(layer.weight))
    return made


_PLAIN: dict[type[nn.Module], Callable[[nn.Module], nn.Module]] = {
    RowLinear: _linear,
    StandardizedConv2d: _convolution,
    LstmLayer: _PlainRecurrent,
    GruLayer: _PlainRecurrent,
}
"""What stands for a layer that ONNX has no word for. Layers that are not here must be of torch's own operations."""


# ------------------------------------------------------------------------------------------------------------------- JSON


def to_json(trained: TrainedModel) -> bytes:
    """``model.json``: the study, what goes in and how it is made of raw values, what comes out and how it becomes chances, and
    every tensor of ``model.safetensors``."""
    study = trained.study
    page = {
        "format": "medfed-model-1",
        "stamps": list(trained.stamps),
        "study_sha256": study.hash().hex(),
        "model_sha256": trained.sha256,
        "input": {
            "name": "records",
            "shape": ["n", *study.data.shape],
            "dtype": "int64" if study.data.is_tokens else "float32",
            "made_of": _made_of(study.data),
        },
        "output": {
            "name": "outputs",
            "predicts": target_in_words(study.task),
            "metric": meaning(study.task).primary,
            "to_predictions": _to_predictions(study.task),
        },
        "tensors": {
            name: {"shape": list(weight.shape), "dtype": "float32"}
            for name, weight in parameters.trainable(trained.model)
        },
        "study": study.model_dump(mode="json"),
    }
    return (json.dumps(page, indent=1, allow_nan=False) + "\n").encode()


def _made_of(data: DataContract) -> list[str]:
    """The encoding in words, in the order of the values; its constants are in ``study.data``."""
    lines = [_feature_in_words(feature) for feature in data.features]
    if data.image is not None:
        lines.append(
            f"grey image of {data.image.column}, {data.image.height} x {data.image.width}: (value - {data.image.center:g}) / "
            f"{data.image.scale:g}, 0 black, 1 white; another size: {data.image.resize}"
        )
    if data.text is not None:
        lines.append(
            f"text of {data.text.column}: {data.text.length} tokens by {data.text.tokens}, {data.text.buckets} buckets; 0 is "
            f"padding"
        )
    if data.series is not None:
        lines.append(
            f"each of {data.series.steps} steps of {data.series.step_hours:g} h: the variables' means, (value - center) / scale, "
            f"unobserved ones by fill = {data.series.fill}; then 1 or 0 for each observed or not; then 1 inside the stay, "
            f"else 0; then "
            "the features, the same at every step"
        )
    return lines


def _feature_in_words(feature: object) -> str:
    if isinstance(feature, CategoryFeature):
        names = ", ".join(feature.levels[1:])
        return f"{feature.name}: one value for each of {names}: (1 or 0 - {feature.center:g}) / {feature.scale:g}"
    name, center, scale = (getattr(feature, key) for key in ("name", "center", "scale"))
    return f"{name}: (value - {center:g}) / {scale:g}; limits and missing values as in study.data.features"


def _to_predictions(task: Task) -> str:
    match task:
        case Classification(kind="binary"):
            seen = "odds of class 1 against 0 = exp(output)"
        case Classification():
            seen = "q = softmax(outputs)"
        case MultiLabel():
            weights = "" if task.positive_weights is None else f", odds divided by {task.positive_weights}"
            return f"chance of each label = sigmoid(output){weights}"
        case _:
            return f"see medfed.models.tasks, kind {task.kind}"
    steps = [seen]
    if task.priors is not None:
        steps.append(f"times the priors {task.priors}, normalised")
    if task.focusing is not None:
        steps.append(f"q / ((1 - q)^g - g (1 - q)^(g - 1) q log q) with g = {task.focusing:g} (focal loss), normalised")
    if task.class_weights is not None:
        steps.append(f"divided by the class weights {task.class_weights}, normalised")
    return "; then ".join(steps)
