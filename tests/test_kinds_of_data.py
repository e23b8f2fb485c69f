"""Tensors, data sets and loaders in place of images: tokens, rows of a table, float images."""

import pytest
import torch
from nets import mlp
from pictures import network, pictures
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fedmerge as fm
from fedmerge.errors import DataError, FedmergeError
from fedmerge.merge import ordered
from fedmerge.models import Recipe

TOKENS, TIME, WIDTH, CLASSES = 11, 6, 8, 3


class Block(nn.Module):
    """A pre-norm transformer block with causal attention of two heads, as GPT-2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attend(self.ln_1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for t in (q, k, v))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.ln_2(x))))


class Transformer(nn.Module):
    """Tokens ``(N, T)`` to logits of a class."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(TOKENS, WIDTH), nn.Embedding(TIME, WIDTH)
        self.block, self.norm, self.head = Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.block(x))[:, -1])


class Convolutions(nn.Module):
    """Float images to logits, with a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 7, 3), nn.BatchNorm2d(7), nn.Linear(7, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def rows(kind: str, n: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of a kind, and classes that can be learned from them."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % CLASSES
    if kind == "tokens":
        x = torch.randint(TOKENS, (n, TIME), generator=generator)
        x[:, 2] = y
        return x, y
    shape = (5,) if kind == "table" else (2, 6, 6)
    x = torch.randn(n, *shape, generator=generator)
    x[:, 0] += y.float().view(-1, *[1] * (len(shape) - 1))
    return x, y


KINDS = {"tokens": Transformer, "table": lambda: mlp(5, 12, CLASSES), "float images": Convolutions}
every_kind = pytest.mark.parametrize("kind", KINDS)


def given(kind: str) -> object:
    """The rows as their users have them."""
    x, y = rows(kind)
    return (
        (x, y) if kind == "tokens" else TensorDataset(x, y) if kind == "table" else DataLoader(TensorDataset(x, y), 32)
    )


def trained(kind: str, seed: int, data: object) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    model = KINDS[kind]()
    generator = torch.Generator().manual_seed(seed)
    recipe = Recipe(optimizer="adam", lr=0.01, batch_size=30)
    return model, fm.train(model, model.state_dict(), data, recipe=recipe, epochs=15, generator=generator).params


@every_kind
def test_networks_are_trained_aligned_merged_and_repaired_on_it(kind: str) -> None:
    data = given(kind)
    model, a = trained(kind, 0, data)
    assert fm.evaluate(model, a, data).accuracy > 0.6  # of three classes
    spec = fm.perm_spec(model, rows(kind)[0][:2])
    assert spec.permutable_share() > 0.5
    planted = spec.random(torch.Generator().manual_seed(3))
    b = fm.permute(a, planted, spec=spec)
    found = fm.align(b, to=a, spec=spec, method="activation-matching", model=model, data=data)
    back = fm.permute(b, found.perms, spec=spec)
    for name, tensor in a.items():
        torch.testing.assert_close(back[name], tensor)
    other = trained(kind, 1, data)[1]
    for method in ("regmean", "fisher"):
        same = fm.merge([a, b], spec=spec, method=method, model=model, data=data)
        torch.testing.assert_close(
            fm.predict(model, same.params, data), fm.predict(model, a, data), rtol=1e-3, atol=1e-3
        )
        two = fm.merge([a, other], spec=spec, method=method, model=model, data=data)
        for repair in fm.repairs():
            fixed = fm.repair(model, two.params, data=data, method=repair, sources=ordered([a, other], two, spec=spec))
            assert all(t.isfinite().all() for t in fixed.values())


def test_float_images_give_what_the_same_uint8_images_give() -> None:
    images = pictures(40)
    model = network("self-tied")
    params = model.state_dict()
    x = images.normalise(images.images)
    forms: dict[str, object] = {
        "pair": (x, images.labels), "data set": TensorDataset(x, images.labels),
        "loader": DataLoader(TensorDataset(x, images.labels), batch_size=7),
    }  # fmt: skip
    for form, data in forms.items():
        assert fm.evaluate(model, params, data) == fm.evaluate(model, params, images), form
        assert torch.equal(fm.predict(model, params, data), fm.predict(model, params, images)), form
        for method in ("fisher", "regmean"):
            there, here = (
                fm.merge(
                    [params, network("self-tied", 1).state_dict()],
                    spec=fm.perm_spec(model, x[:2]),
                    method=method,
                    model=model,
                    data=d,
                )
                for d in (images, data)
            )
            assert all(torch.equal(there.params[n], here.params[n]) for n in params), (form, method)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(5), torch.tensor(0)


class Halves(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int):
        return torch.zeros(5 + i % 2), 0


X, Y = rows("table")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(Endless(), batch_size=4), "data is a loader that does not know its length"),
        (DataLoader(Halves(), batch_size=1), "data: the batches do not fit together"),
        (TensorDataset(X[:0], Y[:0]), "data holds no rows"),
        ((X, Y.float()), r"labels are torch.float32 \(90,\) for 90 rows; expected int64 \(90,\)"),
        ((X, Y[:5]), r"labels are torch.int64 \(5,\) for 90 rows"),
        ((X[:, :3], Y), r"does not take the rows of data, torch.float32 \(3,\) each"),
        (X, "name none of its 3 classes"),
        ((X, Y + 2), "name none of its 3 classes"),
        ((X, Y, X), "data gives a tuple of Tensor, Tensor, Tensor; expected Images"),
        ([X.numpy(), Y.numpy()], "data gives a list of ndarray, ndarray"),
        ({"x": X, "y": Y, "weight": X}, "data gives a dict of Tensor, Tensor, Tensor"),
    ],
)
def test_data_that_do_not_fit_are_named_in_a_line(data: object, message: str) -> None:
    model = mlp(5, 12, CLASSES)
    with pytest.raises(DataError, match=message):
        fm.evaluate(model, model.state_dict(), data)


def test_what_reads_no_label_takes_rows_without() -> None:
    model = mlp(5, 12, CLASSES)
    assert fm.predict(model, model.state_dict(), X).shape == (90, CLASSES)
    fm.repair(model, model.state_dict(), data=X)
    with pytest.raises(FedmergeError, match="classes"):
        fm.train(model, model.state_dict(), X, recipe=Recipe(), epochs=1, generator=torch.Generator())
