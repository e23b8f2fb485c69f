"""Mean ranks: the constants of the paper they come from, and small cases by hand."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.compare.ranks import mean_ranks, rank
from experiments.compare.stages import outcome
from experiments.records.runs import find

WriteRun = Callable[..., Path]


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_has_the_published_constants(methods: int, q: float) -> None:
    # q at 5 % as tabulated by Demšar (2006, Table 5a).
    found = rank(pd.DataFrame(np.random.default_rng(0).random((14, methods))))
    assert found is not None
    assert found.critical == pytest.approx(q * math.sqrt(methods * (methods + 1) / (6 * 14)), abs=1e-3)


def test_friedmans_test_by_hand() -> None:
    scores = pd.DataFrame({"a": [3.0, 3.0, 3.0, 1.0], "b": [2.0, 2.0, 1.0, 2.0], "c": [1.0, 1.0, 2.0, 3.0]})
    found = rank(scores)
    assert found is not None
    assert dict(zip(found.methods, found.ranks, strict=True)) == {"a": 1.5, "b": 2.25, "c": 2.25}
    # 12 N / (k (k + 1)) * (sum of squared mean ranks - k (k + 1)^2 / 4), N = 4 blocks, k = 3 methods
    statistic = 12 * 4 / (3 * 4) * (1.5**2 + 2 * 2.25**2 - 3 * 16 / 4)
    assert found.p == pytest.approx(stats.chi2.sf(statistic, df=2))


def test_methods_farther_apart_than_the_critical_difference_are_in_no_group_together() -> None:
    found = rank(pd.DataFrame({"a": [3.0] * 12, "b": [2.0] * 12, "c": [1.0] * 12}))
    assert found is not None
    assert found.ranks == (1.0, 2.0, 3.0)
    assert found.critical == pytest.approx(2.343 * math.sqrt(3 * 4 / (6 * 12)), rel=1e-3)
    few = rank(pd.DataFrame({"a": [3.0] * 4, "b": [2.0] * 4, "c": [1.0] * 4}))
    assert few is not None


def test_equal_results_share_their_place_and_round_off_is_no_lead() -> None:
    found = rank(pd.DataFrame({"a": [0.1 + 0.2, 0.3], "b": [0.3, 0.1 + 0.2], "c": [0.5, 0.5]}))
    assert found is not None
    assert dict(zip(found.methods, found.ranks, strict=True)) == {"c": 1.0, "a": 2.5, "b": 2.5}
    level = rank(pd.DataFrame({"a": [1, 1], "b": [1, 1], "c": [1, 1]}))
    assert level is not None
    assert math.isnan(level.p)


def test_one_block_ranks_but_tests_nothing() -> None:
    found = rank(pd.DataFrame({"a": [0.5], "b": [0.6], "c": [0.7]}))
    assert found is not None
    assert found.methods == ("c", "b", "a")
    assert math.isnan(found.p)
    assert math.isnan(found.critical)


def test_one_method_has_no_rank() -> None:
    assert rank(pd.DataFrame({"a": [0.5, 0.6]})) is None
    assert mean_ranks([]) is None


def test_outcomes_are_ranked_within_each_seed(write_bench: Callable[[], Path]) -> None:
    runs = find(write_bench())
    found = mean_ranks(runs)
    assert found is not None
    assert (found.blocks, found.left_out) == (3, 0)
    by_hand: dict[str, list[int]] = {}
    for seed in range(3):
        scores = {
            f"init={r.config['init']}, strategy={r.config['strategy']}": s.accuracy
            for r in runs
            if r.seed == seed and (s := outcome(r)) is not None
        }
        for place, name in enumerate(sorted(scores, key=lambda n: -scores[n]), 1):
            by_hand.setdefault(name, []).append(place)
    assert set(found.methods) == set(by_hand)
    for name, mean in zip(found.methods, found.ranks, strict=True):
        # The invented numbers of both initialisations are equal, so those two share their places.
        assert mean == pytest.approx(sum(sum(by_hand[n]) for n in by_hand if n.split()[-1] == name.split()[-1]) / 6)


def test_problems_are_blocks_and_a_block_without_one_method_is_left_out(write_run: WriteRun, tmp_path: Path) -> None:
    for alpha in (0.1, 1.0):
        for seed in range(2):
            write_run(f"runs/m-{alpha}-{seed}", seed=seed, partition_alpha=alpha)
            if (alpha, seed) != (1.0, 1):
                write_run(f"runs/f-{alpha}-{seed}", strategy="fedavg", seed=seed, partition_alpha=alpha)
    found = mean_ranks(find(tmp_path / "runs"))
    assert found is not None
    assert set(found.methods) == {"strategy=fedavg", "strategy=merge-many"}
    assert (found.blocks, found.left_out) == (3, 1)


def test_a_method_without_results_in_most_blocks_is_not_ranked(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_run(f"runs/m{seed}", seed=seed)
        write_run(f"runs/f{seed}", strategy="fedavg", seed=seed)
    write_run("runs/k", strategy="krum")
    found = mean_ranks(find(tmp_path / "runs"))
    assert found is not None
    assert "strategy=krum" not in found.methods
    assert found.blocks == 3
