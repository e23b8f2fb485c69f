"""`fedmerge bench` killed and resumed, its clients in the process that is killed; on Ray in ``test_simulation.py``."""

import multiprocessing
import random
import time
from pathlib import Path

import no_ray
from written import contents

from server import RunDirectory

GRID = Path(__file__).parents[3] / "experiments" / "configs" / "one-shot.toml"
SMALLER = {
    "seed = [0, 1, 2]": "seed = [0]",
    "[quick]": '[[cells]]\nname = "rounds"\nstrategy = "fedavg"\nrounds = 3\n\n[quick]\nlocal-epochs = 1\nretrain-epochs = 1',
    "width = 0": "width = 16",
}
CELLS = 19


def start(*arguments: object) -> multiprocessing.process.BaseProcess:
    """`fedmerge bench ARGUMENTS` in a process of its own, from a server that has imported all that takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "experiments.cli",
            "experiments.report.page",
            "experiments.launch.simulation",
            "torch._dynamo",
            "torch.export._trace",
        ]
    )
    process = context.Process(target=no_ray.command, args=("bench", *arguments))
    process.start()
    return process


def finish(*arguments: object) -> None:
    process = start(*arguments)
    process.join()
    assert process.exitcode == 0


def finished(out: Path) -> dict[str, int]:
    """When each finished cell was finished."""
    return {p.name: (p / "summary.json").stat().st_mtime_ns for p in out.glob("cells/*") if RunDirectory(p).finished}


def test_a_grid_killed_at_random_moments_and_resumed_ends_in_the_same_table_and_runs_nothing_twice(
    tmp_path: Path,
) -> None:
    """The shipped grid of all ways to merge, and runs of several rounds."""
    config, out, text = tmp_path / "grid.toml", tmp_path / "killed", GRID.read_text(encoding="utf-8")
    for given, small in SMALLER.items():
        assert given in text
        text = text.replace(given, small)
    config.write_text(text, encoding="utf-8")
    finish(config, "--quick", "--out", tmp_path / "whole")
    options = ["--quick", "--out", out, "--resume"]
    rng = random.Random(20)
    ends: dict[str, int] = {}
    for at_least in (0, 0, 2, 6, 11):  # cells finished; then a random moment, somewhere in the next ones
        running = start(config, *options)
        try:
            # Nothing has happened before the first client has trained.
            while running.is_alive() and not (
                len(finished(out)) >= at_least and (list(out.glob("shared/*")) or finished(out))
            ):
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.5))
            assert running.is_alive()
        finally:
            running.kill()
            running.join()
        now = finished(out)
        assert {name: now[name] for name in ends} == ends
        ends = now
        print(f"killed with {len(ends)} of {CELLS} cells finished")
    finish(config, *options)
    now = finished(out)
    assert {name: now[name] for name in ends} == ends
    assert len(now) == CELLS
    assert contents(out) == contents(tmp_path / "whole")
    assert not (out / "shared").exists()
