"""Low-rank adapters: a pretrained linear layer stays as it is, and a small detour beside it is trained.

For own models that bring pretrained weights in their package (docs/own_models.md): fewer numbers are trained, so there is less
noise in all, and an upload is shorter. *Source* Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from medfed.errors import UnsupportedModel


class LoraLinear(nn.Module):
    """base(x) + scale * up(down(x)): of ``nn.Linear`` layers alone, so that the gradient engine sees all of it.

    ``base`` is frozen, and no part of an upload or a model file. ``up`` begins at zero: at first nothing is changed.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.scale = scale
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.base(inputs) + self.scale * self.up(self.down(inputs))
        return result


def adapt(model: nn.Module, rank: int, *, trained: Collection[str] = (), scale: float = 1.0) -> int:
    """Freeze ``model`` and put a ``LoraLinear`` of ``rank`` in the place of every ``nn.Linear``; returns how many.

    ``trained``: names of layers that are trained as they are, with all inside, such as a new head. Raises ``UnsupportedModel``
    (MF-160) for a name that is no layer, and if nothing would be adapted.
    """
    layers = dict(model.named_modules())
    for name in trained:
        if name not in layers:
            raise UnsupportedModel(160, f"there is no layer {name} to train", f"name one of {', '.join(layers)[:200]}")
    kept = {inner for name in trained for inner in layers[name].modules()}
    model.requires_grad_(False)
    for layer in kept:
        layer.requires_grad_(True)
    found = [
        (parent, name, layer)
        for parent in layers.values()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and layer not in kept and not isinstance(parent, LoraLinear)
    ]
    if not found:
        raise UnsupportedModel(160, "the model has no linear layer to adapt", "train it as it is")
    for parent, name, layer in found:
        setattr(parent, name, LoraLinear(layer, rank, scale))
    return len(found)
