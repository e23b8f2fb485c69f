"""Merging of checkpoints without any federation: safetensors in, safetensors out."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedmerge import data, fold_norms, merge, models, open_params, perm_spec, repair
from fedmerge._streams import numpy_stream
from fedmerge.align import needs_images
from fedmerge.errors import ConfigError, ParamsError
from fedmerge.merge import Merge, ordered, takes

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A network to merge, and an input that it takes.

    Attributes:
        model: The network; its weights do not matter.
        example: A batch of one, float32 ``(1, C, H, W)``.
        images: Images to correct statistics on; None if no data set was named.
    """

    model: nn.Module
    example: Tensor
    images: data.Images | None


def architecture(
    name: str,
    *,
    dataset: str = "",
    classes: int = 10,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    width: float = 0,
    kernel_size: int = 0,
) -> Architecture:
    """The network called ``name``, or what ``module:factory`` returns when it is called without arguments.

    A data set gives shape, classes and images; without one, ``input_shape`` and ``classes`` count.

    Raises:
        UnknownNameError: No such model or data set.
        ConfigError: A factory that cannot be imported or does not return a module.
    """
    images = data.load(dataset).train if dataset else None
    shape = images.shape if images is not None else input_shape
    if ":" in name:
        module, _, factory = name.partition(":")
        try:
            model = getattr(importlib.import_module(module), factory)()
        except (ImportError, AttributeError, TypeError) as error:
            raise ConfigError(f"model {name!r}: {error}; expected module:factory without arguments") from error
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model {name!r} returned a {type(model).__name__}; expected a torch.nn.Module")
    else:
        number = len(images.classes) if images is not None else classes
        model = models.build(name, classes=number, in_shape=shape, width=width, kernel_size=kernel_size, seed=0)
    return Architecture(model, torch.zeros(1, *shape), images)


def load(paths: Sequence[Path], model: nn.Module) -> list[Params]:
    """The checkpoints ``paths``, left on the disk, each held against the tensors of ``model``.

    Raises:
        RunDirectoryError: A file that is no safetensors.
        ParamsError: Names the file, the tensor, what was given and what is expected.
    """
    expected = model.state_dict()
    found: list[Params] = []
    for path in paths:
        params = open_params(path)
        for name in expected:
            if name not in params:
                raise ParamsError(f"{path} lacks tensor {name!r} {tuple(expected[name].shape)}; is --model right?")
            if params[name].shape != expected[name].shape:
                raise ParamsError(
                    f"{path}: tensor {name!r} has shape {tuple(params[name].shape)}, the model has "
                    f"{tuple(expected[name].shape)}; is --model, --width or --dataset right?"
                )
        extra = sorted(set(params) - set(expected))
        if extra:
            raise ParamsError(f"{path} has a tensor {extra[0]!r} that the model lacks; is --model right?")
        bad = [name for name, t in params.items() if t.is_floating_point() and not bool(t.isfinite().all())]
        if bad:
            raise ParamsError(f"{path}: tensor {bad[0]!r} holds NaN or infinite values; leave that checkpoint out")
        whole = [
            name for name in expected if params[name].dtype.is_floating_point != expected[name].is_floating_point()
        ]
        if whole:
            raise ParamsError(
                f"{path}: tensor {whole[0]!r} is {params[whole[0]].dtype}, the model has {expected[whole[0]].dtype}; "
                "convert it before merging"
            )
        found.append(params)
    return found


def merge_checkpoints(
    paths: Sequence[Path],
    out: Path,
    network: Architecture,
    *,
    weights: Sequence[float] | None = None,
    merger: str = "merge-many",
    aligner: str = "weight-matching",
    repairing: str = "none",
    fold: bool = False,
    base: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Merge:
    """Merge the checkpoints ``paths`` into ``out``; ``base`` is where their training began, for mergers of steps.

    ``fold`` carries BatchNorm into the weights before it, at the end; ``say`` hears what was folded and what was not.

    Raises:
        ParamsError: Fewer than two checkpoints, or one that does not fit.
        ConfigError: ``out`` exists, a correction of statistics without images, or a merger of steps without base.
    """
    if len(paths) < 2:
        raise ParamsError(f"{len(paths)} checkpoint was given; merging needs at least 2")
    if out.exists():
        raise ConfigError(f"{out} exists; choose another -o")
    looks = {f"--repair {repairing}": repairing != "none", f"--aligner {aligner}": needs_images(aligner)}
    looks[f"--merger {merger}"] = "data" in takes(merger)
    if network.images is None and any(looks.values()):
        what = next(option for option, looking in looks.items() if looking)
        raise ConfigError(f"{what} needs images; name a data set with --dataset")
    if ("base" in takes(merger)) != (base is not None):
        needs = "needs the network that all checkpoints were trained from; name its file with --base"
        raise ConfigError(f"--merger {merger} {needs if base is None else 'takes no --base; leave it out'}")
    given = load(paths, network.model)
    spec = perm_spec(network.model, network.example)
    images = network.images.select(range(min(len(network.images), 5000))) if network.images is not None else None
    options = {"model": network.model, "data": images} if needs_images(aligner) else None
    rng = numpy_stream(seed, "merge")
    supplies: dict[str, object] = {"model": network.model, "data": images}
    if base is not None:
        supplies["base"] = load([base], network.model)[0]
    supplies = {name: value for name, value in supplies.items() if name in takes(merger)}
    found = merge(
        given, spec=spec, method=merger, weights=weights, rng=rng, aligner=aligner, aligner_options=options, **supplies
    )
    if found.left:
        say(f"units that the method could not compare, left in their order: {', '.join(found.left)}")
    params = found.params
    if repairing != "none" and images is not None:
        sources = ordered(given, found, spec=spec)
        params = repair(network.model, params, data=images, method=repairing, sources=sources, weights=weights)
    if fold:
        folding = fold_norms(network.model, params, network.example)
        params = folding.params
        say(f"BatchNorm layers folded: {len(folding.folded)} whole, {len(folding.partly)} in part")
        for name, why in {**folding.partly, **folding.kept}.items():
            say(f"{'left in' if name in folding.partly else 'not folded:'} {name}: {why}")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in params.items()}, out)
    return found
