"""Numbers of permutations: what the published table counts, and what keeps the function.

Ainsworth et al., "Git Re-Basin", ICLR 2023, arXiv:2209.04836, table 1, prints 10^3498 for a perceptron of three layers
of 512, 10^35160 for VGG16 and 10^55109 for ResNet50. All three are the same sum: log10(n!) of every hidden layer of n
units, rounded down for each layer, with the projections of ResNet50's shortcuts left out.
"""

import math

import pytest
import torch
import torchvision.models
from nets import Residual, mlp
from torch import nn

from fedmerge.spec import perm_spec


def log10_factorial(n: int) -> float:
    return sum(math.log10(k) for k in range(2, n + 1))


def published(layers: list[int]) -> int:
    """The rule of the table: each layer is free, and each loses the decimals of its log10(n!)."""
    return sum(math.floor(log10_factorial(n)) for n in layers)


def exact(groups: list[int]) -> float:
    return sum(map(log10_factorial, groups))


def hidden_layers(model: nn.Module, without: str = "no such layer") -> list[int]:
    """Units of all convolutions and linear layers but the last, in order."""
    kinds = nn.Conv2d | nn.Linear
    layers = [m.weight.shape[0] for name, m in model.named_modules() if isinstance(m, kinds) and without not in name]
    return layers[:-1]


def test_a_perceptron_of_three_layers_of_512() -> None:
    model = mlp(784, 512, 512, 512, 10)
    assert hidden_layers(model) == [512] * 3
    assert published([512] * 3) == 3498
    spec = perm_spec(model, torch.zeros(1, 784))
    assert spec.log10_symmetries() == pytest.approx(exact([512] * 3)) == pytest.approx(3499.62, abs=0.01)


def test_vgg16_counts_its_two_hidden_classifier_layers() -> None:
    model = torchvision.models.vgg16(weights=None)
    convolutions = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert hidden_layers(model) == [*convolutions, 4096, 4096]
    assert published([*convolutions, 4096, 4096]) == 35160
    assert published(convolutions) == 9122
    spec = perm_spec(model, torch.zeros(1, 3, 32, 32))
    assert list(spec.sizes().values()) == [*convolutions, 4096, 4096]
    assert (
        spec.log10_symmetries()
        == pytest.approx(exact([*convolutions, 4096, 4096]))
        == pytest.approx(35168.55, abs=0.01)
    )


def test_resnet50_is_published_with_every_layer_of_a_residual_stream_free() -> None:
    model = torchvision.models.resnet50(weights=None)
    # blocks of a stage and their width: two layers of that width within a block, one of four times that to the stream
    stages = [(3, 64), (4, 128), (6, 256), (3, 512)]
    within = [64, *(n for blocks, n in stages for _ in range(2 * blocks))]
    onto_streams = [4 * n for blocks, n in stages for _ in range(blocks)]
    streams = [4 * n for _, n in stages]
    assert sorted(hidden_layers(model, without="downsample")) == sorted([*within, *onto_streams])
    assert published([*within, *onto_streams]) == 55109
    assert published([*within, *onto_streams, *streams]) == 65314  # had the four projections been counted as well
    spec = perm_spec(model, torch.zeros(1, 3, 32, 32))
    assert sorted(spec.sizes().values()) == sorted([*within, *streams])
    assert spec.log10_symmetries() == pytest.approx(exact([*within, *streams])) == pytest.approx(25638.29, abs=0.01)
    # the difference: 16 layers write to 4 streams
    surplus = exact(onto_streams) - exact(streams)
    assert (
        exact([*within, *onto_streams]) - spec.log10_symmetries()
        == pytest.approx(surplus)
        == pytest.approx(29500.6, abs=0.1)
    )


def test_one_layer_of_a_residual_stream_cannot_be_permuted_on_its_own() -> None:
    torch.manual_seed(0)
    model = Residual(4, 3, 5).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    expected, cycle = model(x), torch.tensor([1, 2, 0])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    writers, readers = ("stem", "down.0", "down.1"), ("up.0", "up.1", "head")
    for writer in writers:
        for followed in (0, 1, 2, 3):  # the readers after it, however many, undo the permutation
            moved = dict(state)
            moved[f"{writer}.weight"], moved[f"{writer}.bias"] = (
                state[f"{writer}.weight"][cycle],
                state[f"{writer}.bias"][cycle],
            )
            for reader in readers[3 - followed :]:
                moved[f"{reader}.weight"] = state[f"{reader}.weight"][:, cycle]
            assert (torch.func.functional_call(model, moved, (x,)) - expected).norm() > 0.01 * expected.norm()
    together = dict(state)
    for writer in writers:
        together[f"{writer}.weight"], together[f"{writer}.bias"] = (
            state[f"{writer}.weight"][cycle],
            state[f"{writer}.bias"][cycle],
        )
    for reader in readers:
        together[f"{reader}.weight"] = state[f"{reader}.weight"][:, cycle]
    torch.testing.assert_close(torch.func.functional_call(model, together, (x,)), expected)
