"""What a training is given, checked before its first step."""

from collections.abc import Mapping

import torch
from torch import nn

from fedmerge.data import Images
from fedmerge.errors import ConfigError, DataError, ParamsError


def shifts_of(
    module: nn.Module, correction: Mapping[str, torch.Tensor], device: torch.device
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The trained parameters that ``correction`` names, each with what is added to its gradient."""
    parameters = dict(module.named_parameters())
    for name, shift in correction.items():
        shown = tuple(shift.shape) if isinstance(shift, torch.Tensor) else f"a {type(shift).__name__}"
        if name not in parameters or shown != tuple(parameters[name].shape):
            expected = tuple(parameters[name].shape) if name in parameters else "no parameter of that name"
            raise ParamsError(f"the correction of {name!r} is {shown}; expected {expected}")
    return [(p, correction[name].to(device, p.dtype)) for name, p in parameters.items() if name in correction]


def frozen_of(
    module: nn.Module, frozen: Mapping[str, torch.Tensor], device: torch.device
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The trained parameters that ``frozen`` names, each with where it stays as it is."""
    parameters = dict(module.named_parameters())
    for name, where in frozen.items():
        kind = f"{where.dtype} {tuple(where.shape)}" if isinstance(where, torch.Tensor) else f"a {type(where).__name__}"
        if name not in parameters or kind != f"torch.bool {tuple(parameters[name].shape)}":
            shape = f"torch.bool {tuple(parameters[name].shape)}" if name in parameters else "no parameter of that name"
            raise ParamsError(f"what is frozen of {name!r} is {kind}; expected {shape}")
    return [(parameters[name], where.to(device)) for name, where in frozen.items() if parameters[name].requires_grad]


def check_labels(data: Images) -> None:
    """Refuse labels that name no class, where labels are needed."""
    wrong = data.unlabelled()
    if bool(wrong.any()):
        raise DataError(
            f"{int(wrong.sum())} of the {len(data)} labels of {data.name} name none of its {len(data.classes)} "
            f"classes, the first of them {int(data.labels[wrong][0])}; labels 0 to {len(data.classes) - 1} are needed"
        )


def check_training(
    data: Images,
    epochs: int,
    teacher: torch.Tensor | None,
    labels_weight: float,
    temperature: float,
    proximal_mu: float,
) -> None:
    """Refuse numbers out of their range, a teacher that does not fit, and no images at all."""
    if not len(data):
        raise DataError(f"{data.name} holds no images; nothing to train on")
    if epochs < 0:
        raise ConfigError(f"epochs is {epochs}; at least 0 is needed")
    if not 0 <= labels_weight <= 1:
        raise ConfigError(f"labels_weight is {labels_weight}; a number in [0, 1] is needed")
    if teacher is None and labels_weight != 1:
        raise ConfigError(f"labels_weight is {labels_weight} without a teacher; give a teacher or leave it at 1")
    expected = (*data.labels.shape, len(data.classes))
    if teacher is not None and teacher.shape != expected:
        raise ConfigError(
            f"teacher is {tuple(teacher.shape)}; expected {expected}: a probability per image of {data.name} and class"
        )
    if teacher is not None and not bool((teacher.sum(-1) - 1).abs().max() < 1e-3):
        raise ConfigError("the teacher's rows do not add up to 1; give softmax(logits / temperature)")
    if not temperature > 0 or not 0 <= proximal_mu < 1e30:
        raise ConfigError(
            f"temperature is {temperature} and proximal_mu {proximal_mu}; expected above 0, and 0 or above (below 1e30)"
        )
