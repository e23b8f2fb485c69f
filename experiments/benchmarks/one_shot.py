"""Clients meet once: which one network can a server make of theirs, and does it beat the best of them?

Question: n clients train ``hlb`` on disjoint images, each from its own initialisation, from one, or from one that the
server pretrained on its public images, and send their networks once. The server averages or aligns and merges them,
measures statistics anew, and retrains on its public images: on labels, on the clients' ensemble, or on both. How
accurate is each stage, beside the best client with the very same retraining, the ensemble, and a network trained on
the public images alone?

The stages are made by the functions that ``fedmerge run`` uses (``fedmerge.pipeline``), from clients that
were trained by the code of a simulated client. One training serves every row (paired). Every network is evaluated on
val, by which choices are made (the best client, which is also the anchor; the winner), and on test.

Rows are appended to ``rows.csv`` as they are measured, and what is there is not measured again; another network,
width, number of public images or epochs needs another ``--out``.

Cost: 12 clients of 2,500 images train for 4 CPU minutes; the rows of one seed, initialisation and n take 3.

    python -m experiments.benchmarks.one_shot --n 3 6 12 --seeds 0 1 2 --out runs/one-shot
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

import fedmerge as fm
from experiments.benchmarks.clients import trained
from experiments.benchmarks.rows import Rows
from experiments.compare.paired import paired
from fedmerge.pipeline import Pipeline, Workbench, align_merge_retrain, retrain_on_public
from fedmerge.tasks import ClientTask
from fedmerge.training import predict
from strategies import ClientResult

Params = dict[str, Tensor]

TASKS = {
    "cifar10": ClientTask(
        dataset="cifar10", model="hlb", width=8, client_images=2500, public_fraction=0.05, val_fraction=0.1,
        local_epochs=10, device="auto",
    ),
    "digits": ClientTask(dataset="digits", model="mlp", client_images=80, val_fraction=0.2, local_epochs=10),
}  # fmt: skip
BEST, AVERAGE, ACTIVATIONS = "best client", "plain average", "MergeMany, activation matching"
REPAIR = "MergeMany, activation matching, REPAIR"
STARTS = {
    BEST: None,
    AVERAGE: Pipeline(merger="average"),
    "MergeMany, paper's start": Pipeline(merger="merge-many-paper", aligner="weight-matching"),
    "MergeMany, weight matching": Pipeline(aligner="weight-matching"),
    ACTIVATIONS: Pipeline(aligner="activation-matching", restarts=1),
    REPAIR: Pipeline(aligner="activation-matching", restarts=1, repair="repair"),
    "MergeMany, optimal transport": Pipeline(aligner="optimal-transport", restarts=1),
}
INITS = ("independent", "shared", "pretrained")
KEYS = ("seed", "init", "n", "start", "stage")


def retrainings(start: str, init: str, model: str) -> tuple[str, ...]:
    """In which ways a start is retrained: candidates in the best way too, other starts on the labels at most."""
    if start == AVERAGE:
        return ("labels", "distill") if init == "independent" else ("labels", "distill", "both")
    if start in (BEST, ACTIVATIONS):
        return ("labels", "both")
    if start == REPAIR:  # of hlb the same network as with BatchNorm recomputed
        return () if model == "hlb" else ("labels", "both")
    return ("labels",) if init == "independent" else ()


class Server:
    """What the clients of one seed, initialisation and number become; each network is evaluated as it is made."""

    def __init__(self, task: ClientTask, folder: Path, rows: Rows, images: int) -> None:
        self.task, self.rows = task, rows
        self.where = {"seed": task.seed, "init": task.init, "n": task.clients}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        cut, self.model = task.split(), task.network()
        self.val, self.test, public = cut.val_images, cut.test_images, cut.public_images
        public = public.first(images or len(public))
        self.bench = Workbench(
            model=self.model, spec=task.spec(self.model), public=public,
            val=self.val, recipe=task.recipe(), retrain_epochs=0, seed=task.seed, device=self.device,
        )  # fmt: skip
        start, began = None, ""
        if task.init == "pretrained":  # as fedmerge run does: on the server's images, for as long as a client trains
            start = self.retrain(self.model.state_dict(), "labels", task.local_epochs, server_round=0)
            began = f"-{len(public)}"
            if self.missing("pretrained", ""):
                self.add("pretrained", "", self.score(start))
        self.clients = trained(folder, task, range(task.clients), start=start, began=began)
        self.results = [ClientResult(i, params, len(cut.clients[i])) for i, params in enumerate(self.clients)]
        # Of each client what it predicts on val and on test: its own scores and its share of the ensemble.
        self.predicted = [
            [
                predict(self.model, params, seen, device=self.device).double().softmax(1)
                for seen in (self.val, self.test)
            ]
            for params in self.clients
        ]
        self.scores = [self.right(*predicted) for predicted in self.predicted]
        self.best = max(range(task.clients), key=lambda i: (self.scores[i][0], -i))

    def score(self, params: Params) -> tuple[float, float]:
        """Accuracy on val and on test."""
        val, test = (fm.evaluate(self.model, params, images, device=self.device) for images in (self.val, self.test))
        return val.accuracy, test.accuracy

    def right(self, val: Tensor, test: Tensor) -> tuple[float, float]:
        """The accuracies of predicted probabilities."""
        of_val, of_test = val.argmax(1) == self.val.labels, test.argmax(1) == self.test.labels
        return float(of_val.double().mean()), float(of_test.double().mean())

    def missing(self, start: str, stage: str) -> bool:
        """Whether that row is still to be measured."""
        return not self.rows.has(**self.where, start=start, stage=stage)

    def add(self, start: str, stage: str, scores: tuple[float, float], seconds: float = 0.0) -> None:
        """Keep a row."""
        val, test = scores
        self.rows.add(**self.where, start=start, stage=stage, val=val, test=test, cpu_seconds=round(seconds, 1))

    def references(self, epochs: int) -> None:
        """The clients, their ensemble, and a network that saw public images only, for as long as the retrained ones."""
        if self.missing("mean client", ""):
            val, test = torch.tensor(self.scores, dtype=torch.float64).mean(0).tolist()
            self.add("mean client", "", (val, test))
        if self.missing(BEST, ""):
            self.add(BEST, "", self.scores[self.best])
        if self.missing("ensemble", ""):
            self.add(
                "ensemble", "", self.right(*(sum(parts[1:], parts[0]) for parts in zip(*self.predicted, strict=True)))
            )
        if self.missing("public only", ""):
            # It knows neither the clients' number nor their networks: one training serves all rows of a seed.
            known = self.rows.first(seed=self.task.seed, start="public only")
            began = time.process_time()
            scores = (
                (known["val"], known["test"])
                if known
                else self.score(self.retrain(self.model.state_dict(), "labels", self.task.local_epochs + epochs))
            )
            self.add("public only", "", scores, known["cpu_seconds"] if known else time.process_time() - began)

    def stages(self, start: str, ways: Sequence[str], epochs: int) -> None:
        """A start, its statistics measured anew, and each way of retraining from there."""
        steps = [f"+ {how}" for how in ways]
        pipeline = STARTS[start]
        if not any(self.missing(start, stage) for stage in (*(["merged", "repaired"] if pipeline else []), *steps)):
            return
        began, made = time.process_time(), {"repaired": self.clients[self.best]}
        if pipeline is not None:
            align_merge_retrain(
                self.results,
                bench=self.bench,
                pipeline=replace(pipeline, retrain="none", reference=str(self.best)),
                on_stage=lambda r, name, params: made.update({name: params}),
            )
        spent = time.process_time() - began
        for stage in ("merged", "repaired"):
            if pipeline is not None and self.missing(start, stage):
                self.add(start, stage, self.score(made[stage]), spent)
        for how, stage in zip(ways, steps, strict=True):
            if self.missing(start, stage):
                began = time.process_time()
                params = self.retrain(made["repaired"], how, epochs)
                self.add(start, stage, self.score(params), spent + time.process_time() - began)

    def retrain(self, params: Params, how: str, epochs: int, server_round: int = 1) -> Params:
        """As ``fedmerge run`` retrains in its only round, and pretrains before it."""
        bench = replace(self.bench, retrain_epochs=epochs)
        teachers = [] if how == "labels" else self.clients
        return retrain_on_public(params, teachers, bench=bench, how=how, server_round=server_round)


def summary(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """Start, stage, init and n -> mean, standard deviation over seeds and their number, of the accuracy in %."""
    groups = rows.assign(accuracy=100 * rows[split]).groupby(["start", "stage", "init", "n"], sort=False)
    return groups["accuracy"].agg(["mean", "std", "count"]).reset_index()


def markdown(found: pd.DataFrame) -> str:
    """The summary as a table for people: a row a start and stage, a column an initialisation and n."""
    columns = sorted(set(zip(found["init"], found["n"], strict=True)))
    lines = ["| start | stage | " + " | ".join(f"{init}, n = {n}" for init, n in columns) + " |"]
    lines.append("|---|---|" + "--:|" * len(columns))
    for start, parts in found.groupby("start", sort=False):
        for stage, part in parts.groupby("stage", sort=False):
            cells = part.set_index(["init", "n"])
            shown = [
                f"{cells.loc[c, 'mean']:.1f}" + (f" ± {cells.loc[c, 'std']:.1f}" if cells.loc[c, "count"] > 1 else "")
                if c in cells.index
                else "–"
                for c in columns
            ]
            lines.append(f"| {start} | {stage} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def differences(rows: pd.DataFrame, split: str) -> str:
    """Every retrained merge less the best client retrained, and less the ensemble, in points, paired by seed."""
    scores = rows.set_index(list(KEYS))[split]
    lines = [
        "| start | stage | less | init | n | difference | 95 % interval | above in |",
        "|---|---|---|---|--:|--:|--:|--:|",
    ]
    for (start, stage, init, n), part in rows.groupby(["start", "stage", "init", "n"], sort=False):
        if start == BEST or not stage.startswith("+"):
            continue
        for other, at in dict.fromkeys([(BEST, stage), (BEST, "+ labels"), ("ensemble", "")]):
            pairs = [
                100 * (scores[seed, init, n, start, stage] - scores[seed, init, n, other, at])
                for seed in part["seed"]
                if (seed, init, n, other, at) in scores.index
            ]
            found = paired(pairs)
            if found.n:
                lines.append(
                    f"| {start} | {stage} | {other} {at} | {init} | {n} | {found.mean:+.1f} | "
                    f"{found.low:+.1f} to {found.high:+.1f} | {sum(d > 0 for d in pairs)} of {found.n} |"
                )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, then print and write the tables of both splits."""
    parser = argparse.ArgumentParser(description="One round: merging, repair and retraining against the best client")
    parser.add_argument("--dataset", choices=TASKS, default="cifar10")
    parser.add_argument("--n", type=int, nargs="+", default=[3, 6, 12])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--init", nargs="+", default=list(INITS), choices=INITS)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), metavar="START")
    parser.add_argument("--model", default="", help="another than hlb or mlp, by its own recipe and in its own width")
    parser.add_argument("--width", type=float, default=0, help="0 for 8 (hlb) or the model's own")
    parser.add_argument("--epochs", type=int, default=20, help="of the retraining")
    parser.add_argument(
        "--public", type=int, default=1000, help="the server uses only so many public images; 0 for all"
    )
    parser.add_argument("--clients", type=Path, default=Path("runs/benchmark-clients"), help="where networks are kept")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    task, rows = TASKS[given.dataset], Rows(given.out / "rows.csv", KEYS)
    if given.model:
        task = replace(task, model=given.model, width=0)
    settings = {key: getattr(given, key) for key in ("dataset", "model", "width", "epochs", "public")}
    kept = given.out / "settings.json"
    if kept.exists() and (before := json.loads(kept.read_text(encoding="utf-8"))) != settings:
        parser.error(f"{given.out} holds rows of {before}, which are not these: {settings}; give another --out")
    kept.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    for seed in given.seeds:
        for init in given.init:
            for n in given.n:
                one = replace(task, seed=seed, init=init, clients=n, width=given.width or task.width)
                server = Server(one, given.clients, rows, given.public)
                server.references(given.epochs)
                for start in given.starts:
                    server.stages(start, retrainings(start, init, one.model), given.epochs)
    for split in ("val", "test"):
        found = rows.read()
        text = f"{markdown(summary(found, split))}\n\n{differences(found, split)}"
        (given.out / f"{split}.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{split}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
