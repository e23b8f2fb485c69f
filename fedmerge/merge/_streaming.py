"""Averages of networks that come one after the other, in bounded memory: SWA, EMA and LAWA."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn, get_swa_avg_fn

from fedmerge._arguments import checked
from fedmerge._check import check_number, check_params
from fedmerge._loading import beside_tensors, extra_states, laid_aside, with_versions
from fedmerge.errors import ConfigError, ParamsError
from fedmerge.merge._average import average
from fedmerge.registry import Entry, Registry
from fedmerge.types import Params


class RunningAverage(ABC):
    """An average of the state dicts that :meth:`update` has seen; :attr:`params` is what it is by now.

    Accumulated in float64. Buffers are averaged like parameters, so BatchNorm statistics should be recomputed
    (:func:`fedmerge.repair`) before the average is used; integers (``num_batches_tracked``) take their largest value.
    """

    count = 0
    """Networks seen."""

    @abstractmethod
    def update(self, params: Params) -> None:
        """Take in one more network, which is not kept or modified.

        Raises:
            ParamsError: It does not fit those before it.
        """

    @property
    @abstractmethod
    def params(self) -> dict[str, Tensor]:
        """The average, with the dtypes of the networks.

        Raises:
            ParamsError: No network was seen yet.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that is needed to go on later, as tensors by name."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor], like: Params) -> None:
        """Go on from :meth:`state`; ``like`` is any state dict of the architecture, for its dtypes."""

    def _seen(self) -> None:
        if not self.count:
            raise ParamsError("no network was seen yet; call update(params) first")


class _Accumulated(RunningAverage):
    """One accumulator, moved towards each network by ``rule(accumulator, network, count)``. Memory: one in float64."""

    def __init__(self, rule: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        self._rule = rule
        self._total: dict[str, Tensor] = {}
        self._kinds: dict[str, torch.dtype] = {}
        self._like: Params = {}

    def update(self, params: Params) -> None:
        """As :meth:`RunningAverage.update`."""
        if beside := beside_tensors(params):
            params = laid_aside(params, beside)
        check_params([self._total, params] if self.count else [params])
        if not self.count:
            self._kinds = {name: tensor.dtype for name, tensor in params.items()}
            self._like = with_versions({}, params)
            self._total = {
                name: tensor.detach().to(_accumulator(tensor.dtype), copy=True) for name, tensor in params.items()
            }
        else:
            for name, total in self._total.items():
                if total.is_floating_point():
                    self._total[name] = self._rule(total, params[name].detach().to(total), self.count)
                else:
                    self._total[name] = torch.maximum(total, params[name].to(total))
        self.count += 1

    @property
    def params(self) -> dict[str, Tensor]:
        """As :attr:`RunningAverage.params`."""
        self._seen()
        found = {name: total.to(self._kinds[name], copy=True) for name, total in self._total.items()}
        return with_versions({**found, **extra_states(self._like)}, self._like)

    def state(self) -> dict[str, Tensor]:
        """As :meth:`RunningAverage.state`."""
        return {"count": torch.tensor(self.count), **{f"total/{k}": v.clone() for k, v in self._total.items()}}

    @checked
    def load_state(self, state: Mapping[str, Tensor], like: Params) -> None:
        """As :meth:`RunningAverage.load_state`."""
        count = _count(state)
        total = {k.removeprefix("total/"): v for k, v in state.items() if k.startswith("total/")}
        shapes = {name: tensor.shape for name, tensor in like.items() if isinstance(tensor, Tensor)}
        if count and {name: tensor.shape for name, tensor in total.items()} != shapes:
            raise ParamsError(_FOREIGN)
        self.count = count
        self._total = {k: v.to(_accumulator(like[k].dtype), copy=True) for k, v in total.items()}
        self._kinds = {name: like[name].dtype for name in self._total}
        self._like = with_versions({}, like)


class SWA(_Accumulated):
    r"""The mean of all networks so far, :math:`\bar\theta_t = \bar\theta_{t-1} + (\theta_t - \bar\theta_{t-1}) / t`.

    (Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018,
    arXiv:1803.05407, Alg. 1.) Which networks are given, and from when, is the caller's choice.
    """

    def __init__(self) -> None:
        super().__init__(get_swa_avg_fn())  # type: ignore[no-untyped-call]


class EMA(_Accumulated):
    r"""The exponential moving average :math:`\bar\theta_t = d\,\bar\theta_{t-1} + (1 - d)\,\theta_t` from the first.

    (Polyak averaging as torch has it; the first network weighs :math:`d^{t-1}`, without a correction of that.)

    Args:
        decay: d above, in [0, 1): 1 / (1 - d) is about how many networks count.

    Raises:
        ConfigError: ``decay`` outside [0, 1).
    """

    def __init__(self, decay: float = 0.9) -> None:
        check_number("decay of ema", decay)
        if not decay < 1 or decay < 0:
            raise ConfigError(f"decay of ema is {decay}; expected a number in [0, 1)")
        super().__init__(get_ema_avg_fn(decay))  # type: ignore[no-untyped-call]


_FOREIGN = "this state is not of a running average of such networks; load what state() gave"


class LAWA(RunningAverage):
    """The mean of the latest networks.

    (Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging", 2022,
    arXiv:2209.14981, who average the checkpoints of the latest epochs.) Memory: ``latest`` networks.

    Args:
        latest: How many; before there are as many, the mean of all.

    Raises:
        ConfigError: ``latest`` is no whole number from 1.
    """

    def __init__(self, latest: int = 5) -> None:
        check_number("latest of lawa", latest)
        if latest < 1 or latest != int(latest):
            raise ConfigError(f"latest of lawa is {latest}; expected a whole number from 1")
        self._latest: deque[dict[str, Tensor]] = deque(maxlen=int(latest))

    def update(self, params: Params) -> None:
        """As :meth:`RunningAverage.update`."""
        if beside := beside_tensors(params):
            params = laid_aside(params, beside)
        check_params([*list(self._latest)[-1:], params])
        self._latest.append(with_versions({name: tensor.detach().clone() for name, tensor in params.items()}, params))
        self.count += 1

    @property
    def params(self) -> dict[str, Tensor]:
        """As :attr:`RunningAverage.params`."""
        self._seen()
        found = average(self._latest)
        return with_versions({**found, **extra_states(found)}, found)

    def state(self) -> dict[str, Tensor]:
        """As :meth:`RunningAverage.state`."""
        kept = {f"{i}/{name}": t.clone() for i, params in enumerate(self._latest) for name, t in params.items()}
        return {"count": torch.tensor(self.count), **kept}

    @checked
    def load_state(self, state: Mapping[str, Tensor], like: Params) -> None:
        """As :meth:`RunningAverage.load_state`."""
        count, networks = _count(state), {name.partition("/")[0] for name in state.keys() - {"count"}}
        names = {f"{i}/{name}" for i in range(len(networks)) for name in like}
        if names != state.keys() - {"count"} or bool(count) != bool(networks):
            raise ParamsError(_FOREIGN)
        if any(state[name].shape != like[name.partition("/")[2]].shape for name in names):
            raise ParamsError(_FOREIGN)
        self.count = count
        self._latest.clear()
        for i in range(len(networks)):  # of more than are kept here the newest stay
            self._latest.append(with_versions({name: state[f"{i}/{name}"].clone() for name in like}, like))


_AVERAGES: Registry[Entry] = Registry("running average", Entry, "running-averages")
_AVERAGES.add(
    Entry("swa", SWA, "mean of all networks so far (Izmailov et al. 2018)"),
    Entry("ema", EMA, "exponential moving average; decay", options=("decay",)),
    Entry("lawa", LAWA, "mean of the latest networks (Kaddour 2022); latest", options=("latest",)),
)


def running_averages() -> dict[str, str]:
    """Name -> one-line summary of every running average.

    Example:
        >>> sorted(fm.running_averages())
        ['ema', 'lawa', 'swa']
    """
    return _AVERAGES.summaries()


@checked
def running_average(name: str, **options: Any) -> RunningAverage:
    """A new, empty average of that name; options are its constructor's (``decay`` of ema, ``latest`` of lawa).

    Raises:
        UnknownNameError: No such average.
        ConfigError: An option that it does not have, or out of its range.

    Example:
        >>> average = fm.running_average("ema", decay=0.9)
        >>> average.update({"w": torch.tensor([0.0])})
        >>> average.update({"w": torch.tensor([1.0])})
        >>> round(average.params["w"].item(), 4)
        0.1
    """
    entry = _AVERAGES[name]
    if unknown := [option for option in options if option not in entry.options]:
        raise ConfigError(f"{name} does not take {', '.join(unknown)}: {entry.summary}")
    found: RunningAverage = entry.make(**options)
    return found


def _count(state: Mapping[str, Tensor]) -> int:
    try:
        if not isinstance(state, Mapping):
            raise TypeError(type(state).__name__)
        return int(state["count"])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ParamsError("this is no state of a running average; load what state() gave") from error


def _accumulator(kind: torch.dtype) -> torch.dtype:
    return torch.float64 if kind.is_floating_point else kind
