"""Teachers by name: in the pipeline, by hand, and with public images of which only some have labels."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from trained import generator

import fedmerge as fm
from fedmerge.data import Images
from fedmerge.errors import ConfigError, DataError
from fedmerge.models import Recipe
from fedmerge.pipeline import Pipeline, Workbench, align_merge_retrain
from fedmerge.retraining import retrain
from fedmerge.teachers import TEACHERS, Teacher, probabilities, teach
from strategies import ClientResult


@pytest.fixture(scope="module")
def public(digits: Images) -> Images:
    """60 images with labels, then 40 without."""
    found = digits.select(range(100))
    found.labels[60:] = -1
    return found


@pytest.fixture(scope="module")
def bench(digits: Images, public: Images) -> Workbench:
    model = fm.models.build("mlp", classes=10, in_shape=digits.shape, width=8, seed=0)
    spec = fm.perm_spec(model, public.normalise(public.images[:2]))
    return Workbench(model, spec, public, digits.select(range(100, 200)), Recipe(lr=0.1), retrain_epochs=2, seed=0)


@pytest.fixture(scope="module")
def results(bench: Workbench, digits: Images) -> list[ClientResult]:
    """Three clients, trained on a third of the classes each."""
    found = []
    for i in range(3):
        held = digits.select(range(200, 800))
        held = held.select((held.labels % 3 == i).nonzero().flatten())
        trained = fm.train(
            bench.model, bench.model.state_dict(), held, recipe=Recipe(lr=0.1), epochs=3, generator=generator(i)
        )
        found.append(ClientResult(i, trained.params, len(held), label_counts=tuple(held.counts())))
    return found


def test_in_the_pipeline_a_stack_at_an_infinite_penalty_is_the_mean(
    bench: Workbench, results: list[ClientResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    always = partial(TEACHERS["stacked"].make, strengths=[math.inf])
    found = {}
    for name, how in (("mean", {}), ("stacked", {}), ("always the mean", {"stacked": Teacher("stacked", always, "-")})):
        monkeypatch.setattr(TEACHERS, "_entries", {**TEACHERS._entries, **how})
        pipeline = Pipeline(teacher="mean" if name == "mean" else "stacked", restarts=1)
        found[name] = align_merge_retrain(results, bench=bench, pipeline=pipeline).params
    for tensor, params in found["mean"].items():
        torch.testing.assert_close(found["always the mean"][tensor], params, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(found["stacked"][k], v, atol=1e-3) for k, v in found["mean"].items())


def test_images_with_a_label_are_answered_out_of_fold_and_the_others_by_the_whole_fit(
    bench: Workbench, results: list[ClientResult], public: Images
) -> None:
    members = [r.params for r in results]
    taught = teach("stacked", bench.model, members, public)
    predictions = probabilities(bench.model, members, public)
    fitted = fm.stack([p[:60] for p in predictions], public.labels[:60])
    assert torch.equal(taught.on_public[:60], fitted.out_of_fold)
    assert torch.equal(taught.on_public[60:], fitted.predict([p[60:] for p in predictions]))
    assert not torch.equal(taught.on_public[:60], taught.rule(predictions)[:60])
    assert taught.note == f"stacked at strength {fitted.strength:g}"


def test_a_client_counts_for_a_class_by_its_share_of_the_images_of_it(public: Images) -> None:
    predictions = [torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[0.1, 0.2, 0.7]]).double()]
    taught = TEACHERS["by-class"].make(predictions, public, counts=[(30, 0, 0), (10, 5, 0)])
    # shares of class 0: 3/4 and 1/4, of class 1: 0 and 1, of class 2, which nobody has: 1/2 and 1/2
    expected = torch.tensor([0.75 * 0.5 + 0.25 * 0.1, 0.2, 0.5 * 0.25 + 0.5 * 0.7])
    torch.testing.assert_close(taught.on_public[0], expected / expected.sum())


def test_clients_that_say_no_label_counts_and_public_images_with_too_few_labels_are_named(
    bench: Workbench, results: list[ClientResult], public: Images
) -> None:
    silent = [replace(r, label_counts=()) for r in results]
    with pytest.raises(ConfigError, match=r"label counts are \(3, 0\); .*clients that say how many images"):
        align_merge_retrain(silent, bench=bench, pipeline=Pipeline(teacher="by-class", restarts=1))
    with pytest.raises(DataError, match="the teacher 'mean' was given no members"):
        teach("mean", bench.model, [], public)
    few = public.select(range(60, 100))
    few.labels[:2] = torch.tensor([3, 4])
    with pytest.raises(DataError, match="'stacked' needs two labelled images of one class; of the 40 public images 2"):
        teach("stacked", bench.model, [r.params for r in results], few)


def test_a_class_without_a_label_is_as_in_the_mean_and_the_record_says_so(
    bench: Workbench, results: list[ClientResult], public: Images
) -> None:
    without = public.select((public.labels != 7).nonzero().flatten())
    taught = teach("stacked", bench.model, [r.params for r in results], without)
    assert taught.note.endswith("; as the mean for 7")
    mean = teach("mean", bench.model, [r.params for r in results], without).on_public
    torch.testing.assert_close(taught.on_public[:, 7], mean[:, 7], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(taught.on_public, mean, atol=1e-2)


def test_by_default_the_teacher_is_stacked_or_else_the_mean_and_says_why(
    bench: Workbench, results: list[ClientResult], public: Images
) -> None:
    members = [r.params for r in results]
    ways = {name: teach(name, bench.model, members, public) for name in ("auto", "stacked", "mean")}
    assert torch.equal(ways["auto"].on_public, ways["stacked"].on_public)
    assert Pipeline().teacher == "auto"
    few = public.select(range(60, 100))
    few.labels[:2] = torch.tensor([3, 4])
    found = teach("auto", bench.model, members, few)
    assert torch.equal(found.on_public, teach("mean", bench.model, members, few).on_public)
    assert found.note.endswith("needs two labels of one class; of 40 public images 2 have a label")
    many = [torch.full((100, 2500), 1 / 2500).double()] * 2
    assert "2 members on 60 labels of 2500 classes takes long" in TEACHERS["auto"].make(many, public).note
    for labels in (torch.rand(100), torch.arange(100) % 20, torch.arange(100) - 50):
        prices = fm.data.as_data((torch.rand(100, 4), labels), nn.Linear(4, 10), loss=_between)
        assert (
            "the number of its class" in TEACHERS["auto"].make([torch.full((100, 10), 0.1).double()] * 2, prices).note
        )
    positions = [torch.full((100, 4, 10), 0.1).double()] * 2
    assert "one label an image" in TEACHERS["auto"].make(positions, public).note


def _between(answers: Tensor, labels: Tensor) -> Tensor:
    return (answers.sum(1) - labels).square().mean()


@pytest.mark.parametrize("how", ["labels", "distill", "both"])
def test_a_retraining_on_labels_alone_leaves_out_images_that_have_none(
    how: str, bench: Workbench, results: list[ClientResult], public: Images
) -> None:
    found = [
        retrain(
            bench.model, results[0].params, images, how=how, teachers=[r.params for r in results],
            recipe=Recipe(lr=0.1), epochs=1, generator=generator(), device="cpu",
        ).params
        for images in (public, public.select(range(60)))
    ]  # fmt: skip
    assert all(torch.equal(found[0][k], v) for k, v in found[1].items()) == (how == "labels")
