"""The controls of a claim about private data, computed in the run they belong to, from the same clients."""

import time
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import strategies
from fedmerge.data import Images
from fedmerge.merge import average, ensemble, merge
from fedmerge.streams import numpy_stream, torch_stream
from fedmerge.training import train

if TYPE_CHECKING:
    from server._run import Run


def before_merge(run: "Run", server_round: int) -> None:
    """Controls made from the clients' networks: shown beside the strategy's own stages."""
    asked = run.config.control_names()
    models = [r.params for r in run.results]
    weights = [float(r.examples) for r in run.results]
    if "ensemble" in asked:
        started = time.perf_counter()
        test = run.split.test_images
        probabilities = ensemble(run.model, models, test, device=run.device).double()
        loss = float(F.nll_loss(probabilities.clamp_min(1e-12).log(), test.labels))
        accuracy = float((probabilities.argmax(1) == test.labels).double().mean())
        run.record(
            server_round,
            "ensemble",
            loss,
            accuracy,
            examples=len(test),
            seconds=time.perf_counter() - started,
        )
    plain = average(models, weights)
    if "plain-average" in asked and strategies.aligns(run.config.strategy):
        run.evaluate(server_round, "plain-average", plain)
    if "paper-start" in asked and run.config.merger == "merge-many" and run.config.strategy == "merge-many":
        merged = merge(
            models, spec=run.spec, method="merge-many-paper", weights=weights,
            rng=numpy_stream(run.config.seed, "merge", server_round),
        )  # fmt: skip
        run.add_merge(server_round, "merge-many-paper", merged)
        run.evaluate(server_round, "merged-paper-start", merged.params)
    how = run.pipeline.retrain if run.pipeline.retrain != "none" else "labels"
    for control, stage, start in (
        ("plain-average-retrain", "plain-average-retrained", plain),
        (
            "best-client-retrain",
            "client-best-retrained",
            models[run.best] if "best-client-retrain" in asked else None,
        ),
    ):
        if control in asked and start is not None:
            run.observer.say(f"control: {control}")
            retrained = strategies.retrain_on_public(start, models, bench=run.bench, how=how, server_round=server_round)
            run.evaluate(server_round, stage, retrained)


def after_merge(run: "Run", server_round: int) -> None:
    """Controls that need no client: public data alone, and all data in one place."""
    c = run.config
    asked = c.control_names()
    public = run.split.public_images
    # A client sees `local` images, the server's own training `again`; the control gets as many, all of them public.
    local = c.rounds * c.epochs() * sum(r.examples for r in run.results) / max(1, len(run.results))
    retraining = c.rounds * c.retrain_passes() if run.pipeline.retrain != "none" else 0
    again = (c.pretrain_passes() + retraining) * len(public)
    everyone = local * len(run.results)
    for control, images_seen in (("public-only", local + again), ("public-only-n", everyone + again)):
        if control in asked:
            _from_scratch(run, server_round, control, public, max(1, round(images_seen / len(public))))
    if "centralised" in asked:
        union = _union([public, *(run.split.client(i) for i in range(c.clients))])
        _from_scratch(run, server_round, "centralised", union, c.rounds * c.epochs())


def _from_scratch(run: "Run", server_round: int, control: str, images: Images, epochs: int) -> None:
    run.observer.say(f"control: {control} ({epochs} epochs of {len(images)} images)")
    start: dict[str, Tensor] = run.config.setup().network().state_dict()
    found = train(
        run.model, start, images, recipe=run.bench.recipe, epochs=epochs,
        generator=torch_stream(run.config.seed, control), device=run.device,
    )  # fmt: skip
    run.evaluate(server_round, control, found.params)


def _union(parts: list[Images]) -> Images:
    first = parts[0]
    images, labels = torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])
    return Images(images, labels, first.classes, first.mean, first.std, "all images")
