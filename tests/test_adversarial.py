"""PGD against the closed form on a linear network, images that stay in the box, and training that withstands it."""

from dataclasses import replace

import pytest
import torch
from pictures import SHAPE, network, pictures
from torch import nn

import fedmerge as fm
from fedmerge.adversarial import PGD
from fedmerge.data import Images
from fedmerge.errors import ConfigError, DataError, ParamsError

ATTACK = PGD(epsilon=40, steps=7)


def test_against_two_classes_of_a_linear_network_every_pixel_goes_all_the_way() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    images = torch.randint(60, 190, (30, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 2
    data = Images(images, labels, classes=("a", "b"), mean=(0.5,), std=(0.2,), name="grey")
    weight = model[1].weight.detach()
    towards = (weight[1 - labels] - weight[labels]).sign().view(-1, 1, 4, 4)  # of the other class
    found = fm.attacked(model, model.state_dict(), data, attack=PGD(epsilon=10, steps=10))
    assert torch.equal(found.images.int(), images.int() + 10 * towards.int())
    assert torch.equal(found.labels, labels)


@pytest.mark.parametrize("attack", [PGD(1, 1), PGD(8, 3, 5.0), PGD(255, 2)])
def test_attacked_images_stay_in_the_box_and_cost_more(attack: PGD, digits: Images) -> None:
    part = digits.select(range(100))
    model = fm.models.build("mlp", classes=10, in_shape=part.shape, seed=0, width=16)
    params = model.state_dict()
    found = fm.attacked(model, params, part, attack=attack)
    assert (found.images.int() - part.images.int()).abs().max() <= attack.epsilon
    assert fm.evaluate(model, params, found).loss > fm.evaluate(model, params, part).loss
    again = fm.attacked(model, params, part, attack=attack)
    assert torch.equal(found.images, again.images)
    other = fm.attacked(model, params, part, attack=attack, generator=torch.Generator().manual_seed(5))
    assert attack.epsilon == 1 or not torch.equal(found.images, other.images)


def test_training_on_attacked_images_withstands_what_training_does_not(digits: Images) -> None:
    train, held = digits.select(range(600)), digits.select(range(600, 900))
    model = fm.models.build("mlp", classes=10, in_shape=train.shape, seed=0, width=32)
    robust = []
    for attack in (None, ATTACK):
        generator = torch.Generator().manual_seed(0)
        done = fm.train(
            model, model.state_dict(), train, recipe=fm.models.recipe("mlp"), epochs=15, generator=generator,
            attack=attack,
        )  # fmt: skip
        moved = fm.attacked(model, done.params, held, attack=ATTACK)
        robust.append(fm.evaluate(model, done.params, moved).accuracy)
    assert robust[1] > robust[0] + 0.1


def test_a_batch_of_one_image_is_attacked_with_stored_statistics() -> None:
    model, data = network("self-tied"), pictures(1)
    model = nn.Sequential(nn.Conv2d(SHAPE[0], 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(2, *SHAPE))
    recipe = replace(fm.models.recipe("mlp"), augment=False)
    done = fm.train(
        model, model.state_dict(), data, recipe=recipe, epochs=1, generator=torch.Generator(), attack=PGD(8, 2)
    )
    assert all(t.isfinite().all() for t in done.params.values())


def test_what_cannot_be_attacked_is_refused(digits: Images) -> None:
    part = digits.select(range(4))
    model = fm.models.build("mlp", classes=10, in_shape=part.shape, seed=0, width=4)
    given = (model, model.state_dict())
    with pytest.raises(ConfigError, match="epsilon of PGD is 0; expected a whole number from 1 to 255"):
        PGD(0)
    with pytest.raises(ConfigError, match="steps of PGD is 2.5"):
        PGD(8, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"step of PGD is -1; expected a number in \[0, 255\]"):
        PGD(8, step=-1)
    line = nn.Linear(3, 2)
    rows = fm.data.as_data((torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])), line)
    with pytest.raises(ConfigError, match="PGD moves pixels"):
        fm.attacked(line, line.state_dict(), rows, attack=ATTACK)
    with pytest.raises(DataError, match="name none of its 10 classes"):
        fm.attacked(*given, replace(part, labels=part.labels - 20), attack=ATTACK)
    with pytest.raises(DataError, match="no images; nothing to attack"):
        fm.attacked(*given, part.select([]), attack=ATTACK)
    small = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(ParamsError, match="4 numbers an image"):
        fm.attacked(small, small.state_dict(), part, attack=ATTACK)
    with pytest.raises(ConfigError, match="attack= with private="):
        fm.train(
            *given, part, recipe=fm.models.recipe("mlp"), epochs=1, generator=torch.Generator(), attack=ATTACK,
            private=fm.DPSGD(1.0),
        )  # fmt: skip
