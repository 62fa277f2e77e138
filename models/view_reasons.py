"""Where a model of several views looked: how much each view counted, and which places of it raised the output."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medfed.models.attribution import Asked
from medfed.models.multi_view import MultiView
from medfed.models.reasons import Floats


def view_weights(asked: Asked) -> Floats | None:
    """What attention gave each view: float64[views], together 1; None for a model of another make."""
    if not isinstance(asked.model, MultiView):
        return None
    with torch.no_grad():
        return np.asarray(asked.model.weights(asked.inputs)[0].double().numpy())


def grad_cam_of_views(asked: Asked) -> Floats | None:
    """Grad-CAM of each view at the encoder's last layer: float64[views, height, width], 0 to 1 over all of them together.

    A channel's weight is its gradient's mean over one view, so that what another view says does not count here.
    """
    if not isinstance(asked.model, MultiView):
        return None
    seen: list[Tensor] = []
    hook = asked.model.encoder.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    try:
        outputs = asked(asked.inputs)
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(outputs.sum(), seen[0])
    raising = functional.relu((gradient.mean(dim=(3, 4), keepdim=True) * seen[0]).sum(1)).detach()
    size = [int(side) for side in asked.inputs.shape[2:]]
    wide = functional.interpolate(raising, size=size, mode="bilinear", align_corners=False)[0].double().numpy()
    return np.asarray(wide / wide.max()) if wide.max() > 0 else np.zeros_like(wide)
