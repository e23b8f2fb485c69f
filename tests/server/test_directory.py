import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from experiments import cli
from fedmerge.errors import RunDirectoryError
from server import RunConfig, RunDirectory, held, read_model
from server._costs import Costs
from server.records import Climb, Failure, Kept, Row, Stage, Summary

CONFIG = RunConfig()
KEPT = Kept(
    stages=(Stage("merged", "Merged", 0.5, 1.25),),
    failures=(Failure(1, None, "gone"),),
    asked=5,
    answered=4,
    merges=(Climb(1, "merge-many", (1.0, 2.5), True),),
    corrections=7,
    server_seconds=1.5,
)


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path / "a", CONFIG)
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with pytest.raises(RunDirectoryError, match="already holds a run; choose another --out, or --resume"):
        RunDirectory.open(tmp_path / "a", CONFIG)
    with pytest.raises(RunDirectoryError, match="holds another run: clients = 5 there, 6 here"):
        RunDirectory.open(tmp_path / "a", RunConfig.parse({"clients": 6}), resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


def test_a_resumed_run_may_have_more_rounds(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path / "a", CONFIG)
    RunDirectory.open(tmp_path / "a", RunConfig.parse({"rounds": 3}), resume=True)
    assert RunConfig.read(tmp_path / "a" / "config.toml").rounds == 3


def test_a_resumed_run_has_more_rounds_than_are_finished(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path / "a", RunConfig.parse({"rounds": 4}))
    directory.after_round(2, {"w": torch.zeros(1)}, {}, KEPT)
    for rounds in (1, 2):
        with pytest.raises(RunDirectoryError, match=f"2 finished rounds, and rounds = {rounds} here; give more rounds"):
            RunDirectory.open(tmp_path / "a", RunConfig.parse({"rounds": rounds}), resume=True)
    RunDirectory.open(tmp_path / "a", RunConfig.parse({"rounds": 3}), resume=True)


def test_a_run_whose_noise_was_chosen_for_its_rounds_has_no_others_when_it_is_resumed(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path / "a", RunConfig.parse({"rounds": 2, "dp-epsilon": 4.0}))
    for rounds in (1, 6):
        with pytest.raises(
            RunDirectoryError, match=f"2 rounds spend dp-epsilon = 4, and rounds = {rounds} here; leave"
        ):
            RunDirectory.open(tmp_path / "a", RunConfig.parse({"rounds": rounds, "dp-epsilon": 4.0}), resume=True)
    RunDirectory.open(tmp_path / "b", RunConfig.parse({"rounds": 2, "dp-noise": 1.0}))
    RunDirectory.open(tmp_path / "b", RunConfig.parse({"rounds": 6, "dp-noise": 1.0}), resume=True)


@pytest.mark.parametrize("cut", ["after a round", "within the first"])
def test_a_configuration_that_was_edited_after_clients_were_asked_does_not_go_on(cut: str, tmp_path: Path) -> None:
    private = RunConfig.parse({"rounds": 4, "dp-epsilon": 50.0, "name": "mine"})
    directory = RunDirectory.open(tmp_path, private)
    if cut == "after a round":
        directory.after_round(1, {"w": torch.zeros(1)}, {}, KEPT)
    else:
        directory.asked(1, {0: 1}, {0: 1})
        directory.failed(KeyboardInterrupt("cut off"))
    text = (tmp_path / "config.toml").read_text()
    for key, before, now in (("dp-epsilon", "50.0", "1.0"), ("seed", "0", "7"), ("rounds", "4", "5")):
        edited = text.replace(f"\n{key} = {before}\n", f"\n{key} = {now}\n")
        assert edited != text
        (tmp_path / "config.toml").write_text(edited)
        said = f"config.toml was edited after clients had been asked: {key} = {before} then, {now} now; put that back"
        with pytest.raises(RunDirectoryError, match=said):
            RunDirectory.open(tmp_path, RunConfig.read(tmp_path / "config.toml"), resume=True)
    (tmp_path / "config.toml").write_text(text.replace('name = "mine"', 'name = "yours"'))
    found = RunDirectory.open(tmp_path, RunConfig.read(tmp_path / "config.toml"), resume=True)
    assert RunConfig.read(tmp_path / "config.toml").name == "yours"
    assert found.asked_before(1)[0] == ({0: 1} if cut == "within the first" else {})


def test_what_was_edited_before_anything_goes_on_from_it_is_taken(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path, RunConfig.parse({"rounds": 4}))
    text = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(text.replace("\nseed = 0\n", "\nseed = 7\n"))
    directory = RunDirectory.open(tmp_path, RunConfig.read(tmp_path / "config.toml"), resume=True)
    directory.after_round(1, {"w": torch.zeros(1)}, {}, KEPT)
    (tmp_path / "config.toml").write_text(text.replace("\nrounds = 4\n", "\nrounds = 6\n"))
    with pytest.raises(RunDirectoryError, match="seed = 7 then, 0 now"):
        RunDirectory.open(tmp_path, RunConfig.read(tmp_path / "config.toml"), resume=True)
    more = RunConfig.parse({"seed": 7, "rounds": 6})
    (tmp_path / "config.toml").write_text(more.resolved().to_toml())
    assert RunDirectory.open(tmp_path, more, resume=True).resume() is not None


def test_a_resumed_run_keeps_its_name_or_takes_another(tmp_path: Path) -> None:
    called = {"name": "mine", "tags": "thesis"}
    RunDirectory.open(tmp_path / "a", RunConfig.parse(called))
    for given, name in (({}, "mine"), ({"name": "yours"}, "yours")):
        RunDirectory.open(tmp_path / "a", RunConfig.parse(given), resume=True)
        kept = RunConfig.read(tmp_path / "a" / "config.toml")
        assert (kept.name, kept.tags) == (name, "thesis")


def test_a_finished_run_may_not_have_more_rounds_for_its_checkpoint_is_gone(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path / "a", CONFIG)
    directory.write_text("summary.json", '{"status": "finished"}')
    with pytest.raises(RunDirectoryError, match="rounds = 1 there, 3 here; choose another --out, or leave out all"):
        RunDirectory.open(tmp_path / "a", RunConfig.parse({"rounds": 3}), resume=True)
    assert RunDirectory.open(tmp_path / "a", CONFIG, resume=True).finished


def test_a_run_that_failed_before_it_measured_anything_blocks_its_folder_for_no_other(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path / "a", CONFIG)
    directory.failed(OSError("no Ray"))
    assert directory.status == "failed: no Ray"
    directory.failed(ValueError("later"))
    assert directory.status == "failed: no Ray"
    again = RunDirectory.open(tmp_path / "a", RunConfig.parse({"clients": 6}))
    assert (again.status, RunConfig.read(tmp_path / "a" / "config.toml").clients) == ("", 6)
    again.row(Row(round=1, stage="merged", split="test", accuracy=0.5))
    again.failed(OSError("no Ray"))
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        RunDirectory.open(tmp_path / "a", RunConfig.parse({"clients": 6}))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match="file/a cannot be written: Not a directory; choose another --out"):
        RunDirectory.open(tmp_path / "file" / "a", CONFIG)


def test_files_that_are_no_run_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(RunDirectoryError, match="holds files that are no run"):
        RunDirectory.open(tmp_path, CONFIG, resume=True)
    with pytest.raises(RunDirectoryError, match="thesis.txt is a file; give a folder"):
        RunDirectory.open(tmp_path / "thesis.txt", CONFIG)
    assert (tmp_path / "thesis.txt").read_text() == "important"


def test_a_checkpoint_gives_back_what_went_in_and_cuts_later_metrics(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path / "a", CONFIG)
    params = {"w": torch.randn(3, 2), "n": torch.tensor(4)}
    state = {"m_t:w": np.arange(6.0).reshape(3, 2), "m_t:n": np.array(7)}
    assert directory.resume() is None
    directory.row(Row(round=1, stage="merged", split="test", accuracy=0.5))
    directory.after_round(1, params, state, KEPT)
    directory.row(Row(round=2, stage="merged", split="test", accuracy=0.6))
    lines = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    (tmp_path / "a" / "metrics.jsonl").unlink()
    with pytest.raises(RunDirectoryError, match="metrics.jsonl has 0 of the 1 lines that the rounds before"):
        RunDirectory.open(tmp_path / "a", CONFIG, resume=True).resume()
    (tmp_path / "a" / "metrics.jsonl").write_bytes(lines)
    found = RunDirectory.open(tmp_path / "a", CONFIG, resume=True).resume()
    assert found is not None
    server_round, again, server, kept = found
    assert (server_round, kept) == (1, KEPT)
    torch.testing.assert_close(again, params, rtol=0, atol=0)
    for name, array in state.items():
        np.testing.assert_array_equal(server[name], array, strict=True)  # of shape () too
    assert [json.loads(x)["round"] for x in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()] == [1]
    directory.end(Summary("failed: no replies"), Costs("cpu", 0.0))
    assert (tmp_path / "a" / "checkpoint").exists()
    directory.end(Summary("finished"), Costs("cpu", 0.0))
    assert not (tmp_path / "a" / "checkpoint").exists()


def test_metrics_of_a_run_that_never_reached_a_checkpoint_begin_anew(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path / "a", CONFIG)
    directory.row(Row(round=1, stage="merged", split="test", accuracy=0.5))
    assert directory.resume() is None
    assert not (tmp_path / "a" / "metrics.jsonl").exists()


def test_a_broken_checkpoint_or_model_is_named(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path / "a", CONFIG)
    directory.write_text("checkpoint/last.safetensors", "no tensors")
    with pytest.raises(RunDirectoryError, match="last.safetensors cannot be read .* remove it to begin again"):
        directory.resume()
    directory.write_bytes("checkpoint/last.safetensors", save({"w": torch.zeros(1)}))
    with pytest.raises(RunDirectoryError, match="last.safetensors cannot be read .* remove it to begin again"):
        directory.resume()
    directory.write_text("model.safetensors", "no tensors")
    with pytest.raises(RunDirectoryError, match="model.safetensors cannot be read as safetensors"):
        read_model(tmp_path / "a" / "model.safetensors")


def test_the_environment_names_versions_and_device(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path / "a", CONFIG)
    directory.end(Summary("finished"), Costs("cpu", 1.5))
    env = json.loads((tmp_path / "a" / "env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__.split("+")[0] or env["versions"]["torch"] == torch.__version__
    assert env["device"]
    assert env["server_seconds"] == 1.5
    assert env["cpus"] >= 1


HOLDING = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_which_another_process_is_at_work_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDING, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        for command in (["run", "--clients", "2"], ["bench", "demo", "--resume"], ["study", "lmc", "--quick"]):
            monkeypatch.setattr(sys, "argv", ["fedmerge", *command, "--out", str(out)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == 2
            assert f"another process is at work in {out}; wait until" in " ".join(capsys.readouterr().err.split())
        assert not list(out.iterdir())
        other.kill()
    with held(out), held(tmp_path / "a" / "b"):  # a process that was killed holds nothing
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # and what was made for nothing is gone
