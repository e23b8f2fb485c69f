import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fedmerge as fm

ROOT = Path(__file__).parents[1]


IMPORTS = """
import sys
sys.modules.update(flwr=None, ray=None)
import fedmerge as fm
every = [getattr(fm, name) for name in fm.__all__]
print("matplotlib" in sys.modules)
del sys.modules["flwr"], sys.modules["ray"]
import experiments.cli, server
print("tensorboard" in sys.modules)
"""


@pytest.fixture(scope="module")
def imported() -> list[str]:
    """Whether matplotlib comes with all of the library, without Flower and Ray, and TensorBoard with the rest."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_library_needs_neither_flower_nor_ray_and_matplotlib_only_to_draw(imported: list[str]) -> None:
    assert imported[0] == "False"


def test_tensorboard_is_imported_by_runs_only(imported: list[str]) -> None:
    assert imported[1] == "False"


def test_it_says_its_version_and_that_it_is_typed() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert fm.__version__ == declared["project"]["version"]
    packages = declared["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert [package for package in packages if not (ROOT / package / "py.typed").is_file()] == []


def test_the_library_run_as_a_module_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedmerge", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fedmerge", run_name="__main__", alter_sys=False)
    assert (ended.value.code, capsys.readouterr().out) == (0, f"fedmerge {fm.__version__}\n")


def test_every_public_name_exists() -> None:
    for name in fm.__all__:
        assert getattr(fm, name) is not None


def test_the_library_example_of_the_readme_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    public = fm.data.load("digits").train.select(range(60))
    nets = [fm.models.build("mlp", classes=10, in_shape=(1, 8, 8), width=8, seed=i) for i in range(3)]
    a, b, c = (net.state_dict() for net in nets)
    scope = {"model": nets[0], "example_input": torch.zeros(1, 1, 8, 8), "a": a, "b": b, "c": c, "public": public}
    wide = fm.models.build("mlp", classes=10, in_shape=(1, 8, 8), width=12, seed=3).state_dict()
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, params in zip(paths, (a, b), strict=True):
        save_file(params, path)
    scope |= {"narrow": a, "wide": wide, "paths": paths}
    exec(code, scope)
    assert scope["gap"].loss >= 0
    assert scope["fixed"].keys() == a.keys()
    assert all(tensor.shape == a[name].shape for name, tensor in scope["small"].params.items())
    assert scope["large"].converged


def test_no_text_file_names_an_absolute_path_or_a_registry() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    hosts = "|".join(["pypi" + r"\.org", "python" + "hosted", "registry" + r"\.npmjs", "deb" + r"\.debian"])
    for name in listed:
        if Path(name).suffix in {".py", ".toml", ".md", ".yaml", ".j2", ""} and (ROOT / name).is_file():
            text = (ROOT / name).read_text()
            assert not re.search(hosts, text), name
            assert not re.search(r"(?<![\w.])/(work|root|home)/\w", text), name
