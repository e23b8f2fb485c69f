"""Networks of which clipping would not bound what an image changes are refused; rows of labels by position stay apart."""

import pytest
import torch
import torch.nn.functional as F

import fedmerge as fm
from fedmerge.errors import ParamsError

RECIPE = fm.models.Recipe(lr=1.0, momentum=0.0, batch_size=64)


class Words(torch.nn.Module):
    """Pixels as words."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = torch.nn.Embedding(17, 6), torch.nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = ((x - x.amin((1, 2, 3), keepdim=True)) * 3.7).long().clamp(0, 16)
        return self.out(self.table(pixels.flatten(1)).mean(1))


class Outside(torch.nn.Module):
    """A table that is also read without a call of its layer, the usual way to tie what goes in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.hidden(self.table(x.flatten(1).long() % 9).mean(1)), self.table.weight)


class Mixing(torch.nn.Module):
    """A normalisation over the batch by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.out(x - x.mean(0))


class InTraining(torch.nn.Module):
    """A normalisation over the batch by a function, in training only, behind a head of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.nn.Linear(64, 10)
        torch.nn.init.zeros_(self.out.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.out(F.batch_norm(x, torch.zeros(64), torch.ones(64), training=self.training))


class Range(torch.nn.Module):
    """It keeps the largest pixels that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.watch, self.out = torch.nn.Module(), torch.nn.Linear(64, 10)
        self.watch.register_buffer("seen", torch.zeros(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        if self.training:
            self.watch.seen.copy_(torch.maximum(self.watch.seen, x.detach().abs().amax(0)))
        return self.out(x)


class Shortened(Words):
    """Words whose rows are shortened when they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.table.max_norm = 0.5


class Placed(Words):
    """Words with their places, as one row for all."""

    def __init__(self) -> None:
        super().__init__()
        self.places = torch.nn.Embedding(64, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = ((x - x.amin((1, 2, 3), keepdim=True)) * 3.7).long().clamp(0, 16).flatten(1)
        return self.out((self.table(pixels) + self.places(torch.arange(64)[None])).relu().mean(1))


class Counted(torch.nn.Module):
    """A layer that has a buffer beside its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(10, 64))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.flatten(1), self.weight * self.scale)


class Keyword(torch.nn.Module):
    """A layer that is called by keyword, which hooks do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(input=x.flatten(1))


class Recurrent(torch.nn.Module):
    """Rows of an image one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = torch.nn.LSTM(8, 8, batch_first=True), torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cells(x[:, 0])[0][:, -1])


class OwnNorm(torch.nn.BatchNorm2d):
    """Of a class of its own."""


def padded() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), torch.nn.Flatten(), torch.nn.Linear(128, 10)
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Outside, "the gradient of 'table.weight' is not what its layer alone makes"),
        (Mixing, "what it makes of an image depends on the others of a batch"),
        (InTraining, "what it makes of an image depends on the others of a batch"),
        (Placed, "depends on the others of a batch|cannot tell the gradients of images apart"),
        (Range, "'watch.seen' changes while the network looks at images"),
        (Shortened, "'table.weight' changes while the network looks at images"),
        (Counted, "trainable layer with buffers"),
        (Keyword, "Opacus cannot tell the gradients of images apart in its layers"),
        (padded, "'0' pads by 'reflect', and Opacus takes its gradients as if by zeros"),
        (Recurrent, "We do not support nn.LSTM because .* Take the layer of opacus.layers in its place"),
        (lambda: torch.nn.Sequential(OwnNorm(1), torch.nn.Flatten(), torch.nn.Linear(64, 10)), "'0' normalises over"),
    ],
)
def test_a_network_whose_gradients_clipping_does_not_see_is_refused(make, said: str, digits: fm.data.Images) -> None:
    model, before = make(), torch.get_rng_state()
    with pytest.raises(ParamsError, match=said) as refused:
        fm.train(
            model, model.state_dict(), digits, recipe=RECIPE, epochs=1, generator=torch.Generator(),
            private=fm.DPSGD(1.0),
        )  # fmt: skip
    assert "\n" not in str(refused.value)
    assert torch.equal(torch.get_rng_state(), before)


class Tokens(torch.nn.Module):
    """An answer a position."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(x).relu())


def over_all(answers: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A loss that is a mean over all positions that count, so that rows share one denominator."""
    return F.cross_entropy(answers.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("loss", [None, over_all])
def test_what_a_row_adds_depends_on_no_other_row(loss) -> None:
    """Of neighbouring sets the sums of clipped gradients differ by no more than the clip: what noise is sized by."""
    torch.manual_seed(0)
    model, clip = Tokens(), 0.2
    x, y = torch.randint(0, 9, (12, 40)), torch.full((12, 40), -100)
    y[:, 0] = 3  # rows of one position that counts, and one of forty
    y[11] = torch.randint(0, 9, (40,))

    def summed(rows: int) -> torch.Tensor:
        data = fm.data.as_data((x[:rows], y[:rows]), model, loss=loss)
        done = fm.train(
            model, model.state_dict(), data, recipe=RECIPE, epochs=1, generator=torch.Generator(),
            private=fm.DPSGD(0.0, clip),
        )  # fmt: skip
        return torch.cat([(value - done.params[name]).flatten() * rows for name, value in model.state_dict().items()])

    few, all_of_them = summed(11), summed(12)
    assert float(few.norm()) > 2 * clip
    assert float((all_of_them - few).norm()) <= clip * (1 + 1e-4)
