"""Networks of torchvision by name."""

from typing import Any

import torch
from torch import nn

from fedmerge.errors import ConfigError

Shape = tuple[int, int, int]


def from_torchvision(name: str, classes: int, in_shape: Shape) -> nn.Module:
    """One of torchvision's models, tried on one image: most have a smallest size that they do not tell."""
    import torchvision.models

    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options["image_size"] = in_shape[1]
    if name in ("googlenet", "inception_v3"):  # one output, and no warning about their slow initialisation
        options.update(aux_logits=False, init_weights=True)
    try:
        model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
        with torch.no_grad():
            model.eval()(torch.zeros(1, *in_shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"torchvision's {name} cannot take images of shape {in_shape}: {reason}") from error
    return model.train()
