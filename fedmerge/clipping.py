"""Gradients of single images, clipped and blurred by Opacus, and whether what Opacus makes of a network is right."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fedmerge.errors import ConfigError, ParamsError

_ROWS = "each layer has to take and give a row an image, first axis first"
_BATCH = 4
_NEAR = {"cuda": 1e-2}
"""How far numbers that are to be equal may be apart, where not 1e-3: convolutions of a GPU round to ten bits."""
Once = Callable[[nn.Module, Sequence[int]], Tensor]
"""What a network answers to these of the images that it trains on, by number; beyond the last they begin anew."""
_Found = tuple[Tensor, list[tuple[Tensor, Tensor]]]
"""Answers to some images, and for each weight its gradient and what is kept of it for each image."""


def blurred(
    module: nn.Module, optimizer: torch.optim.Optimizer, *, noise: float, clip: float, expected: float,
    generator: torch.Generator, once: Once,
) -> "Blurred":  # fmt: skip
    """:meth:`fedmerge.DPSGD.attach`, whose arguments these are."""
    check_private(module)
    opacus, device = load_opacus(), next(module.parameters()).device
    seeded = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
    for layer in module.modules():
        if isinstance(layer, (_ConvNd, nn.Embedding)):  # Opacus reads strides as if there were no others
            layer.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]) if given else given)
    ghost, how = _norms_alone(module, once), {"max_grad_norm": clip}
    wrap, stepping = (
        (opacus.grad_sample.GradSampleModuleFastGradientClipping, "DPOptimizerFastGradientClipping")
        if ghost
        else (opacus.GradSampleModule, "DPOptimizer")
    )
    try:
        network = wrap(module, loss_reduction="mean", **(how if ghost else {}))
    except NotImplementedError as error:
        reason = error.args[0][0] if error.args and isinstance(error.args[0], list) else error
        raise ParamsError(f"{_refused(module)}: {' '.join(str(reason).split())}") from error
    private = getattr(opacus.optimizers, stepping)(
        optimizer, noise_multiplier=noise, expected_batch_size=expected, generator=seeded, **how
    )
    made = Blurred(network, private, ghost)
    made.check(once)
    return made


def _refused(module: nn.Module) -> str:
    return f"{type(module).__name__} cannot be trained under differential privacy"


@dataclass(frozen=True)
class Blurred:
    """A network in training whose gradients are clipped an image at a time, added up and blurred.

    Attributes:
        network: To be called in place of the network.
        ghost: Whether it asks for the norms of gradients alone.
    """

    network: Any
    _optimizer: Any
    ghost: bool

    def check(self, once: Once) -> None:
        """Refuse a network of which clipping would not bound, or noise not cover, what one image changes.

        In training mode, for that is how it trains: the gradient of an image has to be what the hooks of its layers
        make of it, the same whatever images stand beside it, and nothing but gradients may change with images.

        Raises:
            ParamsError: Names what is wrong, or what Opacus said.
        """
        module = self.network._module
        refused, device = _refused(module), next(module.parameters()).device
        kept = {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, Tensor)}
        with torch.random.fork_rng([device] if device.type == "cuda" else []), quiet():
            with torch.no_grad():
                once(module.eval(), [0])  # or it says why it takes none
            module.train()
            try:
                same, other = (self._found(once, rows) for rows in ([0] * _BATCH, range(_BATCH)))
                self._check_apart(refused, same, other)
                alone = self._found(once, [0])
            except (torch.OutOfMemoryError, ParamsError):
                raise
            except Exception as error:  # whatever hooks do not expect
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ParamsError(
                    f"{refused}: Opacus cannot tell the gradients of images apart in its layers ({reason}); {_ROWS}"
                ) from error
        moved = [key for key, value in module.state_dict().items() if key in kept and not value.equal(kept[key])]
        if moved:
            raise ParamsError(
                f"{refused}: {moved[0]!r} changes while the network looks at images, and no noise covers that; leave "
                "out what gathers statistics (max_norm of an embedding too)"
            )
        weights = [(key, w) for key, w in module.named_parameters() if w.requires_grad]
        whole = 1e-5 * torch.stack([true.norm() for true, _ in alone[1]]).norm()
        for (key, _), (true, seen) in zip(weights, alone[1], strict=True):
            apart = (seen[0] - true.norm()).abs() if self.ghost else (seen[0] - true).norm()
            if bool(apart > _NEAR.get(device.type, 1e-3) * true.norm() + whole):
                raise ParamsError(
                    f"{refused}: the gradient of {key!r} is not what its layer alone makes of an image, so clipping "
                    "would not bound what an image changes. Use a parameter only by calling the layer that holds it "
                    f"(weights that are tied: one layer, called twice); {_ROWS}"
                )
        self._forget()

    def _check_apart(self, refused: str, same: _Found, other: _Found) -> None:
        """Refuse a network that makes something else of the first image where others stand beside it."""
        whole = 1e-5 * torch.stack([true.norm() for true, _ in same[1]]).norm()
        pairs = [(same[0], other[0]), *((one, two) for (_, one), (_, two) in zip(same[1], other[1], strict=True))]
        for one, two in pairs:
            near = _NEAR.get(one.device.type, 1e-3)
            if len(one) != _BATCH or bool((one[0] - two[0]).norm() > near * one[0].norm() + whole):
                raise ParamsError(
                    f"{refused}: what it makes of an image depends on the others of a batch; take a network in which "
                    f"they do not meet; {_ROWS}"
                )

    def _found(self, once: Once, rows: Sequence[int]) -> _Found:
        """What the network in training makes of these images; random draws begin anew."""
        torch.manual_seed(0)
        answers = once(self.network, rows)
        slope = torch.randn(answers[0].shape, generator=torch.Generator().manual_seed(0)).to(answers)
        self._forget()
        torch.autograd.backward(answers, slope.expand_as(answers) / len(answers))
        self._complete(len(rows))
        found = [(w.grad, w._norm_sample if self.ghost else w.grad_sample) for w in self._optimizer.params]
        return answers.detach(), [(true.clone(), seen.clone()) for true, seen in found]

    def _forget(self) -> None:
        """What hooks found in the step before."""
        self._optimizer.zero_grad()
        for weight in self._optimizer.params:
            weight.grad_sample = weight._norm_sample = None

    def _complete(self, count: int) -> None:
        """The gradients of ``count`` images by parameters that they did not use, and by rows that are held: zero."""
        for weight in self._optimizer.params:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            if weight.grad_sample is None and not self.ghost:
                weight.grad_sample = weight.new_zeros(count, *weight.shape)
            if weight._norm_sample is None:
                weight._norm_sample = weight.new_zeros(count)
        for weight, row in self._held:
            if not self.ghost:
                weight.grad_sample[:, row] = 0

    @property
    def _held(self) -> list[tuple[Any, int]]:
        """Rows of tables that stand for no word, which training leaves alone."""
        tables = [m for m in self.network.modules() if isinstance(m, nn.Embedding) and m.weight.requires_grad]
        return [(table.weight, table.padding_idx) for table in tables if table.padding_idx is not None]

    def backward(self, loss: Tensor, answers: Tensor) -> None:
        """Set the gradient of each parameter, from the mean ``loss`` over a batch of ``answers``, a row an image."""
        self._forget()
        if self.ghost:
            (slope,) = torch.autograd.grad(loss, answers)
            torch.autograd.backward(answers, slope, retain_graph=True)  # hooks take the norms
            self._complete(len(answers))
            shares = len(slope) * self.network.get_clipping_coef()  # the loss is a mean, what is clipped a sum
            self._optimizer.zero_grad()
            self.network.disable_hooks()
            torch.autograd.backward(answers, slope * shares.view(-1, *[1] * (slope.dim() - 1)))
            self.network.enable_hooks()
        else:
            torch.autograd.backward(loss)
        self._complete(len(answers))
        self._optimizer.pre_step()
        for weight, row in self._held:
            weight.grad[row] = 0


def _norms_alone(module: nn.Module, once: Once) -> bool:
    """Whether linear layers hold most weights of ``module`` and no layer is used twice, as ghost clipping asks."""
    if any(isinstance(m, nn.Embedding) and m.padding_idx is not None for m in module.modules()):
        return False  # norms alone would count the row that is not trained
    layers = [m for m in module.modules() if any(w.requires_grad for w in m.parameters(recurse=False))]
    held = [sum(w.numel() for w in m.parameters(recurse=False) if w.requires_grad) for m in layers]
    linear = sum(n for m, n in zip(layers, held, strict=True) if type(m) is nn.Linear)
    shared = sum(held) > sum(w.numel() for w in module.parameters() if w.requires_grad)
    if shared or 2 * linear < sum(held):
        return False
    uses = dict.fromkeys(layers, 0)

    def used(layer: nn.Module, _: object, answer: object) -> None:
        uses[layer] += 2 if isinstance(layer, nn.Linear) and isinstance(answer, Tensor) and answer.dim() > 3 else 1

    hooks = [layer.register_forward_hook(used) for layer in layers]
    training = {m: m.training for m in module.modules()}
    try:
        with torch.no_grad():
            module.eval()
            once(module, [0])
    finally:
        for hook in hooks:
            hook.remove()
        for m, mode in training.items():
            m.training = mode
    return set(uses.values()) <= {0, 1}


def check_private(module: nn.Module) -> None:
    """Refuse a network whose images of a batch are not apart.

    Raises:
        ParamsError: Says why, and what to take instead.
        ConfigError: Opacus is not installed.
    """
    training = module.training
    found = load_opacus().validators.ModuleValidator.validate(module.train(), strict=False)
    module.train(training)
    refused = _refused(module)
    if found:
        reason = str(found[0]).split(". ")[0]
        instead = (
            "Take a network without normalisation over the batch, such as mlp, cnn or resnet20-layernorm, or one of "
            "your own with GroupNorm or LayerNorm"
            if "Norm" in reason
            else "Take the layer of opacus.layers in its place"
        )
        raise ParamsError(f"{refused}: {reason}. {instead}")
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):  # of a kind of its own, which Opacus does not know
            raise ParamsError(
                f"{refused}: {name!r} normalises over the batch. Take GroupNorm or LayerNorm in its place"
            )
        if isinstance(layer, _ConvNd) and layer.padding_mode != "zeros":
            raise ParamsError(
                f"{refused}: {name!r} pads by {layer.padding_mode!r}, and Opacus takes its gradients as if by zeros. "
                "Pad by torch.nn.functional.pad, before a convolution without padding"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Without two warnings of what is meant to be so.

    Images ask for no gradient, at which torch wonders; and Opacus says where other orders would give a tighter bound.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def load_opacus() -> Any:
    """Opacus, or a line that says how to get it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import opacus
            import opacus.validators
    except ImportError as error:
        raise ConfigError(
            'training under differential privacy needs Opacus, and there is none: pip install "fedmerge[privacy]"'
        ) from error
    return opacus
