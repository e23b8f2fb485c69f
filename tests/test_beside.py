"""Packages of another project with the names of fedmerge's own. On Ray: in tests of ``experiments/launch``."""

import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from strangers import strangers

import clients.app
import fedmerge
from experiments.launch.sharing import SharedTraining
from fedmerge.beside import HOME, _Beside, beside
from fedmerge.errors import ConfigError
from fedmerge.tasks import ClientTask


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process as one that has imported none of the packages and finds those of others first."""
    strangers(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, _Beside)])
    for name in ("clients", "clients.app", "experiments", "experiments.launch", "experiments.launch.sharing"):
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_client_app_arrives_where_another_package_of_its_name_comes_first(
    worker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = clients.app.app
    sent = pickle.dumps([app, SharedTraining(app, worker, {ClientTask(): 3})])
    with pytest.raises(RuntimeError, match="the clients of somebody else"):
        importlib.import_module("clients.app")
    arrived, shared = pickle.loads(sent)
    assert sys.modules["clients.app"].__file__ == str(HOME / "clients" / "app.py")
    assert arrived is sys.modules["clients.app"].app is shared.app
    assert (shared.folder, shared.rounds) == (worker.resolve(), {ClientTask(): 3})
    assert type(shared).__module__ == "experiments.launch.sharing"


def test_a_package_that_was_taken_for_one_of_them_is_named(worker: Path) -> None:
    (worker / "clients" / "__init__.py").write_text("")
    importlib.import_module("clients")
    with pytest.raises(ConfigError, match=f"package 'clients' of {worker}.* imported in place of the one in {HOME}"):
        beside("clients.app:app")


def test_the_command_starts_where_other_packages_of_its_names_come_first(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['fedmerge', '--version']; from fedmerge.__main__ import main; main()"
    path = os.pathsep.join(map(str, (strangers(tmp_path), HOME)))  # as with PYTHONPATH=. beside an installed fedmerge
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, f"fedmerge {fedmerge.__version__}\n"), done.stderr
