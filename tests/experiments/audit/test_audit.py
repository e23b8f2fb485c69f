"""``fedmerge audit`` on runs of an in-process grid."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tomli_w
from short_run import QUICK, run
from typer.testing import CliRunner

from experiments import cli
from experiments.audit import audit as auditing
from experiments.audit.attacking import LEAST
from experiments.audit.audit import attacked, shadow
from experiments.audit.federations import Arena, check, start
from experiments.records.audits import Audit, read_audit
from experiments.records.runs import Run, find
from experiments.report.leakage import leak
from experiments.report.page import write_report
from fedmerge.errors import ConfigError, DataError, FedmergeError, RunDirectoryError
from server import RunConfig

SMALL = {**QUICK, "clients": 2, "client_images": 60, "local-epochs": 40, "width": 64, "controls": "none", "restarts": 1}
SMALL |= {"public_fraction": 0.05, "val_fraction": 0.05, "retrain-epochs": 1}


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    """Two seeds of a merge and one of FedAvg, as a grid's folder holds them."""
    path = tmp_path_factory.mktemp("grid")
    for seed in (0, 1):
        run(path / "cells" / f"merge-{seed}", seed=seed, **{k.replace("-", "_"): v for k, v in SMALL.items()})
    fedavg = {**SMALL, "strategy": "fedavg", "init": "shared", "rounds": 2}
    run(path / "cells" / "fedavg", **{k.replace("-", "_"): v for k, v in fedavg.items()})
    return path


@pytest.fixture(scope="module")
def audited(grid) -> Path:
    path = grid.parent / "audited"
    shutil.copytree(grid, path)
    auditing.write(path, auditing.audit(find(path), shadows=4, probabilities=True))
    return path


def written(path: Path) -> Audit:
    found = read_audit(path)
    assert found is not None
    return found


def test_a_grid_is_audited_run_by_run_and_its_seeds_together(audited):
    pooled, single = written(audited), written(audited / "cells" / "merge-0")
    assert single.runs == ("merge-0",)
    setups = dict.fromkeys(row.setup for row in pooled.rows)
    assert [("fedavg" in setup, "merge-many" in setup) for setup in setups] == [(True, False), (False, True)]
    merged = [row for row in pooled.rows if "merge-many" in row.setup]
    assert list(dict.fromkeys(row.stage for row in merged)) == [
        "client", "ensemble", "plain-average", "merged", "merged-less-own", "repaired", "retrained", "head",
    ]  # fmt: skip
    both = {row.stage: row for row in merged if row.attack == "loss"}
    alone = {row.stage: row for row in single.rows if row.attack == "loss"}
    assert [both["client"].targets, alone["client"].targets] == [4, 2]
    assert both["merged"].members == 2 * alone["merged"].members
    assert [alone["client"].shadows, alone["merged"].shadows] == [4 * 2, 4]
    assert [alone["merged"].outsiders, alone["merged"].enough_1] == [120, False]
    curves = {(c.setup, c.stage, c.attack) for c in pooled.curves}
    assert curves == {(row.setup, row.stage, row.attack) for row in pooled.rows}


def test_the_networks_under_attack_are_those_of_the_run(audited):
    """Accuracies of the stages that were made again from the clients' files are those that the run wrote down."""
    path = audited / "cells" / "merge-0"
    one = Run.load(path)
    found = attacked(one, shadows=4)
    for stage in ("ensemble", "merged", "repaired", "retrained", "head"):
        if (known := one.stage(stage)) is not None:
            assert found.accuracy[stage] == pytest.approx(known.accuracy), stage
    held = found.trials["client"].target.members.sum(1)
    assert held.tolist() == [sum(one.labels[f"client {i}"]) for i in range(2)]
    owners, networks, _ = found.guesses
    assert (owners == networks).mean() > 0.6


def test_clients_of_an_audit_say_their_label_counts_to_a_teacher_that_asks(tmp_path):
    short = {"local_epochs": 1, "width": 8, "client_images": 20, "init": "shared", "strategy": "fedavg-retrain"}
    short |= {"teacher": "by-class", "partition": "dirichlet", "retrain": "distill", "head": "none"}
    run(tmp_path / "run", **{k.replace("-", "_"): v for k, v in SMALL.items()} | short)
    one = Run.load(tmp_path / "run")
    found = attacked(one, shadows=4)
    assert found.accuracy["retrained"] == pytest.approx(one.stage("retrained").accuracy)
    assert len(found.trials["retrained"].shadows.members) == 4


def test_whose_risk_rises_is_said_of_the_members_of_all_seeds(audited):
    pooled, single = written(audited), written(audited / "cells" / "merge-0")
    both = {row.stage: row for row in pooled.risks if "merge-many" in row.setup}
    alone = {row.stage: row for row in single.risks}
    assert list(alone) == ["ensemble", "plain-average", "merged", "merged-less-own", "repaired", "retrained", "head"]
    for stage, row in both.items():
        assert alone[stage].of < row.of <= 240
        assert row.rises_low <= row.rises <= row.rises_high
    assert alone["merged"].before == alone["ensemble"].before > alone["merged"].after
    assert both["plain-average"].rises < 0.5  # an average of unaligned networks forgets
    said = f"raises the risk of {100 * alone['head'].rises:.0f} % of the members"
    assert said in single.sentence


def test_predictions_are_written_for_other_tools(audited):
    table = pd.read_csv(audited / "cells" / "merge-1" / "probabilities-retrained.csv")
    chances = table.drop(columns=["image", "member", "label"])
    np.testing.assert_allclose(chances.sum(axis=1), 1)
    assert table["member"].sum() == 120
    assert (chances.to_numpy().argmax(1) == table["label"]).mean() > 0.5
    held = Run.load(audited / "cells" / "fedavg").labels
    for i in range(
        2
    ):  # of two rounds of FedAvg a client's network began with the other's images, which are no outsiders
        once, twice = (
            pd.read_csv(audited / "cells" / name / f"probabilities-client-{i}.csv") for name in ("merge-1", "fedavg")
        )
        assert twice["member"].sum() == sum(held[f"client {i}"])
        assert (len(once), len(twice)) == (240, 120 + sum(held[f"client {i}"]))
    assert {"setup", "stage", "attack", "auc", "tpr_1_low", "outsiders"} <= set(pd.read_csv(audited / "audit.csv"))


def test_the_command_finds_the_same_again_and_the_report_shows_it(audited, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(audited / "cells" / "merge-0", path)
    before = written(path).rows
    (path / "audit.json").unlink()
    result = CliRunner().invoke(cli.app, ["audit", str(path), "--shadows", "4"])
    assert result.exit_code == 0, result.output
    assert "at 1 % false alarms it finds" in " ".join(result.output.split())
    assert written(path).rows == before
    page = (path / "report.html").read_text()
    for shown in (
        "What it leaks",
        'id="picture-audit-roc"',
        'id="picture-audit-accuracy"',
        "Whose was it?",
        "Whose risk rises?",
        written(path).sentence[:60],
    ):
        assert shown in page
    assert (path / "plots" / "audit-roc.png").is_file()


def test_the_page_of_a_folder_says_which_of_its_runs_were_not_attacked(audited, tmp_path):
    path = tmp_path / "grid"
    shutil.copytree(audited, path)
    assert leak(path, [run.name for run in find(path)]).sentence == written(path).sentence
    shutil.copytree(path / "cells" / "merge-1", path / "cells" / "late")
    write_report(path)
    page = " ".join((path / "report.html").read_text().split())
    assert "Not attacked, so it says nothing of them: late." in page


def test_a_grid_is_audited_where_it_is_run(audited, tmp_path):
    """What is finished is not run again, so that the audit alone is left to do."""
    out, lines = tmp_path / "out", {k.replace("_", "-"): v for k, v in SMALL.items()}
    shutil.copytree(audited / "cells" / "merge-0", out / "cells" / "merge-seed=0")
    (out / "cells" / "merge-seed=0" / "audit.json").unlink()
    grid = {"base": lines, "cells": [{"name": "merge"}], "grid": {"seed": [0]}}
    (tmp_path / "grid.toml").write_text(tomli_w.dumps(grid))
    given = ["bench", str(tmp_path / "grid.toml"), "--out", str(out), "--resume", "--audit"]
    refused = CliRunner().invoke(cli.app, [*given, "3"])
    assert "3 shadow federations are too few" in str(refused.exception)
    result = CliRunner().invoke(cli.app, [*given, "4"])
    assert result.exit_code == 0, result.output
    assert written(out / "cells" / "merge-seed=0").rows == written(audited / "cells" / "merge-0").rows
    assert 'id="picture-audit-accuracy"' in (out / "report.html").read_text()


def test_whether_an_image_is_in_one_shadow_says_nothing_about_another(grid):
    arena = Arena(RunConfig.read(grid / "cells" / "merge-0" / "config.toml"))
    inside = np.stack([np.isin(arena.audited, np.concatenate(arena.dealt(k))) for k in range(40)])
    assert set(inside.sum(1)) == {len(arena.members)} == {120}
    share = len(arena.members) / len(arena.pool)
    spread = inside.mean(0).var() / (share * (1 - share) / 40)
    assert spread == pytest.approx(1, abs=0.15)  # as of independent draws; 0 if each image were in equally many
    correlation = np.corrcoef(inside[0], inside[1])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(len(arena.audited))
    parts = arena.dealt(3)
    assert not set(parts[0]) & set(parts[1])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"status": "failed: no reply"}, RunDirectoryError, "an audit needs a finished run"),
        ({"clients": None}, RunDirectoryError, "keeps no networks of its clients"),
        ({"dataset": "gone"}, FedmergeError, "gone"),
        ({"labels": None}, DataError, "is not what the run was trained on"),
        ({"made_of": None}, DataError, "is not what the run was trained on .other images, or dealt otherwise"),
        ({"strategy": "scaffold"}, ConfigError, "strategy scaffold keeps more from round to round"),
        ({"fraction-train": 0.5}, ConfigError, "fraction-train = 0.5"),
        ({"shadows": LEAST - 1}, ConfigError, "3 shadow federations are too few"),
    ],
)
def test_what_cannot_be_audited_is_one_clear_line(grid, tmp_path, change, error, words):
    path = tmp_path / "run"
    shutil.copytree(grid / "cells" / "merge-0", path)
    summary = json.loads((path / "summary.json").read_text())
    config = (path / "config.toml").read_text()
    if "status" in change:
        summary["status"] = change["status"]
    if "labels" in change:
        summary["labels"]["client 0"][0] += 1
    if "made_of" in change:
        env = json.loads((path / "env.json").read_text())
        env["made_of"]["data set"] = "another"
        (path / "env.json").write_text(json.dumps(env))
    if "clients" in change:
        shutil.rmtree(path / "clients")
    (path / "summary.json").write_text(json.dumps(summary))
    for key in ("dataset", "strategy", "fraction-train"):
        if key in change:
            lines = [line for line in config.splitlines() if not line.startswith(f"{key} =")]
            lines += ['init = "shared"', 'optimizer = "sgd"'] if key == "strategy" else []
            lines = [
                line
                for i, line in enumerate(lines)
                if line.split(" = ")[0] not in [x.split(" = ")[0] for x in lines[i + 1 :]]
            ]
            config = "\n".join([*lines, f"{key} = {json.dumps(change[key])}"])
    (path / "config.toml").write_text(config)
    with pytest.raises(error, match=words) as caught:
        attacked(find(path)[0], shadows=change.get("shadows", LEAST))
    assert "\n" not in str(caught.value)


def test_images_of_a_client_that_failed_are_no_members(grid, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(grid / "cells" / "merge-0", path)
    (path / "clients" / "round-1-client-0.safetensors").unlink()
    with pytest.raises(RunDirectoryError, match="no network of client 0 of round 1, whose reply did not fail"):
        attacked(Run.load(path), shadows=4)
    summary = json.loads((path / "summary.json").read_text())
    summary["failures"] = [{"round": 1, "client": 0, "reason": "it crashed"}]
    (path / "summary.json").write_text(json.dumps(summary))
    one = Run.load(path)
    found = attacked(one, shadows=4)
    members = {stage: int(trial.target.members.sum()) for stage, trial in found.trials.items()}
    assert dict.fromkeys(members, sum(one.labels["client 1"])) == members
    assert [part.tolist() for part in found.guesses] == [[0] * sum(one.labels["client 1"])] * 3


def test_a_seed_without_a_stage_is_pooled_with_those_that_have_it_and_what_cannot_be_audited_is_named_first(tmp_path):
    short = {**SMALL, "local-epochs": 1, "width": 8, "client_images": 20, "aligner": "weight-matching", "head": "none"}
    for seed in (0, 1):
        run(tmp_path / f"{seed}", seed=seed, **{k.replace("-", "_"): v for k, v in short.items()})
    (tmp_path / "0" / "clients" / "round-1-client-1.safetensors").unlink()
    summary = json.loads((tmp_path / "0" / "summary.json").read_text())
    summary["failures"] = [{"round": 1, "client": 1, "reason": "it crashed"}]
    (tmp_path / "0" / "summary.json").write_text(json.dumps(summary))
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    whole = (tmp_path / "2" / "config.toml").read_text()
    (tmp_path / "2" / "config.toml").write_text(whole.replace("fraction-train = 1.0", "fraction-train = 0.5"))
    with pytest.raises(ConfigError, match=rf"{tmp_path}/2: fraction-train = 0.5"):
        auditing.audit(find(tmp_path), shadows=4)
    assert not list(tmp_path.glob("*/audit.json"))
    summary = json.loads((tmp_path / "2" / "summary.json").read_text())
    (tmp_path / "2" / "summary.json").write_text(json.dumps(summary | {"status": "failed: no reply"}))
    result = CliRunner().invoke(cli.app, ["audit", str(tmp_path), "--shadows", "4"])
    assert result.exit_code == 0, result.output
    assert "left out:" in result.output
    assert "no reply" in result.output
    targets = {row.stage: row.targets for row in written(tmp_path).rows}
    assert (targets["client"], targets["merged"], targets["merged-less-own"]) == (3, 2, 1)
    of = {row.stage: row.of for row in written(tmp_path).risks}
    assert of["merged-less-own"] < of["merged"]


def test_a_copy_of_a_run_is_no_second_one(tmp_path):
    short = {"local_epochs": 1, "width": 8, "client_images": 20, "init": "shared", "strategy": "fedavg"}
    run(tmp_path / "a", **{k.replace("-", "_"): v for k, v in SMALL.items()} | short)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    pooled = auditing.audit(find(tmp_path), shadows=4)
    assert pooled.runs == ("b",)
    assert (pooled.rows, pooled.risks) == (written(tmp_path / "b").rows, written(tmp_path / "b").risks)


def test_a_run_whose_server_saw_no_network_is_not_audited(grid):
    config = RunConfig.read(grid / "cells" / "merge-0" / "config.toml")
    with pytest.raises(ConfigError, match="secure = true: the server saw no client's network"):
        check(config.model_copy(update={"secure": True}))


def test_a_shadow_of_several_rounds_trains_on_from_round_to_round(grid):
    config = RunConfig.read(grid / "cells" / "fedavg" / "config.toml")
    arena = Arena(config)
    two = shadow(arena, 0, start(arena.world)).accuracy["aggregated"]
    once = Arena(config.model_copy(update={"rounds": 1}))
    assert two > shadow(once, 0, start(once.world)).accuracy["aggregated"]
