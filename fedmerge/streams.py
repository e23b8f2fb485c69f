"""Random streams: one per (seed, purpose, key ...), so that order of execution cannot change a result."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, *key: int) -> int:
    """A 63-bit integer that depends on all arguments and on nothing else (BLAKE2b of their text)."""
    text = "/".join([str(seed), purpose, *map(str, key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def numpy_stream(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A NumPy generator for one purpose, for example ``numpy_stream(0, "partition")``."""
    return np.random.default_rng(stream_seed(seed, purpose, *key))


def torch_stream(seed: int, purpose: str, *key: int) -> torch.Generator:
    """A CPU torch generator for one purpose, for example ``torch_stream(0, "local-sgd", round, client)``."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *key))


@contextmanager
def dropout_stream(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Seed the global generators, which dropout draws from, out of ``generator``; restore them afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
