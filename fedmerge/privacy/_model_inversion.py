"""What does a trained network take for a class? Model inversion, with the statistics of BatchNorm as a prior."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge._arguments import checked
from fedmerge._check import check_number, check_params
from fedmerge.data import Images
from fedmerge.privacy._drawing import Canvas, Reconstruction


@checked
def invert_model(
    model: nn.Module,
    params: Mapping[str, Tensor],
    data: Images,
    *,
    labels: Tensor,
    total_variation: float = 0.1,
    norms: float = 0.1,
    iterations: int = 500,
    rate: float = 0.1,
    restarts: int = 1,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Reconstruction:
    r"""Images in which a trained network sees the classes ``labels``: what it knows of them without any update.

    Lowers over x in the box of valid pixels

    .. math:: \mathrm{CE}(y, p(x)) + \tau \, \mathrm{TV}(x)
              + \nu \sum_l \|\mu_l(x) - \bar\mu_l\| + \|\sigma^2_l(x) - \bar\sigma^2_l\|,

    where the last term is over the BatchNorms of the network, if it has any: mean and variance of each unit over the
    batch x against those that the network keeps of its training images. As in :func:`invert_update` for the rest.

    Fredrikson, Jha, Ristenpart, "Model Inversion Attacks that Exploit Confidence Information and Basic
    Countermeasures", CCS 2015, with the priors of Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via
    DeepInversion", CVPR 2020, arXiv:1912.08795, equations 2 to 4, without its shifts of the image, its L2 norm and its
    student. Networks that differ by a permutation of units, as aligned ones do, give the same images.

    Args:
        model: The network; its own weights do not matter.
        params: Its state dict: a client's, or a merged one.
        data: As in :func:`invert_update`.
        labels: Int64 ``(n,)``: the class of each image that is wanted.
        total_variation: Weight of that prior.
        norms: Weight of the statistics of BatchNorm.
        iterations: Steps of the attack.
        rate: Of these, at first.
        restarts: Beginnings.
        generator: A CPU generator.
        device: Where to compute.

    Raises:
        ConfigError: A number outside its range.
        DataError: ``data`` are no images, the network does not take them, no label, or one that names no class.
        ParamsError: A state dict of another network.

    Cost: ``restarts * iterations`` forward and backward passes of n images.

    Example:
        >>> from fedmerge.privacy import invert_model
        >>> digits = fm.data.load("digits").train.select(range(300))
        >>> model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0, width=32)
        >>> recipe, stream = fm.models.recipe("mlp"), torch.Generator().manual_seed(0)
        >>> params = fm.train(model, model.state_dict(), digits, recipe=recipe, epochs=10, generator=stream).params
        >>> found = invert_model(
        ...     model, params, digits, labels=torch.arange(10), iterations=100, generator=stream
        ... )
        >>> pixels = (found.images * 255).round().to(torch.uint8)
        >>> drawn = dataclasses.replace(digits, images=pixels, labels=found.labels)
        >>> fm.predict(model, params, drawn).argmax(1).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    check_number("norms", norms, 0)
    check_params([params])
    canvas = Canvas(model, params, data, device)
    labels = canvas.labels(labels, len(labels))
    seen: list[Tensor] = []
    for layer in canvas.network.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            layer.register_forward_pre_hook(lambda norm, given: seen.append(_beside(norm, given[0])))

    def unlike(x: Tensor) -> Tensor:
        seen.clear()
        cost = F.cross_entropy(canvas.network(x), labels)
        return cost + norms * torch.stack(seen).sum() if seen else cost

    return canvas.drawn(
        unlike, labels, total_variation=total_variation, iterations=iterations, rate=rate, restarts=restarts,
        generator=generator,
    )  # fmt: skip


def _beside(norm: _BatchNorm, given: Tensor) -> Tensor:
    """How far mean and variance of what a BatchNorm is given are from those that it keeps."""
    others = [axis for axis in range(given.dim()) if axis != 1]
    variance, mean = torch.var_mean(given, others, correction=0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    apart: Tensor = (mean - norm.running_mean).norm() + (variance - norm.running_var).norm()
    return apart
