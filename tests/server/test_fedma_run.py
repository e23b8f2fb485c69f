"""FedMA's schedule over the in-process grid, against matching and training written out; and the presets."""

from pathlib import Path

import numpy as np
import plain
import pytest
import torch
from local_grid import LocalGrid
from scipy.optimize import linear_sum_assignment
from short_run import accuracy, run

from fedmerge.tasks import ARRAYS
from server import RunConfig, read_model

PLAIN = {"controls": "none", "repair": "none"}


def matched(a: plain.Params, b: plain.Params, share: list[float], layer: int) -> np.ndarray:
    """Order of the hidden units of layer 1 or 2 of ``b`` that is nearest to those of ``a``, inputs in order."""
    rows = []
    for x, w in zip((a, b), share, strict=True):
        parts = [x[f"fc{layer}.weight"], x[f"fc{layer}.bias"][:, None], *([x["out.weight"].T] if layer == 2 else [])]
        rows.append(w * torch.cat(parts, 1).double().numpy())
    return linear_sum_assignment(rows[0] @ rows[1].T, maximize=True)[1]


def reordered(x: plain.Params, order: np.ndarray, layer: int) -> plain.Params:
    reader = "fc2" if layer == 1 else "out"
    made = {f"fc{layer}.{k}": x[f"fc{layer}.{k}"][order] for k in ("weight", "bias")}
    return {**x, **made, f"{reader}.weight": x[f"{reader}.weight"][:, order]}


@pytest.mark.parametrize("init", ["shared", "independent"])
@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_a_layer_a_round_is_matched_averaged_and_frozen(rounds: int, init: str, tmp_path: Path) -> None:
    run(tmp_path / "a", strategy="fedma", rounds=rounds, clients=2, partition="dirichlet", init=init, **PLAIN)
    config = RunConfig.read(tmp_path / "a" / "config.toml")
    setup = config.setup()
    split, sizes = setup.split(), np.array([len(c) for c in setup.split().clients])
    share = (sizes / sizes.sum()).tolist()
    a, b = (0, 1) if sizes[0] >= sizes[1] else (1, 0)  # the largest keeps its order
    own = [dict(setup.network(i if init == "independent" else None).state_dict()) for i in range(2)]
    mean: plain.Params = {}
    for r in range(1, rounds + 1):
        place = (r - 1) % 3
        frozen = ["fc1", "fc2"][:place]
        for i in range(2):
            model = setup.network()
            for name, weight in model.named_parameters():
                weight.requires_grad_(name.split(".")[0] not in frozen)
            own[i] = plain.train_locally(model, own[i], split.client(i), config, r, i).params
        whole = list(own)
        for layer in range(1, 3):
            if layer > place:
                order = matched(whole[a], whole[b], [share[a], share[b]], layer)
                whole[b] = reordered(whole[b], order, layer)
                if layer == place + 1:
                    own[b] = reordered(own[b], order, layer)
        mean = {k: sum(s * w[k].double() for s, w in zip(share, whole, strict=True)).float() for k in whole[0]}
        fixed = ["fc1", "fc2", "out"][: place + 1]
        own = [{k: mean[k].clone() if k.split(".")[0] in fixed else v for k, v in x.items()} for x in own]
    torch.testing.assert_close(read_model(tmp_path / "a" / "model.safetensors"), mean, rtol=1e-4, atol=1e-5)


def test_frozen_layers_come_back_as_they_were_sent(tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, bool]]] = []

    class Listening(LocalGrid):
        def _answer(self, message):
            sent = message.content[ARRAYS].to_torch_state_dict() if ARRAYS in message.content else {}
            r = message.content["config"]["server-round"] if sent else 0
            kind = message.metadata.message_type
            reply = super()._answer(message)
            if kind.startswith("train"):
                back = reply.content[ARRAYS].to_torch_state_dict()
                seen.append((r, {k: torch.equal(v, sent[k]) for k, v in back.items()}))
            return reply

    found = run(tmp_path / "a", Listening(4), strategy="fedma", rounds=3, local_epochs=6, **PLAIN)
    assert len(seen) == 12
    for r, same in seen:
        assert {k.split(".")[0] for k, equal in same.items() if equal} == set(["fc1", "fc2"][: r - 1])
    assert [s["title"] for s in found["stages"]] == ["Mean client", "Best client", "FedMA, independent init"]


def test_rounds_of_retraining_improve_on_matching_alone(tmp_path: Path) -> None:
    settings = {"strategy": "fedma", "local_epochs": 8, "partition": "dirichlet", "controls": "plain-average"}
    once = run(tmp_path / "a", rounds=1, **settings)
    thrice = run(tmp_path / "b", rounds=3, **settings)
    assert accuracy(once, "aggregated") > accuracy(once, "plain-average")
    assert accuracy(thrice, "aggregated") > accuracy(once, "aggregated")


def test_a_network_with_batch_norm_and_streams_goes_through_the_schedule(tmp_path: Path) -> None:
    small = {"model": "resnet20", "width": 0.25, "clients": 2, "client_images": 60, "local_epochs": 1}
    found = run(tmp_path / "a", strategy="fedma", rounds=3, controls="none", **small)
    assert found["stages"][-1]["stage"] == "repaired"


def test_feddf_is_fedavg_and_then_distillation_whatever_retraining_is_asked_for(tmp_path: Path) -> None:
    settings = {"rounds": 2, "init": "shared", "controls": "none"}
    run(tmp_path / "a", strategy="feddf", retrain="labels", **settings)
    run(tmp_path / "b", strategy="fedavg-retrain", retrain="distill", teacher="mean", head="none", **settings)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_fedavg_aligned_is_merge_many_alone_and_with_a_common_start_fedavg(tmp_path: Path) -> None:
    """Where clients began at one network no unit is moved: aligned to it or to each other, the mean is FedAvg's."""
    for init in ("shared", "independent"):
        for name, extra in (
            ("fedavg-aligned", {"merger": "average"}),
            ("merge-many", {"repair": "none", "retrain": "none"}),
            ("fedavg", {}),
        ):
            settings = {"rounds": 2, "init": init, "local_epochs": 6, "controls": "none"}
            found = run(tmp_path / init / name, strategy=name, **settings, **extra)
            if name == "fedavg-aligned":
                titles = ["Mean client", "Best client", f"FedAvg, aligned, {init} init"]
                assert [s["title"] for s in found["stages"]] == titles
    models = {
        (i, n): read_model(tmp_path / i / n / "model.safetensors")
        for i in ("shared", "independent")
        for n in ("fedavg-aligned", "merge-many", "fedavg")
    }
    for init in ("shared", "independent"):
        torch.testing.assert_close(models[init, "fedavg-aligned"], models[init, "merge-many"], rtol=0, atol=0)
    torch.testing.assert_close(models["shared", "fedavg-aligned"], models["shared", "fedavg"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        models["independent", "fedavg-aligned"]["fc1.weight"], models["independent", "fedavg"]["fc1.weight"], atol=1e-2
    )
