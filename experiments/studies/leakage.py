"""What a network tells of its training images: by owners, by what the server does, by skew and by rounds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.audit.gauge import read
from experiments.audit.leakage import SINGLE, Leakage
from experiments.audit.risk import Change, Whose, change, whose
from experiments.report.theme import INK, SERIES, figure, rows, styled
from experiments.studies.page import table
from experiments.studies.study import Cell, Config, Study, Work, each
from fedmerge.privacy import Seen
from server import RunConfig

ATTACK = "lira"
"""Whose figures pages quote: chosen before anything was measured. All attacks are in the rows."""


@dataclass(frozen=True)
class Size(Config):
    """What is run.

    Attributes:
        model: The network.
        clients: Clients of a federation.
        sizes: Numbers of owners whose networks are merged.
        client_images: What each holds on average; twice as many as all hold together are dealt from.
        epochs: A client's passes over its images.
        lr: Peak learning rate.
        federations: Each is the target of all others.
        images: How many are audited; 0 for all.
        public: Share of the training images that the server retrains on.
        alphas: Of Dirichlet partitions, beside the one without skew.
    """

    seeds: tuple[int, ...] = (0,)
    dataset: str = "cifar10"
    model: str = "cnn"
    clients: int = 12
    sizes: tuple[int, ...] = (2, 3, 6, 12)
    client_images: int = 300
    epochs: int = 16
    lr: float = 0.04
    federations: int = 16
    images: int = 1200
    public: float = 0.01
    alphas: tuple[float, ...] = ()

    def run(self, seed: int, **changes: Any) -> RunConfig:
        """The configuration that every federation carries out."""
        keys: dict[str, Any] = {
            "dataset": self.dataset, "model": self.model, "clients": self.clients,
            "client-images": self.client_images, "local-epochs": self.epochs, "lr": self.lr, "batch-size": 32,
            "schedule": "one-cycle", "public-fraction": self.public, "val-fraction": max(0.01, self.public / 2),
            "repair": "repair", "restarts": 1, "retrain-epochs": 10, "seed": seed,
        }  # fmt: skip
        return RunConfig.parse(keys | changes)


def cells(config: Size, work: Work, *, parts: Sequence[str], skews: bool = False) -> Iterator[Cell]:
    """A part of all federations of one setup a cell; what is measured is kept, so an interrupted one goes on."""
    setups: dict[str, Mapping[str, Any]] = {"iid" if skews else "": {}}
    for alpha in config.alphas if skews else ():
        setups[f"dirichlet {alpha:g}"] = {"partition": "dirichlet", "partition-alpha": alpha}
    return each(partial(_measured, config, work, setups), seed=config.seeds, setup=setups, part=parts)


def _measured(
    config: Size, work: Work, setups: Mapping[str, Mapping[str, Any]], seed: int, setup: str, part: str
) -> list[dict[str, object]]:
    folder = work.folder / "federations" / f"{setup.replace(' ', '-') or 'all'}-{seed}"
    study = Leakage(
        config.run(seed, **setups[setup]), folder,
        federations=config.federations, images=config.images, sizes=[n for n in config.sizes if n <= config.clients],
    )  # fmt: skip
    for step in study.measure([part]):
        work.say(f"{setup} seed {seed}: {step}".strip())
    seen = [read(study.part(part, k))[0] for k in range(config.federations)]
    alone: list[Seen] = []
    if study.part("owners", 0).is_file():
        alone = [read(study.part("owners", k))[0][SINGLE] for k in range(config.federations)]
    changed = {
        s: change(Seen.stack(alone), Seen.stack([one[s] for one in seen]), study.arena.labels) if alone else Change()
        for s in seen[0]
    }
    owned = whose(study, alone) if alone else Whose()
    found, _ = study.rows([part])
    return [
        {name: value for name, value in asdict(row).items() if name not in ("setup", "title")}
        | asdict(changed[row.stage])
        | asdict(owned)
        for row in found
    ]


# -- what pages say ---------------------------------------------------------------------------------------


def chosen(found: pd.DataFrame, attack: str = ATTACK) -> pd.DataFrame:
    """The rows of one attack, with what a row is called."""
    some = found[found["attack"] == attack]
    before = [f"{setup}, " if setup else "" for setup in some["setup"]]
    numbers = {name: pd.to_numeric(some[name]) for name in ("auc_sd", "effect", "rises", "source")}  # "" is not known
    return some.assign(called=[a + b for a, b in zip(before, some["stage"], strict=True)], **numbers)


def ours(found: pd.DataFrame) -> str:
    """A row a stage, by the attack that was chosen; then the area by every attack."""
    some = chosen(found)
    lines = [
        (
            row.called, f"{100 * row.accuracy:.1f}", f"{row.auc:.3f} ({row.auc_low:.3f}–{row.auc_high:.3f})",
            "–" if np.isnan(row.auc_sd) else f"{row.auc_sd:.3f}", _rate(row, "tpr_1", row.enough_1),
            _rate(row, "tpr_01", row.enough_01), f"{row.targets}", f"{row.shadows}", f"{row.members:,}",
            f"{row.outsiders:,}",
        )
        for row in some.itertuples()
    ]  # fmt: skip
    head = [
        "networks", "accuracy %", f"AUC of {ATTACK} (95 %)", "sd over networks", "found at 1 %, % (95 %)",
        "found at 0.1 %, % (95 %)", "networks attacked", "shadows", "members", "non-members",
    ]  # fmt: skip
    areas = chosen(found).set_index("called")[[]]
    for attack in found["attack"].unique():
        areas[attack] = chosen(found, attack).set_index("called")["auc"]
    every = [
        (called, *(f"{area:.3f}" for area in row)) for called, row in zip(areas.index, areas.to_numpy(), strict=True)
    ]
    parts = [
        table(head, lines),
        "*: fewer than ten false alarms are expected at that rate, so it is not measured. Members and non-members are "
        "pairs of an image and a network; the scores of all networks are pooled, and a member is held against "
        "non-members of its class and network, so that what the class alone tells counts for nothing.",
        "The area by every attack:",
        table(["networks", *areas.columns], every),
    ]
    if some["effect"].notna().any():
        of_images = [
            (
                row.called,
                f"{row.effect:.2f}",
                *(f"{100 * v:.1f}" for v in (row.rises, row.rises_surely, row.falls_surely)),
            )
            for row in some.itertuples()
            if row.stage != SINGLE
        ]
        parts += [
            "The risk of single images, in deviations of their confidence, beside that in a network of one owner "
            f"({some.loc[some['stage'] == SINGLE, 'effect'].mean():.2f}):",
            table(["networks", "risk", "higher, %", "surely higher, %", "surely lower, %"], of_images),
        ]
    if some["source"].notna().any():
        once = some.drop_duplicates(["seed", "setup"])
        parts += [
            "Whose was it? Members laid to their owner, in %:",
            table(
                ["", "by each client's own network", "by the class alone", "guessing"],
                [
                    (r.setup or "all", *(f"{100 * v:.1f}" for v in (r.source, r.source_by_class, r.source_chance)))
                    for r in once.itertuples()
                ],
            ),
        ]
    return "\n\n".join(parts)


def _rate(row: Any, name: str, enough: bool) -> str:
    value, low, high = (100 * getattr(row, name + end) for end in ("", "_low", "_high"))
    return f"{value:.2f} ({low:.2f}–{high:.2f}){'' if enough else '*'}"


@styled
def draw(found: pd.DataFrame) -> Figure:
    """The area of every stage with its interval, and guessing."""
    some = chosen(found)
    fig, ax = figure("How well members are told from others", 1.2 + 0.3 * len(some))
    for y, row in enumerate(some.itertuples()):
        ends = [[row.auc - row.auc_low], [row.auc_high - row.auc]]
        ax.errorbar(row.auc, y, xerr=ends, fmt="o", color=SERIES[0], capsize=2.5)
        ax.text(row.auc_high + 0.006, y, f"{row.auc:.3f}, accuracy {100 * row.accuracy:.0f} %", va="center", size=9)
    rows(ax, list(some["called"]))
    ax.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    ax.set(xlim=(0.45, 1.12), xticks=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0], xlabel=f"area under the ROC of {ATTACK}, 95 %")
    return fig


def _said(found: pd.DataFrame, row: Any) -> str:
    """The area of the attack that was chosen; where that is no better than guessing, what the best of all reaches."""
    chance = ""
    if row.auc_low <= 0.5 <= row.auc_high:
        every = found[(found["stage"] == row.stage) & (found["setup"] == row.setup)].drop_duplicates("attack")
        best = every.loc[every["auc"].idxmax()]
        better = f", but {best['attack']}, the best of {len(every)} attacks, reaches {best['auc']:.2f}"
        chance = f", no better than guessing{better if best['auc_low'] > 0.5 else ' by any attack'}"
    return f"{row.auc:.2f} ({row.auc_low:.2f} to {row.auc_high:.2f}{chance})"


def _row(found: pd.DataFrame, stage: str, setup: str = "") -> Any:
    some = chosen(found)
    return next(some[(some["stage"] == stage) & (some["setup"] == setup)].itertuples())


def by_owners(found: pd.DataFrame) -> str:
    """The answer of ``leakage-vs-n``."""
    sizes = sorted(int(s[2:].split()[0]) for s in found["stage"].unique() if s.endswith("aligned merge"))
    least, most = sizes[0], sizes[-1]
    one, merged, few = (_row(found, s) for s in (SINGLE, f"n={most} aligned merge", f"n={least} aligned merge"))
    average, rest = _row(found, f"n={most} plain average"), _row(found, f"n={least} aligned merge less own")
    ensemble, said = _row(found, f"n={most} ensemble"), partial(_said, found)
    return (
        f"A member is told from another image with an area of {said(one)} in a network of one owner, of {said(few)} "
        f"in the aligned merge of {least}, and of {said(merged)} in that of {most}, whose accuracy is "
        f"{100 * merged.accuracy:.0f} % beside {100 * one.accuracy:.0f} %. The plain average of {most} gives "
        f"{said(average)} at {100 * average.accuracy:.0f} % accuracy, and the ensemble, which keeps the accuracy "
        f"({100 * ensemble.accuracy:.0f} %), {said(ensemble)}. What a merge of {least} hides from outsiders it does "
        f"not hide from those who took part: less its own network, aligned first, one of {least} owners sees "
        f"{said(rest)}."
    )


def by_stage(found: pd.DataFrame) -> str:
    """The answer of ``leakage-vs-stage``."""
    some = chosen(found).set_index("stage")
    order = [s for s in some.index if s.startswith("retrained")]
    merged = next(s for s in some.index[::-1] if s.endswith("aligned merge"))
    most = max(order, key=lambda s: some.loc[s, "auc"])
    labels = _row(found, "retrained on labels")
    repaired = _said(found, _row(found, "repaired")) if "repaired" in some.index else "it is the same network"
    text = (
        f"The aligned merge ({merged.split()[0]}) leaks {_said(found, _row(found, merged))}, and repaired {repaired}. "
        f"Retraining on public labels leaves {_said(found, labels)}; the most comes back when it is {most}: "
        f"{_said(found, _row(found, most))}."
    )
    others = [s for s in some.index if s.startswith("FedAvg") or s == "centralised"]
    if others:
        text += " Beside it: " + "; ".join(f"{s} {_said(found, _row(found, s))}" for s in others) + "."
    return text


def by_setup(found: pd.DataFrame) -> str:
    """The answer of ``leakage-vs-skew``."""
    some = chosen(found)
    last = [s for s in some["stage"].unique() if s.endswith("aligned merge")][-1]
    said = [
        f"{setup}: {_said(found, _row(found, SINGLE, setup))} alone, {_said(found, _row(found, last, setup))} merged, "
        f"and {100 * _row(found, SINGLE, setup).source:.0f} % of the members laid to their owner"
        for setup in some["setup"].unique()
    ]
    return f"By the skew of the owners ({last}): " + "; ".join(said) + "."


def by_rounds(found: pd.DataFrame) -> str:
    """The answer of ``leakage-vs-rounds``."""
    return (
        "FedAvg leaks "
        + "; ".join(
            f"after {row.stage.removeprefix('FedAvg, ')} {_said(found, row)} at {100 * row.accuracy:.0f} % accuracy"
            for row in chosen(found).itertuples()
        )
        + "."
    )


QUICK = Size(
    dataset="digits", model="mlp", clients=2, sizes=(2,), client_images=30, epochs=20, lr=0.02, federations=5, images=0,
    public=0.1, alphas=(0.1,),
)  # fmt: skip
_DEFAULT = Size()
_SKEW = Size(clients=3, sizes=(3,), alphas=(1.0, 0.3, 0.1))
_FULL = replace(_DEFAULT, client_images=1500, federations=64, images=4000, public=0.02)
_SIZES = {"quick": QUICK, "default": _DEFAULT, "full": _FULL}

_THEIRS = """K. Iwahana, A. Ito, M. Yamada, T. Shibahara, T. Yamashita, T. Miura (Computer Security Symposium 2024,
IPSJ, in Japanese) attack networks that were merged in pairs by permutation. Their abstract says that under known
attacks merging lowers the risk of most training images, and that an attack made for merged networks finds some whose
risk rises. It prints no number. Pairs are the rows n=2 here; the attacker merges shadows as the target was merged."""
_EXPLAINS = """The risk of an image is estimated from some eight networks that were trained on it, so about half of the
images would seem to rise if nothing changed; those that rise surely are what is left after correction for their number.
Targets share shadows and images, so intervals over pooled pairs are somewhat too narrow; the deviation over networks
stands beside them. Clients are trained until they know most of their images by heart, as an attacker would wish.
Where owners are skewed, the shadows that saw an image are mostly those that hold its class, so an attack learns of both
at once: one that makes shadows of the target's own classes may find more than these."""


def _study(name: str, title: str, question: str, cost: str, answer: Any, **how: Any) -> Study:
    sizes = how.pop("sizes", _SIZES)
    return Study(
        name, partial(cells, **how), title, title=title, source="after Iwahana et al., CSS 2024; Carlini et al., 2022",
        question=question, cost=cost, sizes=sizes, answer=answer, theirs=_THEIRS, ours=ours, explains=_EXPLAINS,
        draw=draw,
    )  # fmt: skip


STUDIES = (
    _study(
        "leakage-vs-n", "Leakage by the number of owners",
        "How much of each owner's images can be told from the merged network of 1, 2, 3, 6 and 12 owners?",
        "10 CPU minutes", by_owners, parts=("owners",),
    ),
    _study(
        "leakage-vs-stage", "Leakage by what the server does",
        "Does aligning, repairing, retraining or distilling add to what a network tells of its images, or take away?",
        "20 CPU minutes", by_stage, parts=("owners", "stages", "rounds", "centralised"),
    ),
    _study(
        "leakage-vs-skew", "Leakage by the skew of the owners",
        "Does a merged network tell more where its owners hold different classes, and whose an image was?",
        "8 CPU minutes", by_setup, parts=("owners",), skews=True,
        sizes={"quick": QUICK, "default": _SKEW, "full": replace(_FULL, clients=3, sizes=(3,), alphas=_SKEW.alphas)},
    ),
    _study(
        "leakage-vs-rounds", "Leakage by the rounds of FedAvg",
        "How does what FedAvg tells of its clients' images grow from round to round?",
        "2 CPU minutes", by_rounds, parts=("rounds",),
        sizes={"quick": QUICK, "default": replace(_DEFAULT, clients=3), "full": _FULL},
    ),
)  # fmt: skip
