"""As many threads as help: PyTorch waits for every thread at every operator, which small networks do not repay."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

FEW = 50e6
"""Operations of a batch, forward, below which a second thread is not worth it.

By ``experiments/benchmarks/threads.py``, on two cores: where both are free it makes a dense network of this size slower
by a third and a convolutional one faster by a fifth; where other work uses them, either up to six times slower.
"""


@contextmanager
def helpful_threads(network: nn.Module, device: torch.device) -> Iterator[Callable[[int], AbstractContextManager[Any]]]:
    """Threads for a loop over batches: one until its first batch is known to be large.

    The choice depends on the network and the size of its batches alone, never on how busy the machine is: equal runs
    stay equal to the bit.

    Yields:
        A function of the number of rows, in whose context each batch goes through ``network``.
    """
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        yield lambda rows: nullcontext()
        return
    known = False

    @contextmanager
    def batch(rows: int) -> Iterator[None]:
        nonlocal known
        if known:
            yield
            return
        counting = _Counting()  # type: ignore[no-untyped-call]
        with counting:
            yield
        known = True
        if counting.at_least(network, rows) >= FEW:
            torch.set_num_threads(threads)

    torch.set_num_threads(1)
    try:
        yield batch
    finally:
        torch.set_num_threads(threads)


def operations(network: nn.Module, images: torch.Tensor) -> int:
    """Multiplications and additions of a batch ``(B, ...)``, forward."""
    counting = _Counting()  # type: ignore[no-untyped-call]
    with torch.no_grad(), counting:
        network(images)
    return counting.at_least(network, len(images))


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operations of products and convolutions, forward."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out

    def at_least(self, network: nn.Module, rows: int) -> int:
        """What was counted, or two for each weight and row: a fused operator (an LSTM) is not counted."""
        return max(self.total, 2 * rows * sum(weight.numel() for weight in network.parameters()))
