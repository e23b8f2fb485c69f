"""Tensors, data sets and loaders in place of images: tokens, rows of a table, float images."""

import math
from collections.abc import Callable
from typing import NamedTuple

import PIL.Image
import pytest
import torch
from nets import mlp
from pictures import network, pictures
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from trained import generator

import fedmerge as fm
from fedmerge.errors import DataError, FedmergeError
from fedmerge.merge import ordered
from fedmerge.merge._fisher import fisher_information
from fedmerge.models import Recipe
from fedmerge.retraining import retrain
from fedmerge.teachers import teach

TOKENS, TIME, WIDTH, CLASSES = 11, 6, 8, 3


class Answer(NamedTuple):
    """As the networks of the transformers library answer."""

    logits: torch.Tensor


class Gpt(nn.Module):
    """A pre-norm block with causal attention of two heads and a tied head, as GPT-2 has them: next-token logits."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(TOKENS, WIDTH), nn.Embedding(TIME, WIDTH)
        self.ln_1, self.ln_2, self.norm = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attend, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.token.weight

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Answer:
        x = self.token(input_ids) + self.position(torch.arange(TIME))
        q, k, v = self.attend(self.ln_1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for t in (q, k, v))
        seen = attention_mask[:, None, None].bool() & torch.ones(TIME, TIME, dtype=torch.bool).tril()
        x = x + self.project(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        return Answer(self.head(self.norm(x + self.down(F.gelu(self.up(self.ln_2(x)))))))


class Packed(Gpt):
    """The same of one tensor ``(N, 2, T)``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[:, 0], x[:, 1]).logits


class Convolutions(nn.Module):
    """Float images to logits, with a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 7, 3), nn.BatchNorm2d(7), nn.Linear(7, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def rows(kind: str, n: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of a kind, and labels that can be learned from them."""
    generator = torch.Generator().manual_seed(0)
    if kind == "tokens":
        ids = (torch.randint(TOKENS, (n, 1), generator=generator) + 3 * torch.arange(TIME + 1)) % TOKENS
        mask = torch.ones(n, TIME, dtype=torch.int64)
        mask[::4, -1] = 0
        return torch.stack([ids[:, :-1], mask], 1), torch.where(mask > 0, ids[:, 1:], -100)
    y = torch.arange(n) % CLASSES
    x = torch.randn(n, *((5,) if kind == "table" else (2, 6, 6)), generator=generator)
    if kind == "table":
        return x, (x[:, :2] * x[:, 2:3]).contiguous()
    x[:, 0] += y.float().view(-1, 1, 1)
    return x, y


class Texts(Dataset):
    """Rows as a tokenizer gives them."""

    def __len__(self) -> int:
        return len(rows("tokens")[0])

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        (ids, mask), labels = (part[i] for part in rows("tokens"))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


KINDS: dict[str, Callable[[], nn.Module]] = {
    "tokens": Gpt, "table": lambda: mlp(5, 12, 2), "float images": Convolutions,
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


def given(kind: str, model: nn.Module) -> object:
    """The rows as their users have them."""
    if kind == "tokens":
        return DataLoader(Texts(), 32)
    if kind == "table":
        return fm.data.as_data(TensorDataset(*rows(kind)), model, loss=F.mse_loss)
    return DataLoader(TensorDataset(*rows(kind)), 32)


def trained(kind: str, seed: int, model: nn.Module, data: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    recipe = Recipe(optimizer="adam", lr=0.02, batch_size=20)
    how = {"recipe": recipe, "epochs": 15, "generator": torch.Generator().manual_seed(seed)}
    return fm.train(model, KINDS[kind]().state_dict(), data, **how).params


@every_kind
def test_networks_are_trained_aligned_merged_and_repaired_on_it(kind: str) -> None:
    model = KINDS[kind]()
    data = given(kind, model)
    a, other = (trained(kind, seed, model, data) for seed in (0, 1))
    assert fm.evaluate(model, a, data).loss < 0.5 * fm.evaluate(model, KINDS[kind]().state_dict(), data).loss
    packed, _ = rows(kind)
    spec = fm.perm_spec(model, (packed[:2, 0], packed[:2, 1]) if kind == "tokens" else packed[:2])
    assert spec.permutable_share() > 0.5
    b = fm.permute(a, spec.random(torch.Generator().manual_seed(3)), spec=spec)
    found = fm.align(b, to=a, spec=spec, method="activation-matching", model=model, data=data)
    back = fm.permute(b, found.perms, spec=spec)
    for name, tensor in a.items():
        torch.testing.assert_close(back[name], tensor)
    for method in ("regmean", "fisher"):
        how = {"spec": spec, "method": method, "order": "average", "model": model, "data": data}
        same = fm.merge([a, back], **how)
        torch.testing.assert_close(
            fm.predict(model, same.params, data), fm.predict(model, a, data), rtol=1e-3, atol=1e-3
        )
        two = fm.merge([a, other], **how)
        sources = ordered([a, other], two, spec=spec)
        fixed = fm.repair(model, two.params, data=data, method="repair", sources=sources)
        assert fm.evaluate(model, fixed, data).loss < 2 * fm.evaluate(model, two.params, data).loss


def test_a_dict_of_columns_gives_what_one_tensor_of_them_gives() -> None:
    torch.manual_seed(0)
    of_dicts, of_tensors = Gpt(), Packed()
    a, b = of_dicts.state_dict(), of_tensors.state_dict()
    x, y = rows("tokens", 24)
    columns = {"input_ids": x[:, 0], "attention_mask": x[:, 1], "labels": y}
    spec = fm.perm_spec(of_tensors, x[:2])

    def results(model: nn.Module, data: object) -> list[object]:
        how = {"model": model, "data": data}
        two = [fm.merge([a, b], spec=spec, method=m, order="average", **how).params for m in ("regmean", "fisher")]
        perms = fm.align(b, to=a, spec=spec, method="activation-matching", **how).perms
        repaired = fm.repair(model, two[0], data=data, method="repair", sources=[a, b], fold=True)
        once = {"recipe": Recipe(batch_size=12), "epochs": 1}
        bent = fm.curve(model, a, b, data, **once, generator=generator(0)).at(0.5)
        low = fm.subspace(model, [a, b], data, **once, generator=generator(0)).at()
        return [fm.evaluate(model, a, data), fm.predict(model, a, data), perms, *two, repaired, bent, low]

    def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    expected = results(of_tensors, (x, y))
    named = fm.data.as_data({**columns, "labels": y}, of_dicts, forward=forward)
    for data in (columns, named, (x[:, 0], x[:, 1], y)):
        torch.testing.assert_close(results(of_dicts, data), expected, rtol=0, atol=0)


def test_reading_a_data_set_draws_nothing_from_the_global_generator() -> None:
    model, before = nn.Linear(5, 3), torch.get_rng_state()
    given = torch.utils.data.TensorDataset(X, Y)
    for one in (torch.utils.data.Subset(given, range(20)), torch.utils.data.DataLoader(given, shuffle=True)):
        fm.data.as_data(one, model)
        assert torch.equal(torch.get_rng_state(), before)


class Pictures(Dataset):
    """A data set of torchvision's kind, without a transform, and one whose rows differ."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[object, int]:
        return (PIL.Image.new("L", (4, 4)) if self.kind == "pictures" else torch.zeros(5 + i)), 0


@pytest.mark.parametrize(("kind", "said"), [("pictures", "TypeError"), ("ragged", "RuntimeError")])
def test_a_data_set_of_rows_that_do_not_stack_is_named(kind: str, said: str) -> None:
    with pytest.raises(
        DataError, match=rf"^data cannot be read: {said}: .*give rows of tensors of one shape"
    ) as refused:
        fm.data.as_data(Pictures(kind), nn.Linear(5, 3))
    assert "\n" not in str(refused.value)


def test_a_batch_in_which_no_position_counts_changes_nothing() -> None:
    model, (x, y) = Packed(), rows("tokens")
    recipe = Recipe(lr=0.1, momentum=0.0, batch_size=1)
    done = fm.train(
        model, model.state_dict(), (x[:3], torch.full_like(y[:3], -100)), recipe=recipe, epochs=1,
        generator=torch.Generator(),
    )  # fmt: skip
    assert done.losses == (0.0,)
    assert all(torch.equal(done.params[name], value) for name, value in model.state_dict().items())


def test_loss_and_accuracy_are_those_of_torch() -> None:
    model, (x, y) = Packed(), rows("tokens")
    found = fm.evaluate(model, model.state_dict(), (x, y), batch_size=7)
    with torch.no_grad():
        answers = model.eval()(x)
    assert found.loss == pytest.approx(float(F.cross_entropy(answers.flatten(0, 1), y.flatten())))
    assert found.accuracy == pytest.approx(float((answers.argmax(-1) == y)[y != -100].float().mean()))
    regression, (x, y) = mlp(5, 12, 2), rows("table")
    data = fm.data.as_data((x, y), regression, loss=F.mse_loss)
    found = fm.evaluate(regression, regression.state_dict(), data, batch_size=7)
    with torch.no_grad():
        assert found.loss == pytest.approx(float(F.mse_loss(regression(x), y)))
    assert math.isnan(found.accuracy)
    assert found.merit == -found.loss


@pytest.mark.parametrize("kind", ["tokens", "table"])
def test_empirical_fisher_information_is_the_mean_squared_gradient_of_a_row(kind: str) -> None:
    torch.manual_seed(0)
    model, (x, y) = (Packed() if kind == "tokens" else mlp(5, 12, 2)), rows(kind, 8)
    loss = (lambda found, y: F.cross_entropy(found.flatten(0, 1), y.flatten())) if kind == "tokens" else F.mse_loss
    expected = dict.fromkeys(dict(model.named_parameters()), 0)
    for i in range(len(x)):
        model.zero_grad()
        loss(model(x[i : i + 1]), y[i : i + 1]).backward()
        expected = {name: expected[name] + p.grad.double() ** 2 / len(x) for name, p in model.named_parameters()}
    data = fm.data.as_data((x, y), model, loss=None if kind == "tokens" else loss)
    torch.testing.assert_close(fisher_information(model, model.state_dict(), data), expected, rtol=1e-5, atol=1e-12)


def test_the_network_is_left_as_it_was() -> None:
    model = Gpt()
    model.norm.eval()
    x, y = rows("tokens", 8)
    data = fm.data.as_data((x[:, 0], x[:, 1], y), model)
    fm.evaluate(model, model.state_dict(), data)
    assert type(model) is Gpt
    assert model.training
    assert not model.norm.training


def test_float_images_give_what_the_same_uint8_images_give() -> None:
    images = pictures(40)
    model = network("self-tied")
    params = model.state_dict()
    x = images.normalise(images.images)
    spec = fm.perm_spec(model, x[:2])
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
                    spec=spec,
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


X, Y = torch.randn(90, 5), torch.arange(90) % CLASSES
BAD: dict[str, tuple[object, str]] = {
    "an endless loader": (
        DataLoader(Endless(), batch_size=4),
        "data is a loader that does not know its length",
    ),
    "rows of two shapes": (DataLoader(Halves(), batch_size=1), "data: the batches do not fit together"),
    "no rows": (TensorDataset(X[:0], Y[:0]), "data holds no rows"),
    "floats as labels": (
        (X, Y.float()),
        r"labels are torch.float32 \(90,\) for 90 rows; expected int64 \(90,\).*give other targets with their loss, as in",
    ),
    "fewer labels": ((X, Y[:5]), r"labels are torch.int64 \(5,\) for 90 rows"),
    "narrower rows": ((X[:, :3], Y), r"does not take the rows of data, torch.float32 \(3,\) each"),
    "no labels": (X, "name none of its 3 classes"),
    "labels beyond the classes": ((X, Y + 2), "name none of its 3 classes"),
    "inputs too many": ((X, X, Y), r"does not take the rows of data, torch.float32 \(5,\), torch.float32 \(5,\) each"),
    "columns of two lengths": ((X, X[:5], Y), r"data holds tensors of \[90, 5\] rows; expected as many in each"),
    "arrays": ([X.numpy(), Y.numpy()], "data gives a list of ndarray, ndarray"),
    "names that forward has not": ({"x": X, "y": Y, "weight": X}, "unexpected keyword argument 'x'"),
    "texts": ({"x": X, "y": Y, "text": "a"}, "data gives a dict of Tensor, Tensor, str"),
}


@pytest.mark.parametrize("kind", BAD)
def test_data_that_do_not_fit_are_named_in_a_line(kind: str) -> None:
    model, (data, message) = mlp(5, 12, CLASSES), BAD[kind]
    with pytest.raises(DataError, match=message) as caught:
        fm.evaluate(model, model.state_dict(), data)
    assert "\n" not in str(caught.value)


def test_a_loss_or_forward_that_does_not_fit_is_named_in_a_line() -> None:
    model = mlp(5, 12, CLASSES)
    for loss, message in {
        F.nll_loss: r"the loss of data does not take answers torch.float32 \(2, 3\) and labels torch.float32 \(2, 3\): ",
        (lambda answers, y: answers): r"the loss of data returned torch.float32 \(2, 3\); expected one number",
        (lambda answers, y: 3.0): "the loss of data returned a float; expected one number",
    }.items():
        with pytest.raises(DataError, match=message):
            fm.data.as_data((X, X[:, :3]), model, loss=loss)
    with pytest.raises(DataError, match="data has no labels, and a loss compares answers with labels"):
        fm.data.as_data(X, model, loss=F.mse_loss)
    with pytest.raises(DataError, match="does not take the rows of data.*: gone"):
        fm.data.as_data((X, Y), model, forward=lambda net, batch: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(FedmergeError, match="forward= calls a network of several modules; this Linear is one layer"):
        fm.data.as_data((X, Y), nn.Linear(5, 3), forward=lambda net, batch: net(batch))


def test_positions_of_a_row_are_taught_each_by_the_mean_of_the_networks_there() -> None:
    model = Packed()
    data = fm.data.as_data(rows("tokens"), model)
    a, b = (KINDS["tokens"]().state_dict() for _ in range(2))
    found = teach("mean", model, [a, b], data).on_public
    p, q = (fm.predict(model, params, data).double().softmax(-1) for params in (a, b))
    torch.testing.assert_close(found, ((p + q) / 2).float())
    how = {"teachers": [a, b], "recipe": Recipe(batch_size=30), "epochs": 1, "generator": generator(0)}
    assert retrain(model, a, data, how="distill", **how).steps == 2


def test_steps_that_need_classes_say_so_of_other_answers() -> None:
    model = mlp(5, 12, 2)
    data, params = given("table", model), model.state_dict()
    for step in (lambda: fm.agreement(model, params, params, data), lambda: fm.head_sums(model, params, data)):
        with pytest.raises(DataError, match=r"labels are torch.float32 \(60, 2\); this needs one class a row, int64"):
            step()
    spec = fm.perm_spec(model, X[:2])
    with pytest.raises(DataError, match="answers to data are no classes, and an ensemble averages probabilities"):
        fm.merge([params, params], spec=spec, method="ensemble-distillation", model=model, data=data)


def test_what_reads_no_label_takes_rows_without() -> None:
    model = mlp(5, 12, CLASSES)
    assert fm.predict(model, model.state_dict(), X).shape == (90, CLASSES)
    fm.repair(model, model.state_dict(), data=X)
    with pytest.raises(FedmergeError, match="classes"):
        fm.train(model, model.state_dict(), X, recipe=Recipe(), epochs=1, generator=torch.Generator())


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_target_of_minus_one_is_a_value_where_labels_are_no_numbers_of_classes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)) if not shape else nn.Linear(5, 1)
    x, sign = torch.randn(40, 5), torch.where(torch.arange(40) % 3 == 0, 1.0, -1.0)
    data = fm.data.as_data((x, sign.view(40, *shape)), model, loss=F.soft_margin_loss)
    assert torch.equal(data.labelled.labels, data.labels)
    how = {"recipe": Recipe(lr=0.1), "epochs": 2}
    found, expected = (
        retrain(model, model.state_dict(), data, how="labels", teachers=(), generator=generator(), **how).params,
        fm.train(model, model.state_dict(), data, generator=generator(), **how).params,
    )
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)
    known = fm.data.as_data((x, torch.arange(40) % 3 - 1), nn.Linear(5, 3))
    assert len(known.labelled) == 26  # there it is none
