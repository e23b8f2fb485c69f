"""What the page on inversion makes of rows that are known, and where its pictures go."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from torch import Tensor

import fedmerge as fm
from experiments.studies import STUDIES, inversion
from experiments.studies.inversion import Inversion
from experiments.studies.study import Work
from fedmerge.data import Images

STUDY = STUDIES["inversion"]
SMALL = Inversion(
    seeds=(0,), dataset="digits", model="mlp", width=8, images=60, public_images=60, val_images=40, test_images=60,
    epochs=1, others=(), singles=1, batches=(2, 4), local=(2, 1, 1), sums=(2,), clients=2, iterations=(2, 2),
)  # fmt: skip


def rows() -> pd.DataFrame:
    """Two seeds; of each view what is drawn, how near it is, and how near the mean image of the class is."""
    found = []
    for seed in (0, 1):
        for shown, psnr, trained in (
            ("one image, one step", 30.0, False),
            ("the same of a trained network", 14.0, False),
            ("mean of 2 clients, 4 images each", 9.5, False),
            ("network of one client", 10.0, True),
            ("aligned merge of 2", 8.0, True),
        ):
            found.append(
                {"seed": seed, "shown": shown, "clients": 1, "images": 4, "steps": "" if trained else 1,
                 "psnr": psnr + seed, "ssim": 0.9, "psnr_other": 9.0, "ssim_other": 0.1, "psnr_mean": 12.0, "ssim_mean": 0.3,
                 "labels": "" if trained else 1.0, "psnr_outside": 10.5 if trained else "", "accuracy": 0.5 if trained else "",
                 "cpu_seconds": 1.0}
            )  # fmt: skip
    return pd.DataFrame(found)


def test_the_answer_holds_every_view_against_what_is_there_without_an_attack() -> None:
    answer = STUDY.answer(rows())
    assert "draws that image at 30.5 dB (SSIM 0.90); the mean image of its class" in answer
    assert "the same of a trained network +2.5, mean of 2 clients 4 images each -2.0. Out of trained networks" in answer
    assert "network of one client -1.5, aligned merge of 2 -3.5; " in answer
    assert "at 10.5 dB from the nearest of its own images, and at 10.5 dB from the nearest of as many" in answer
    assert "| one image, one step | 4 | 30.5 ± 0.7; 0.90 ± 0.00 | 9.0 ± 0.0; 0.10 ± 0.00 |" in STUDY.ours(rows())


def test_a_sum_of_steps_is_one_step_and_pictures_stay_in_the_folder_of_the_study(tmp_path: Path) -> None:
    views = {cell.key["shown"]: cell.measure for cell in STUDY.make(SMALL, Work(tmp_path, "digits"))}
    one, summed = (views[shown]() for shown in ("one step on 4 images", "mean of 2 clients, 2 images each"))
    assert one["psnr"] == pytest.approx(summed["psnr"], abs=0.05)  # the same four images, by one client or by two
    drawn = [path.name for path in tmp_path.rglob("*.png")]
    assert sorted(drawn) == ["mean-of-2-clients-2-images-each-0.png", "one-step-on-4-images-0.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_the_same_with_batchnorm_is_a_view_of_its_own(tmp_path: Path) -> None:
    views = {cell.key["shown"]: cell.measure for cell in STUDY.make(SMALL, Work(tmp_path, "digits"))}
    plain, normed, read = (
        views["one step on 2 images" + suffix]() for suffix in ("", ", BatchNorm", ", BatchNorm and its statistics")
    )
    assert plain["psnr_mean"] == normed["psnr_mean"]  # the same images
    assert len({plain["psnr"], normed["psnr"], read["psnr"]}) == 3


def test_what_is_sent_of_a_folder_is_of_several_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits, work, seen = fm.data.load("digits"), Work(tmp_path, "digits"), []
    by_class = digits.train.select(digits.train.labels.argsort(stable=True))
    work.__dict__["dataset"] = replace(digits, train=by_class)
    compared = inversion._Attacks._compared

    def looked_at(self: inversion._Attacks, shown: str, found: list[Tensor], true: list[Images]) -> dict[str, float]:
        seen.extend(true)
        return compared(self, shown, found, true)

    monkeypatch.setattr(inversion._Attacks, "_compared", looked_at)
    views = {cell.key["shown"]: cell.measure for cell in STUDY.make(SMALL, work)}
    views["one step on 4 images"]()
    assert len(set(seen[0].labels.tolist())) == 4
