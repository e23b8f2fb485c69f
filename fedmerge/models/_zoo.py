"""Networks by name: what can be asked for, and what is built."""

import difflib
import math
import sys
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fedmerge._called import Forward, called
from fedmerge.data import Images
from fedmerge.errors import ConfigError, FedmergeError, ResourceError, UnknownNameError
from fedmerge.memory import usable_memory
from fedmerge.models._entries import MODELS, Model
from fedmerge.models._recipe import Recipe
from fedmerge.models._torchvision import from_torchvision

_TORCHVISION = Recipe(lr=0.05, weight_decay=1e-4, batch_size=64, schedule="cosine", warmup=0.1, augment=True)


def names() -> tuple[str, ...]:
    """Names of the networks of this package; :func:`build` takes torchvision's names as well.

    Example:
        >>> {"mlp", "cnn", "hlb"} <= set(fm.models.names())
        True
    """
    return tuple(MODELS)


def summaries() -> dict[str, str]:
    """Model name -> one line about it, with the unit of its width.

    Example:
        >>> "mlp" in fm.models.summaries()
        True
    """
    ours = {name: f"{model.summary}; {model.unit()}" for name, model in MODELS.items()}
    theirs = "any torchvision classification model by its name, such as mobilenet_v3_small; no width"
    return {**ours, "<torchvision>": theirs}


def width_units() -> str:
    """What a width means for each model, in one phrase.

    Example:
        >>> "hidden units" in fm.models.width_units()
        True
    """
    counted = [f"{name}: {model.counts}" for name, model in MODELS.items() if model.counts]
    return f"in the model's own unit ({', '.join(counted)}, others: a factor of all layers)"


def check_options(
    name: str, *, width: float = 0, kernel_size: int = 0, bias: bool | None = None
) -> dict[str, float | bool]:
    """Every option of a model, the given ones in place of its own; see :func:`build`.

    Raises:
        UnknownNameError: No model has this name.
        ConfigError: An option that the model does not have, or a value that it cannot have.

    Example:
        >>> try:
        ...     fm.models.check_options("mlp", kernel_size=5)
        ... except fm.FedmergeError as error:
        ...     print(error)
        model 'mlp' has no option kernel_size (given 5); it takes width
    """
    model = _find(name)
    options = dict(model.options)
    asked = {"width": width or None, "kernel_size": kernel_size or None, "bias": bias}
    for option, given in asked.items():
        if given is None:
            continue
        if option not in options:
            takes = ", ".join(options) or "no options"
            raise ConfigError(f"model {name!r} has no option {option} (given {given}); it takes {takes}")
        if option == "bias":
            options[option] = given
            continue
        whole = option == "kernel_size" or bool(model.counts)
        least = 2 if option == "width" and whole else 1
        number = isinstance(given, Real) and not isinstance(given, bool) and math.isfinite(given)
        if not number or given <= 0 or (whole and (given != int(given) or given < least)):
            expected = f"a whole number of at least {least}" if whole else "a number above 0"
            what = f" ({model.unit()})" if option == "width" else ""
            raise ConfigError(
                f"{option} of model {name!r} is {given!r}{what}; expected {expected}, or 0 for the default"
            )
        options[option] = int(given) if whole else given
    return options


def build(
    name: str,
    *,
    classes: int,
    in_shape: tuple[int, ...],
    seed: int,
    width: float = 0,
    kernel_size: int = 0,
    bias: bool | None = None,
    classifies: bool = True,
    rows: Images | None = None,
) -> nn.Module:
    """A freshly initialised network from float32 images ``(N, C, H, W)`` to logits ``(N, classes)``.

    One from outside may take other rows, of which ``in_shape`` is the shape.

    Its weights depend on the arguments only; the global generator is left as it was.

    Args:
        name: One of :func:`names`, a torchvision classification model, or ``module:factory`` of your own.
        classes: Number of classes.
        in_shape: ``(C, H, W)`` of one image, or the shape of a row.
        seed: Of the initial weights.
        width: In the unit that the model's summary says: hidden units a layer, base channels, or a factor of
            all layers; 0 for its default.
        kernel_size: Of its convolutions; 0 for the model's default.
        bias: Whether layers have biases; None for the model's default.
        classifies: Whether a network from outside is refused that gives no logits for such images.
        rows: What it is tried on then, and called on from then on; a black image if None.

    Raises:
        UnknownNameError: No model has this name.
        ConfigError: The model has no such option or cannot have this value, or cannot take images of this shape; or
            one from outside is no such network.
        ResourceError: Its weights do not fit into memory.

    Example:
        >>> model = fm.models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=0, width=32)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    sizes, outside = (classes, *in_shape), MODELS.brought(name)
    if (len(sizes) != 4 and not outside) or not all(isinstance(n, Integral) and n >= 1 for n in sizes):
        raise ConfigError(
            f"model {name!r} for {classes} classes and images of shape {in_shape}; "
            "expected at least 1 class and a positive (C, H, W), or a model of your own (module:factory) for other rows"
        )
    model, options = _find(name), check_options(name, width=width, kernel_size=kernel_size, bias=bias)
    make = partial(model.make, classes, tuple(in_shape), **options)
    with torch.random.fork_rng(devices=[]):
        if model.options:
            _check_size(name, model, make, width)
        torch.default_generator.manual_seed(seed)
        if not outside:
            return make()
        given = torch.zeros(1, *in_shape) if rows is None else rows.normalise(rows.images[:1])
        return _made(name, make, given, classes if classifies else 0, None if rows is None else rows.forward)


def _made(
    name: str, make: Callable[[], object], given: Any, classes: int = 0, forward: Forward | None = None
) -> nn.Module:
    """The network that ``make`` returns, which is from outside and may do anything.

    Args:
        name: What the user called it.
        make: Makes it.
        given: A batch of one that it must take.
        classes: How many logits it must give for it; 0 if it need not take images at all.
        forward: How it is called on a batch.

    Raises:
        ConfigError: It is none, or none for such images; says what it is.
    """
    what, found = f"model {name!r}", None
    shapes = [tuple(t.shape) for t in pytree.tree_leaves(given)]
    shape = ", ".join(map(str, shapes))
    each = ", ".join(str(one[1:]) for one in shapes)
    expected = f"a function that returns a torch.nn.Module for images of shape {each}"
    try:
        model = make()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{what} returned a {type(model).__name__}; expected a torch.nn.Module")
        model = called(model, forward)
        if classes:
            mode = model.training
            with torch.no_grad():
                found = model.eval()(given)
            model.train(mode)
    except FedmergeError:
        raise
    except Exception as error:  # whatever a user's module does
        reason = " ".join(str(error).split())
        raise ConfigError(f"{what} failed with {type(error).__name__}: {reason}; expected {expected}") from error
    if classes and (not isinstance(found, torch.Tensor) or found.shape != (1, classes)):
        got = f"shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        raise ConfigError(
            f"{what} gives {got} for images of shape {shape}; expected logits {(1, classes)}, one a class"
        )
    return model


def _check_size(name: str, model: Model, make: Callable[[], nn.Module], width: float) -> None:
    """Make the network without memory for its weights, and refuse one that does not fit into what there is."""
    said = f"width of model {name!r} is {width:g} ({model.unit()})" if width else f"model {name!r}"
    try:
        with torch.device("meta"):
            size = 4 * sum(weight.numel() for weight in make().parameters())
    except ConfigError as error:
        raise ConfigError(f"{said}: {error}" if str(error).startswith("leaves") else str(error)) from error
    except (RuntimeError, OverflowError, TypeError, ValueError):  # sizes that no integer of torch holds
        size = sys.maxsize
    free = usable_memory()
    if size > free:
        raise ResourceError(
            f"{said}: its weights need {size / 2**30:.3g} GiB or more, {free / 2**30:.3g} GiB are free; "
            "give a smaller width, smaller images or fewer classes"
        )


def recipe(name: str) -> Recipe:
    """How the model called ``name`` is trained by default; :class:`UnknownNameError` if there is none.

    Example:
        >>> fm.models.recipe("mlp").optimizer
        'sgd'
    """
    return _find(name).recipe


def initialise_from(model: nn.Module, images: Images) -> None:
    """Let ``model`` set its data-dependent weights, in place; most models have none and are left alone.

    Example:
        >>> digits = fm.data.load("digits").train
        >>> model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0)
        >>> fm.models.initialise_from(model, digits)  # nothing to do: an mlp has no weights that depend on data
    """
    hook = getattr(model, "initialise_from", None)
    if hook is not None:
        hook(images)


def _find(name: str) -> Model:
    if MODELS.knows(name):
        return MODELS[name]
    import torchvision.models

    theirs = torchvision.models.list_models(module=torchvision.models)
    if name not in theirs:
        near = difflib.get_close_matches(name, theirs, n=1, cutoff=0.75)
        raise UnknownNameError("model", name, {*MODELS, *near, *(plugin.name for plugin in MODELS.plugins())})
    return Model(name, partial(from_torchvision, name), "of torchvision", recipe=_TORCHVISION)
