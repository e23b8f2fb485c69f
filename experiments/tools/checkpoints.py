"""Merging of checkpoints without any federation: safetensors in, safetensors out."""

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from experiments.tools.layers import check_layers, weighed
from fedmerge import data, fold_norms, merge, models, open_params, perm_spec, repair
from fedmerge.align import ALIGNERS, needs_images
from fedmerge.errors import ConfigError, ParamsError
from fedmerge.memory import usable_memory
from fedmerge.merge import MERGERS, Merge, ordered, takes
from fedmerge.normalisation import REPAIRS
from fedmerge.streams import numpy_stream
from fedmerge.tasks import state_of
from fedmerge.types import Params


@dataclass(frozen=True)
class Architecture:
    """A network to merge, and an input that it takes.

    Attributes:
        model: The network; its weights do not matter.
        example: A batch of one, float32 ``(1, C, H, W)`` where no data set was named.
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
    """The network called ``name``, which may be one of the user's own and need not classify.

    A data set gives shape, classes and images; without one, ``input_shape`` and ``classes`` count.

    Raises:
        UnknownNameError: No such model or data set.
        ConfigError: One of the user's own that cannot be imported, raises, or is no module.
    """
    images = data.load(dataset).train if dataset else None
    shape = images.shape if images is not None else input_shape
    if min(shape, default=1) < 1 or 4 * math.prod(shape) > usable_memory():
        raise ConfigError(f"images of shape {shape}: expected a positive (C, H, W) that fits into memory")
    number = len(images.classes) if images is not None else classes
    model = models.build(
        name,
        classes=number,
        in_shape=shape,
        width=width,
        kernel_size=kernel_size,
        seed=0,
        classifies=False,
        rows=images,
    )
    return Architecture(
        model, torch.zeros(1, *shape) if images is None else images.normalise(images.images[:1]), images
    )


def load(paths: Sequence[Path], model: nn.Module) -> list[Params]:
    """The checkpoints ``paths``, left on the disk, each held against the tensors of ``model``.

    Names are read as they are where they are the model's, else as those of the network inside ``DataParallel``,
    ``DistributedDataParallel`` or ``torch.compile``.

    Raises:
        RunDirectoryError: A file that is no safetensors.
        ParamsError: Names the file, the tensors, what was given and what is expected.
    """
    expected = state_of(model)
    places = [(name, (t.data_ptr(), t.shape, t.stride())) for name, t in expected.items() if t.numel()]
    shared = {name: other for name, place in places for other, its in places if name != other and place == its}
    found: list[Params] = []
    for path in paths:
        params = open_params(path, unwrap=False)
        if set(params) != set(expected):
            params = open_params(path)
        for name, other in shared.items():
            if name not in params and other in params:
                params.tie(name, other)
        missing, extra = ([n for n in one if n not in two] for one, two in ((expected, params), (params, expected)))
        if missing:
            raise ParamsError(
                f"{path} lacks tensor {_some(f'{name!r} {tuple(expected[name].shape)}' for name in missing)}"
                + (f", it has {_some(map(repr, extra))} instead" if extra else "")
                + _prefix_hint(missing, extra, path)
            )
        if extra:
            raise ParamsError(f"{path} has a tensor {_some(map(repr, extra))} that the model lacks; is --model right?")
        for name, tensor in params.items():
            if tensor.shape != expected[name].shape:
                raise ParamsError(
                    f"{path}: tensor {name!r} has shape {tuple(tensor.shape)}, the model has "
                    f"{tuple(expected[name].shape)}; is --model, --width, --classes or --dataset right?"
                )
            if tensor.is_floating_point() != expected[name].is_floating_point():
                raise ParamsError(
                    f"{path}: tensor {name!r} is {tensor.dtype}, the model has {expected[name].dtype}; "
                    "convert it before merging"
                )
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ParamsError(f"{path}: tensor {name!r} holds NaN or infinite values; leave that checkpoint out")
        found.append(params)
    return found


def _some(names: Iterable[str]) -> str:
    first = list(itertools.islice(names, 4))
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def _prefix_hint(missing: Sequence[str], extra: Sequence[str], path: Path) -> str:
    """What may be wrong where names do not fit."""
    for name in extra:
        if name.endswith(f".{missing[0]}"):
            prefix = name.removesuffix(missing[0])
            return f"; its names begin with {prefix!r}: take that off before every name"
    if re.search(r"-\d+-of-\d+$", path.stem):
        return "; it is one part of a sharded checkpoint: name its index, *.index.json, instead"
    return "; is --model right?"


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
    layers: Sequence[Mapping[str, float]] = (),
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Merge:
    """Merge the checkpoints ``paths`` into ``out``; ``base`` is where their training began, for mergers of steps.

    ``fold`` carries BatchNorm into the weights before it, at the end; ``say`` hears what was folded and what was not.
    ``layers`` are weights of single tensors, see :func:`experiments.tools.layers.weighed`. ``options`` are the
    merger's own. Floating-point tensors are written as ``dtype``, or as those of the first checkpoint.

    Raises:
        ParamsError: Fewer than two checkpoints, one that does not fit, or a merged network that is not finite.
        ConfigError: ``out`` exists, a correction of statistics without images, a merger of steps without base, an
            option that the merger is given anyway, or patterns that name no tensor.
    """
    if len(paths) < 2:
        raise ParamsError(f"{len(paths)} checkpoint was given; merging needs at least 2")
    _check_output(out)
    _check_options(merger, options or {})
    REPAIRS.find(repairing)
    ALIGNERS.find(aligner)
    check_layers(layers, state_of(network.model), merger)
    aligns = "aligner" in MERGERS.find(merger).reads
    if not aligns and aligner != "weight-matching":
        say(f"note: --merger {merger} takes nothing of --aligner {aligner}")
    blind = repairing in REPAIRS and "data" not in REPAIRS[repairing].needs
    looks = {f"--repair {repairing}": not blind, f"--aligner {aligner}": aligns and needs_images(aligner)}
    looks[f"--merger {merger}"] = "data" in takes(merger)
    if network.images is None and any(looks.values()):
        what = next(option for option, looking in looks.items() if looking)
        raise ConfigError(f"{what} needs images; name a data set with --dataset, or dataset in a recipe")
    if ("base" in takes(merger)) != (base is not None):
        needs = "needs the network that all checkpoints were trained from; name its file with --base"
        raise ConfigError(f"--merger {merger} {needs if base is None else 'takes no --base; leave it out'}")
    for path, times in Counter(path.resolve() for path in paths).items():
        if times > 1:
            say(f"note: {path} is given {times} times and counts so often")
    given = load(paths, network.model)
    spec = perm_spec(network.model, network.example)
    images = network.images.first(5000) if network.images is not None else None
    looking = {"model": network.model, "data": images} if aligns and needs_images(aligner) else None
    rng = numpy_stream(seed, "merge")
    supplies: dict[str, object] = {"model": network.model, "data": images}
    if base is not None:
        supplies["base"] = load([base], network.model)[0]
    supplies = {name: value for name, value in supplies.items() if name in takes(merger)}
    supplies |= options or {}
    found = merge(
        given, spec=spec, method=merger, weights=weights, rng=rng, aligner=aligner, aligner_options=looking, **supplies
    )
    if any(layers):
        found = weighed(
            given, found, layers, network.model, spec=spec, method=merger, weights=weights, rng=rng, **supplies
        )
    if found.left:
        say(f"units that the method could not compare, left in their order: {', '.join(found.left)}")
    params = found.params
    if repairing != "none":
        sources = ordered(given, found, spec=spec)
        # A correction from the weights alone reads no more of the data than their shape.
        looked = images if images is not None else data.as_data(network.example, network.model)
        params = repair(network.model, params, data=looked, method=repairing, sources=sources, weights=weights)
    if fold:
        folding = fold_norms(network.model, params, network.example)
        params = folding.params
        counts = f"folded: {len(folding.folded)} whole, {len(folding.partly)} in part"
        some = folding.folded or folding.partly or folding.kept
        say(f"BatchNorm layers {counts}" if some else "nothing folded: the network has no BatchNorm")
        for name, why in {**folding.partly, **folding.kept}.items():
            say(f"{'left in' if name in folding.partly else 'not folded:'} {name}: {why}")
    if dtype is not None:
        params = {name: t.to(dtype) if t.is_floating_point() else t for name, t in params.items()}
    for name, tensor in params.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ParamsError(
                f"tensor {name!r} of the merged network holds NaN or infinite values as {tensor.dtype}, so nothing is "
                "written; choose a dtype of more range, or other options of the merger"
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in _apart(params).items()}, out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{out} cannot be written ({error}); choose another -o") from error
    return found


_GIVEN = frozenset({"aligner", "aligner_options", "base", "data", "method", "model", "rng", "spec", "weights"})
"""What a merger is given by other keys than its options."""


def _check_options(merger: str, options: Mapping[str, Any]) -> None:
    for name in options:
        if name in _GIVEN:
            own = ", ".join(sorted({*MERGERS.find(merger).options} - _GIVEN)) or "none"
            raise ConfigError(f"options has {name!r}, which other keys decide; --merger {merger} has the options {own}")


def _check_output(out: Path) -> None:
    """Refuse, before anything long begins, an output that exists, cannot be written or would be taken for a pickle."""
    try:
        if out.exists():
            raise ConfigError(f"{out} exists; choose another -o")
        place = next(folder for folder in out.absolute().parents if folder.exists())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out} cannot be written ({error}); choose another -o") from error
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"{out} cannot be written ({place} is no folder that may be written); choose another -o")
    if out.suffix in (".bin", ".ckpt", ".pt", ".pth"):
        raise ConfigError(f"{out}: what is written is safetensors; name it {out.with_suffix('.safetensors')}")


def _apart(params: Params) -> Params:
    """Tensors that share no memory, which safetensors refuses: tied ones are written under each of their names."""
    seen: set[int] = set()
    found = {}
    for name, tensor in params.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found
