"""Last layers from sums, against scikit-learn's ridge regression on the pooled features."""

from functools import partial

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

import fedmerge as fm
from fedmerge.data import Images
from fedmerge.errors import ConfigError, DataError, ParamsError, SpecError
from fedmerge.heads import head_of


def network(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10, bias=bias))


@pytest.fixture(scope="module")
def shares(digits: Images) -> list[Images]:
    """Three owners, unequal, and the server's images."""
    return [digits.select(range(*bounds)) for bounds in ((0, 100), (100, 450), (450, 900), (900, 1100))]


@pytest.mark.parametrize("bias", [True, False])
def test_sums_of_owners_give_the_ridge_regression_of_their_pooled_features(bias: bool, shares, digits: Images) -> None:
    model, public = network(bias), shares[3]
    params = model.state_dict()
    sums = [fm.head_sums(model, params, part, batch_size=64) for part in shares[:3]]
    total = sums[0] + sums[1] + sums[2]
    pooled = digits.select(range(900))
    with torch.no_grad():
        features = model[:3](pooled.normalise(pooled.images)).double()
    strength = 0.01
    ridge = Ridge(alpha=strength * float(features.square().sum(0).mean()), fit_intercept=bias)
    ridge.fit(features.numpy(), torch.nn.functional.one_hot(pooled.labels, 10).double().numpy())
    found = fm.analytic_head(model, params, total, public, strength=strength)
    weight = torch.from_numpy(ridge.coef_)
    scale = float((found["3.weight"].double() * weight).sum() / weight.square().sum())  # one factor for all
    assert scale > 1
    torch.testing.assert_close(found["3.weight"].double() / scale, weight, rtol=1e-6, atol=1e-6)
    if bias:
        torch.testing.assert_close(
            found["3.bias"].double() / scale, torch.from_numpy(ridge.intercept_), rtol=1e-6, atol=1e-6
        )
    assert all(torch.equal(found[n], params[n]) for n in params if not n.startswith("3."))


def test_the_sums_do_not_depend_on_who_holds_which_image(shares, digits: Images) -> None:
    model = network()
    whole = fm.head_sums(model, model.state_dict(), digits.select(range(900)))
    parts = [fm.head_sums(model, model.state_dict(), part) for part in shares[:3]]
    total = parts[2] + parts[0] + parts[1]
    torch.testing.assert_close(total.gram, whole.gram, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(total.cross, whole.cross, rtol=1e-9, atol=1e-6)
    assert total.examples == whole.examples == 900
    assert float(total.gram[-1, -1]) == 900


class Keyword(nn.Module):
    """Its last layer is called by keyword, begins at zero, and its output is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(64, 12), nn.Linear(12, 10)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return 0.125 * self.out(input=self.body(x.flatten(1)).relu())


def test_a_head_that_begins_at_zero_and_is_called_by_keyword_is_found(shares) -> None:
    torch.manual_seed(0)
    model = Keyword()
    assert head_of(model, shares[0]).name == "out"
    sums = fm.head_sums(model, model.state_dict(), shares[2])
    found = fm.best_head(model, model.state_dict(), sums, shares[3])
    assert found.accuracy > 0.6
    assert fm.evaluate(model, found.params, shares[3]).accuracy == pytest.approx(found.accuracy)


def test_the_scale_changes_no_answer_and_lowers_the_loss(shares) -> None:
    model, public = network(), shares[3]
    sums = fm.head_sums(model, model.state_dict(), shares[2])
    found = fm.analytic_head(model, model.state_dict(), sums, public, strength=0.01)
    best = fm.evaluate(model, found, public)
    for factor in (0.8, 1.25):
        other = {**found, "3.weight": factor * found["3.weight"], "3.bias": factor * found["3.bias"]}
        assert fm.evaluate(model, other, public).accuracy == best.accuracy
        assert fm.evaluate(model, other, public).loss > best.loss


@pytest.mark.parametrize("seed", range(3))
def test_the_scale_is_no_bolder_for_a_few_images_that_are_all_answered_right(seed: int) -> None:
    digits = fm.data.load("digits").train
    model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=seed)
    held, test = digits.select(range(800)), digits.select(range(1000, 1797))
    recipe, generator = fm.models.recipe("mlp"), torch.Generator().manual_seed(seed)
    params = fm.train(model, model.state_dict(), held, recipe=recipe, epochs=3, generator=generator).params
    sums = fm.head_sums(model, params, held)
    losses = {}
    for n in (10, 15, 200):
        found = fm.analytic_head(model, params, sums, digits.select(range(800, 800 + n)), strength=1e-3)
        losses[n] = fm.evaluate(model, found, test).loss
    assert losses[200] < 0.5
    assert max(losses.values()) < 2 * losses[200]


def test_networks_without_a_linear_head_are_refused(shares) -> None:
    convolved = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(SpecError, match="Sequential does not end in a linear layer"):
        fm.head_sums(convolved, convolved.state_dict(), shares[0])
    shifted = nn.Sequential(network(), nn.Softmax(1))
    with pytest.raises(SpecError, match="does not end in a linear layer"):
        head_of(shifted, shares[0])
    tied = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    tied[3].weight = tied[1].weight
    with pytest.raises(SpecError, match="shares its weight"):
        head_of(tied, shares[0])


def test_a_head_shares_no_memory_with_the_network_that_it_was_made_of(shares) -> None:
    model = network()
    given = model.state_dict()
    sums = fm.head_sums(model, given, shares[0])
    results = [
        fm.analytic_head(model, given, sums, shares[3], strength=0.1),
        *(fm.best_head(model, given, sums, shares[3], strengths=s).params for s in ([], [0.1])),
    ]
    for found in results:
        assert list(found) == list(given)
        assert not {t.data_ptr() for t in found.values()} & {t.data_ptr() for t in given.values()}


def test_a_network_of_fewer_outputs_than_classes_is_named(shares) -> None:
    model, few = network(), nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    said = "Sequential answers with 7 numbers an image, but .* has 10 classes"
    with pytest.raises(ParamsError, match=said):
        fm.head_sums(few, few.state_dict(), shares[0])
    sums = fm.HeadSums(torch.eye(65, dtype=torch.float64), torch.ones(65, 7, dtype=torch.float64), 100)
    for use in (fm.best_head, partial(fm.analytic_head, strength=0.1)):
        with pytest.raises(ParamsError, match=said):
            use(few, few.state_dict(), sums, shares[3])
    assert fm.head_sums(model, model.state_dict(), shares[0]).cross.shape[1] == 10


def test_sums_that_do_not_fit_and_systems_without_a_solution_are_refused(shares) -> None:
    model = network()
    sums = fm.head_sums(model, model.state_dict(), shares[0])
    with pytest.raises(ConfigError, match=r"strength is 0; expected a number above 0|strength is 0.0"):
        fm.analytic_head(model, model.state_dict(), sums, shares[3], strength=0)
    small = fm.HeadSums(sums.gram[:5, :5], sums.cross[:5], 100)
    with pytest.raises(ParamsError, match=r"sums are \(5, 10\); the last layer of this network needs \(21, 10\)"):
        fm.analytic_head(model, model.state_dict(), small, shares[3], strength=0.1)
    with pytest.raises(ParamsError, match="do not add up"):
        _ = sums + small
    with pytest.raises(ConfigError, match="singular"):
        fm.analytic_head(model, model.state_dict(), fm.HeadSums(-sums.gram, sums.cross, 100), shares[3], strength=0.1)
    with pytest.raises(DataError, match="holds no images"):
        fm.head_sums(model, model.state_dict(), shares[0].select([]))


class Ninth(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 9


def test_a_head_whose_output_is_divided_by_a_number_is_set_so_that_the_network_answers_the_same(shares) -> None:
    whole, ninth = network(), Ninth(*network())
    assert (head_of(ninth, shares[0]).name, round(head_of(ninth, shares[0]).factor * 9, 4)) == ("3", 1.0)
    found = [
        fm.analytic_head(
            model, model.state_dict(), fm.head_sums(model, model.state_dict(), shares[2]), shares[3], strength=0.01
        )
        for model in (whole, ninth)
    ]
    answers = [fm.predict(m, p, shares[3]) for m, p in zip((whole, ninth), found, strict=True)]
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-3, atol=1e-3)
    hlb = fm.models.build("hlb", classes=10, in_shape=(3, 32, 32), width=2, seed=0)
    noise = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    seen = Images(noise, torch.arange(8), tuple(map(str, range(10))), (0.5,) * 3, (0.25,) * 3, "noise")
    assert head_of(hlb, seen).name == "out"


def test_the_best_head_is_best_on_val_and_the_networks_own_if_none_is_better(shares, digits: Images) -> None:
    model, val = network(), shares[3]
    params = model.state_dict()
    sums = fm.head_sums(model, params, shares[2])
    tried = {s: fm.analytic_head(model, params, sums, val, strength=s) for s in (1e-3, 0.1, 100.0)}
    scores = {s: fm.evaluate(model, p, val).accuracy for s, p in tried.items()}
    found = fm.best_head(model, params, sums, val, strengths=list(tried))
    assert found.accuracy == max(scores.values()) == scores[found.strength] > fm.evaluate(model, params, val).accuracy
    torch.testing.assert_close(dict(found.params), dict(tried[found.strength]))
    again = fm.best_head(model, found.params, sums, val, strengths=list(tried))
    assert again.strength is None
    assert torch.equal(again.params["3.weight"], found.params["3.weight"])
    dead = sums.gram.clone()
    dead[0], dead[:, 0] = 0, 0
    dead[0, 0] = -1
    left = fm.best_head(model, params, fm.HeadSums(dead, sums.cross, sums.examples), val, strengths=[1e-9, 10.0])
    assert left.singular == (1e-9,)


def test_a_network_that_is_one_linear_layer_gets_its_head_and_one_that_computes_its_weight_is_refused(
    shares, digits: Images
) -> None:
    held, val = shares[2], shares[3]
    flat = [(part.normalise(part.images).flatten(1), part.labels) for part in (held, val)]
    alone, within = nn.Linear(64, 10), nn.Sequential(nn.Linear(64, 10))
    within[0].load_state_dict(alone.state_dict())
    found = [
        fm.best_head(model, model.state_dict(), fm.head_sums(model, model.state_dict(), flat[0]), flat[1])
        for model in (alone, within)
    ]
    assert found[0].strength is not None
    assert torch.equal(found[0].params["weight"], found[1].params["0.weight"])
    assert torch.equal(found[0].params["bias"], found[1].params["0.bias"])
    for name in ("weight", "bias"):
        normed = network()
        nn.utils.parametrize.register_parametrization(normed[3], name, nn.Identity())
        with pytest.raises(SpecError, match=rf"'3' computes its 3.{name} from other tensors .*cannot be set"):
            fm.head_sums(normed, normed.state_dict(), held)


@pytest.mark.parametrize("strengths", [[float("nan")], [float("inf")], ["much"], [0], 0.1])
def test_strengths_that_are_no_numbers_above_0_and_no_images_to_choose_on_are_named(strengths, shares) -> None:
    model = network()
    sums = fm.head_sums(model, model.state_dict(), shares[0])
    with pytest.raises(ConfigError, match=r"strengths? is .*; expected (a number|numbers) above 0"):
        fm.best_head(model, model.state_dict(), sums, shares[3], strengths=strengths)
    with pytest.raises(DataError, match="holds no images; nothing to choose a head on"):
        fm.best_head(model, model.state_dict(), sums, shares[3].select([]))
