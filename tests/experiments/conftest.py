"""Run directories for the tests of tables, pictures and reports, with invented numbers; a user's own folder."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from brought import MINE

import fedmerge as fm
from server.records import (
    Bin,
    Calibration,
    ClientClasses,
    Climb,
    Confusion,
    Curve,
    Env,
    Failure,
    Interpolation,
    Row,
    Sizes,
    Stage,
    Summary,
)

WriteRun = Callable[..., Path]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Coverage is asked of the library and its strategies, by their own tests and the server's; it makes a test half as long again."""
    item.add_marker(pytest.mark.no_cover)


MERGE_STAGES = [
    ("client-mean", "Mean client", 0.936, "each client's own network, mean over clients"),
    ("client-best", "Best client", 0.948, "the client that is best on val"),
    ("ensemble", "Ensemble of clients", 0.960, "mean prediction of all clients; as many networks as clients"),
    ("plain-average", "Plain average", 0.330, "mean of the clients' weights, without alignment"),
    ("merged-paper-start", "MergeMany, paper's start", 0.871, "all clients aligned to each other"),
    ("merged", "MergeMany, anchored", 0.926, "all clients aligned to one client, then to each other"),
    ("repaired", "+ repair", 0.931, "statistics of the merged network corrected on the public split"),
    ("retrained", "+ retrain", 0.951, "trained further on the public split"),
    ("plain-average-retrained", "Plain average + retrain", 0.902, "the same retraining from the plain average"),
    ("client-best-retrained", "Best client + retrain", 0.950, "the same retraining from the best client"),
    ("public-only", "Public only", 0.884, "trained on the public split alone"),
    ("centralised", "Centralised", 0.975, "trained on public and private images together"),
]
FEDAVG_STAGES = [
    *MERGE_STAGES[:3],
    ("aggregated", "FedAvg", 0.335, "what the strategy makes of the clients"),
    ("retrained", "FedAvg + retrain", 0.905, "trained further on the public split"),
]
CLASSES = [str(digit) for digit in range(10)]


def _line(round_: int, stage: str, client: int | None, split: str, accuracy: float) -> dict[str, Any]:
    loss = round(-float(np.log(accuracy)) + 0.05, 6)
    row = Row(
        round=round_, stage=stage, client=client, split=split, loss=loss, accuracy=round(float(accuracy), 6),
        examples=360, seconds=0.25,
    )  # fmt: skip
    return asdict(row)


def _confusion(stage: str, accuracy: float, classes: int = 10, examples: int = 36) -> Confusion:
    """Each class right as often as all together; what is wrong is taken for the next class."""
    right = round(accuracy * examples)
    rows = np.diag([right] * classes) + np.roll(np.diag([examples - right] * classes), 1, axis=1)
    return Confusion(stage, "test", tuple(map(tuple, rows.tolist())))


def _calibration(stage: str, accuracy: float) -> Calibration:
    """Too sure by 0.03 in the upper bin, not sure enough by 0.1 in the lower one."""
    upper, lower = accuracy, accuracy / 2
    bins = (
        Bin(round(lower - 0.1, 6), round(lower, 6), 40),
        Bin(round(min(1.0, upper + 0.03), 6), round(upper, 6), 320),
    )
    ece = sum(abs(b.confidence - b.accuracy) * b.examples for b in bins) / 360
    return Calibration(stage, "test", round(ece, 6), bins)


def _write(
    path: Path,
    *,
    seed: int = 0,
    clients: int = 5,
    rounds: int = 1,
    strategy: str = "merge-many",
    failures: tuple[dict[str, Any], ...] = (),
    status: str = "finished",
    finished: bool = True,
    summary: dict[str, Any] | None = None,
    env: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write a run directory; ``finished=False`` cuts it off in the middle; ``config`` sets keys."""
    path.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(strategy)])
    values = {
        "dataset": "digits",
        "model": "mlp",
        "width": 64,
        "partition": "dirichlet",
        "partition-alpha": 0.5,
        "clients": clients,
        "public-fraction": 0.1,
        "init": "independent",
        "rounds": rounds,
        "local-epochs": 20,
        "batch-size": 32,
        "lr": 0.05,
        "optimizer": "sgd",
        "strategy": strategy,
        "aligner": "weight-matching",
        "reference": "largest",
        "restarts": 3,
        "merger": "merge-many",
        "repair": "recompute",
        "retrain-epochs": 5,
        "seed": seed,
        "device": "cpu",
    } | {key.replace("_", "-"): value for key, value in config.items()}
    (path / "config.toml").write_text(tomli_w.dumps(values), encoding="utf-8")

    stages = FEDAVG_STAGES if strategy.startswith("fedavg") else MERGE_STAGES
    table = [(s, t, min(0.99, a + rng.normal(0, 0.006)), note) for s, t, a, note in stages]
    of_clients = np.clip(0.936 + rng.normal(0, 0.012, clients), 0, 0.99)
    once = {"public-only", "centralised"}
    lines = [_line(0, "initial", None, "test", 0.1)]
    for r in range(1, rounds + 1):
        grown = 1 - 0.35 * (1 - r / rounds)
        lines += [_line(r, "client", c, "local", a * grown) for c, a in enumerate(of_clients)]
        lines += [_line(r, "client", c, "test", a * grown) for c, a in enumerate(of_clients)]
        lines += [
            _line(r, s, None, "test", a * grown)
            for s, _, a, _ in table
            if s != "client-mean" and (s not in once or r == rounds)
        ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if not finished:
        (path / "metrics.jsonl").write_text(text + '{"round": 2, "stage": "cli', encoding="utf-8")
        return path
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")

    alphas = np.linspace(0, 1, 25)
    bump = 4 * alphas * (1 - alphas)
    held = {
        "public": [18] * 10,
        "test": [36] * 10,
        **{f"client {c}": rng.multinomial(1100 // clients, p).tolist() for c, p in
           enumerate(rng.dirichlet([0.5] * 10, clients))},
    }  # fmt: skip
    merging = not strategy.startswith("fedavg")
    climbs = [
        Climb(r, name, tuple(round(float(top * (1 - 0.6 * q ** (k + 1))), 4) for k in range(sweeps)), True)
        for r in range(1, rounds + 1)
        for name, top, q, sweeps in [("merge-many", 410.0, 0.3, 8), ("merge-many-paper", 352.0, 0.55, 14)]
    ]
    naive = (0.30 + 0.05 * alphas + 1.9 * bump, 0.936 - 0.01 * alphas - 0.55 * bump)
    aligned = (0.30 + 0.05 * alphas + 0.12 * bump, 0.936 - 0.01 * alphas - 0.02 * bump)
    line = Interpolation(
        clients=(0, 1), split="val", alphas=tuple(alphas.round(4).tolist()),
        naive=Curve(*(tuple(values.round(4).tolist()) for values in naive)),
        aligned=Curve(*(tuple(values.round(4).tolist()) for values in aligned)),
    )  # fmt: skip
    sd = round(float(of_clients.std(ddof=1)), 6)
    made = Summary(
        status=status,
        classes=tuple(CLASSES),
        labels=held,
        stages=tuple(
            Stage(s, t, round(a, 6), round(-float(np.log(a)) + 0.05, 6), sd if s == "client-mean" else None, note)
            for s, t, a, note in table
        ),
        failures=tuple(Failure(**f) for f in failures),
        asked=clients * rounds,
        answered=clients * rounds - len(failures),
        merges=tuple(climbs) if merging else (),
        interpolation=line if merging else None,
        sizes=Sizes(parameters=9034, aligned_share=1.0, bytes_up=180_680, bytes_down=180_680),
        per_class=tuple(_confusion(s, a) for s, _, a, _ in table if s != "client-mean"),
        calibration=tuple(_calibration(s, a) for s, _, a, _ in table if s != "client-mean"),
        client_classes=tuple(
            ClientClasses(c, tuple(float(a) if held[f"client {c}"][k] else 0.0 for k in range(10)))
            for c, a in enumerate(of_clients.round(6))
        ),
    )
    given = summary or {}
    whole = asdict(made) | ({"per_class": (), "client_classes": ()} if "classes" in given else {}) | given
    (path / "summary.json").write_text(json.dumps(whole), encoding="utf-8")
    surroundings = Env(
        versions={"fedmerge": "0.1.0", "flwr": "1.41.0", "ray": "2.55.1", "torch": "2.14.1"},
        device="cpu",
        cpus=2,
        threads=1,
        commit="0123abcd",
        started="2026-01-02T03:04:05Z",
        seconds=41.7,
        server_seconds=3.25,
        peak_memory=512 * 2**20,
        command=f"fedmerge run --strategy {strategy} --seed {seed}",
    )
    around = asdict(surroundings) | {"server_seconds": None, "peak_memory": None} | (env or {})  # nothing measured
    (path / "env.json").write_text(json.dumps(around), encoding="utf-8")
    return path


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """``write_run("name", seed=1, ...)`` writes a run directory and returns its path."""
    return lambda folder="run", /, **options: _write(tmp_path / folder, **options)


@pytest.fixture(scope="session")
def writer() -> WriteRun:
    """``writer(path, seed=1, ...)`` writes a run directory into ``path``, for fixtures that outlive one test."""
    return _write


@pytest.fixture(scope="session")
def standard_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three rounds without failures; not to be changed."""
    return _write(tmp_path_factory.mktemp("standard") / "run", rounds=3)


def _bench(path: Path) -> Path:
    for strategy in ("fedavg", "merge-many"):
        for init in ("independent", "shared"):
            for seed in range(3):
                _write(path / "cells" / f"{strategy}-{init}-seed-{seed}", strategy=strategy, init=init, seed=seed)
    return path


@pytest.fixture
def write_bench(tmp_path: Path) -> Callable[[], Path]:
    """A bench of two strategies, two kinds of initialisation and three seeds."""
    return lambda: _bench(tmp_path / "bench")


@pytest.fixture(scope="session")
def standard_bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, not to be changed but by its report."""
    return _bench(tmp_path_factory.mktemp("standard") / "bench")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures: most of the seconds of a report."""
    for name in ("of_one", "of_many"):
        monkeypatch.setattr(f"experiments.report.page.{name}", lambda *_: [])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder far from the repository, and a process that forgets its modules afterwards."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for registry in fm.registry.REGISTRIES.values():
        monkeypatch.setattr(registry, "_brought", {})
    yield tmp_path
    for name in ("mine", "wrong", "broken", "leaves"):
        sys.modules.pop(name, None)
