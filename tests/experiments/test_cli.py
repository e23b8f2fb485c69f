"""The command line, in this process: everything but the simulation itself, which has its own tests."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import get_args

import pytest
from no_ray import simulate_here

import fedmerge
from experiments import cli, terminal
from experiments.grids import files as grid
from experiments.tools import doctor
from fedmerge.flower.replies import Failure
from server import RunConfig, RunDirectory, choices

ROOT = Path(__file__).parents[2]


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedmerge", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--strategy", "fedavrg"), "unknown strategy 'fedavrg'"),
        (("--model", "hbl"), "did you mean 'hlb'?"),
        (("--dataset", "nowhere"), "unknown dataset (or folder) 'nowhere'"),
        (("--clients", "0"), "clients = 0"),
        (("--clients", "5000"), "5000 clients"),
        (("--device", "cuda"), "torch sees no GPU"),
        (("--model", "cnn"), "8x8"),
        (("--model", "mlp", "--kernel-size", "3"), "has no option kernel_size"),
        (("nowhere.toml",), "nowhere.toml: cannot be read"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_written(
    args: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "run", *args, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert len(captured.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_run_into_the_folder_of_another_is_one_line_with_exit_code_2_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RunDirectory.open(tmp_path / "out", RunConfig.parse({"seed": 1}))
    before = (tmp_path / "out" / "config.toml").read_bytes()
    assert call(monkeypatch, "run", "--seed", 1, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "already holds a run; choose another --out, or --resume to continue it" in said
    assert len(said.strip().splitlines()) == 1
    assert (tmp_path / "out" / "config.toml").read_bytes() == before


FILES = {
    "true.toml": b"local-epochs = true",
    "binary.toml": b"\x89PNG\0\0",
    "latin.toml": "# é".encode("latin-1"),
    "windows.toml": b'dataset = "C:\\photos"',
    "deep.toml": b"a = " + b"[" * 20000,
    "photos/cat/a.png": b"no image",
    "run/config.toml": b"a = ",
    "old/config.toml": b"seed = 1",
    "old/summary.json": b'{"status": "finished", "stages": 3}',
    "a.pt": b"PK\3\4",
    "empty.safetensors": b"",
    "module_that_fails.py": b"make = lambda: 1 / 0",
    "module_with_a_mistake.py": b"def (",
    "file": b"",
}
MERGE = ("--model", "mlp", "-o", "out")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("run", "--width", "0.3"), "options: width of model 'mlp' is 0.3 (width counts hidden units a layer, 128 by"),
        (("run", "--width", "1"), "expected a whole number of at least 2, or 0 for the default"),
        (("run", "--width", "nan"), "options: width = nan"),
        (("run", "--width", "inf"), "options: width = inf: Input should be a finite number"),
        (
            ("run", "--width", "1e9"),
            "width of model 'mlp' is 1e+09 (width counts hidden units a layer, 128 by default)",
        ),
        (
            ("run", "--model", "resnet20", "--width", "1e9"),
            "is 1e+09 (width multiplies all layers, 1 by default): its we",
        ),
        (
            ("run", "--model", "resnet20", "--width", "0.01"),
            "leaves 0 units in a layer, 2 are the least; give at least",
        ),
        (("run", "--lr", "inf"), "options: lr = inf: Input should be a finite number"),
        (("run", "--lr", "nan"), "options: lr = nan: Input should be a finite number"),
        (("run", "true.toml"), "true.toml: local-epochs = True: "),
        (("run", "--resume"), "--resume continues the run of a folder; name it with --out"),
        (("run", "--resume", "--out", "nowhere"), "nowhere/config.toml: cannot be read (No such file or directory)"),
        (("run", "--seed", str(2**70)), "less than 2**63"),
        (("run", "--reference", "99"), "reference = '99': expected largest, best or a client, 0 to 4"),
        (("run", "--dataset", "photos"), "photos (train): cannot decode cat/a.png: it is no image of a known format"),
        (("run", "--dataset", "run"), "run holds neither train-*.parquet files nor class folders of images"),
        (("run", "--dataset", ""), "unknown data set ''"),
        (("run", "--dataset", "x" * 5000), "File name too long"),
        (("run", "--public-fraction", "1e-9"), "is none; give 0 or at least"),
        (
            ("run", "--partition", "dirichlet", "--partition-alpha", "inf"),
            "partition-alpha = inf: Input should be a finite",
        ),
        (("run", "binary.toml"), "binary.toml: not a TOML file: it holds NUL bytes"),
        (("run", "latin.toml"), "latin.toml: not a TOML file: line 1 is not UTF-8 text"),
        (("run", "windows.toml"), "write a Windows path in single quotes"),
        (("run", "photos"), "photos: cannot be read (Is a directory)"),
        (("run", "--out", "file/sub"), "file/sub cannot be written: Not a directory; choose another --out"),
        (("bench", "deep.toml"), "deep.toml: not a TOML file"),
        (("bench", "latin.toml"), "latin.toml: not a TOML file: line 1 is not UTF-8 text"),
        (("bench", "photos"), "photos: cannot be read (Is a directory)"),
        (("report", "file"), "file is no folder"),
        (("report", "run", "--out", "file"), "file is a file; give a folder with --out"),
        (("report", "run"), "config.toml is not TOML"),
        (("report", "old"), "summary.json makes no sense"),
        (("list", ""), "unknown kind ''"),
        (("spec", ""), "unknown model ''"),
        (("spec", ":"), "unknown model ':'"),
        (("spec", "module_that_fails:make"), "failed with ZeroDivisionError: division by zero; expected a function"),
        (("spec", "module_with_a_mistake:make"), "SyntaxError"),
        (("spec", "mlp", "--classes", "0"), "model 'mlp' for 0 classes"),
        (("spec", "mlp", "--classes", str(10**12)), "model 'mlp': its weights need"),
        (("spec", "mlp", "--input-shape", "-1,1,1"), "images of shape (-1, 1, 1): expected a positive (C, H, W)"),
        (("spec", "mlp", "--input-shape", "3,1000000,1000000"), "that fits into memory"),
        (("spec", "hlb", "--kernel-size", "1000"), "hlb with kernel_size 1000 needs images of at least 1000x1000"),
        (("spec", "mlp", "--dataset", "photos"), "cannot decode cat/a.png"),
        (("merge", "a.pt", "a.pt", *MERGE), "a.pt cannot be read: it is a pickle that is damaged or holds code"),
        (("merge", "photos", "a.pt", *MERGE), "photos cannot be read as safetensors: it is a folder"),
        (("merge", "empty.safetensors", "a.pt", *MERGE), "it is empty (0 bytes)"),
        (("merge", "nowhere", "a.pt", *MERGE), "nowhere cannot be read as safetensors: No such file; check its name"),
        (("merge", "a.pt", "a.pt", "--model", "mlp", "-o", "file"), "file exists; choose another -o"),
        (("merge", "a.pt", "a.pt", "--model", "mlp", "-o", "file/x"), "file/x cannot be written"),
        (("merge", "a.pt", "a.pt", "--model", "mlp", "-o", "x.pt"), "what is written is safetensors; name it x.safet"),
        (("merge", "a.pt", "a.pt", *MERGE, "--weights", ","), "--weights ',': expected 2 numbers"),
        (("study", "counterexample", "--seeds", "0.5"), "--seeds '0.5': expected 1 number, a whole one"),
    ],
)
def test_nothing_that_a_user_can_give_ends_in_a_raw_exception(
    args: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert call(monkeypatch, *args) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "unit"),
    [
        ("run", "mlp: hidden units a layer, hlb: base channels, others: a factor of all layers"),
        ("merge", "in the unit of `fedmerge list models`"),
        ("spec", "in the unit of `fedmerge list models`"),
    ],
)
def test_help_states_the_unit_of_a_width(
    command: str, unit: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert call(monkeypatch, command, "--help") == 0
    assert unit in " ".join(capsys.readouterr().out.split())


QUICK = """
import sys
sys.argv = ["fedmerge", *{arguments!r}]
from experiments.cli import main
try:
    main()
finally:
    print("loaded:", *sorted({{"torch", "flwr", "ray", "numpy"}} & set(sys.modules)))
"""


OPTIONS = "\n".join(
    word
    for key, field in RunConfig.model_fields.items()
    for word in (
        [f"--{key}", f"--no-{key}"]
        if bool in (field.annotation, *map(type, get_args(field.annotation)))
        else [f"--{key}"]
    )
).replace("_", "-")
"""All keys of a configuration as a shell shows them."""


@pytest.mark.parametrize(
    ("arguments", "completing", "said"),
    [
        (["--help"], {}, "--version"),
        (["--version"], {}, f"fedmerge {fedmerge.__version__}"),
        ([], {"_FEDMERGE_COMPLETE": "complete_bash", "COMP_WORDS": "fedmerge be", "COMP_CWORD": "1"}, "bench"),
        ([], {"_FEDMERGE_COMPLETE": "complete_bash", "COMP_WORDS": "fedmerge run --", "COMP_CWORD": "2"}, OPTIONS),
    ],
    ids=["help", "version", "completion", "completion of run"],
)
def test_help_version_and_completion_wait_for_no_torch(
    arguments: list[str], completing: dict[str, str], said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUICK.format(arguments=arguments)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **completing}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert "loaded:\n" in done.stdout


def test_a_shipped_grid_is_found_by_its_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder of that name is no grid
    cells = grid.read(grid.found(Path("demo")))
    assert [cell.name for cell in cells] == [cell.name for cell in grid.read(ROOT / "experiments/configs/demo.toml")]
    assert call(monkeypatch, "bench", "dmeo") == 2
    assert "unknown grid (and no file of that name is here) 'dmeo'" in capsys.readouterr().err
    assert call(monkeypatch, "list", "grids") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "demo five clients with some 230 images each train from different initialisations and meet once." in shown
    (tmp_path / "rounds").write_text("[base]\nclients = 3\n")
    assert grid.found(Path("rounds")) == Path("rounds")


def test_what_clients_and_folders_are_called_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are the terminal's markup; a client's error that holds some must not end the run."""
    for text in ("bad [/path] token", "[red", r"back\\slash\[/x]", "ends in \\"):
        with terminal.watch() as bars:
            display = bars.callback()
            display.say(f"fedavg on {text}")
            display.failure(Failure(1, 0, text))
        shown = " ".join(capsys.readouterr().out.split())
        assert f"fedavg on {text}" in shown
        assert f"round 1: client 0 left out: {text}" in shown


def test_an_unknown_option_has_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "run", "--local-epoch", "3") == 2
    assert "--local-epochs" in capsys.readouterr().err


def test_help_says_what_a_zero_means_and_lists_the_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert call(monkeypatch, "run", "--help") == 0
    lines = [" ".join(line.strip("│ ").split()) for line in capsys.readouterr().out.splitlines()]
    shown = {line.split()[0].removeprefix("--").replace("-", "_"): line for line in lines if line.startswith("--")}
    for key, field in RunConfig.model_fields.items():
        assert ", ".join(choices(key)) in shown[key]
        if field.default is not False and field.default in (0, -1) and key != "seed":
            assert f"; {field.default:g} " in shown[key], key
        elif key in ("optimizer", "schedule", "nesterov", "augment", "channels_last"):
            assert "(default: the model's own)" in shown[key]
        elif field.default == "":
            assert "(default: none)" in shown[key]
    counted = {key for key in RunConfig.model_fields if choices(key)}
    assert counted >= {"dataset", "model", "partition", "init", "optimizer", "schedule", "strategy", "aligner", "merger",
                       "repair", "retrain", "server_average", "controls", "device"}  # fmt: skip


@pytest.mark.parametrize("command", ["run", "bench", "report"])
def test_mlflow_that_is_not_installed_is_said_before_anything_begins(
    command: str, write_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    (tmp_path / "grid.toml").write_text("[base]\nclients = 2\n")
    directory = write_run("runs/run")
    given = {"run": ("--out", tmp_path / "out"), "bench": (tmp_path / "grid.toml",), "report": (directory,)}
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, command, *given[command], "--mlflow") == 2
    captured = capsys.readouterr()
    assert captured.err.strip() == 'error: --mlflow needs MLflow, and there is none: pip install "fedmerge[mlflow]"'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.toml", "runs"]
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["run"]
    assert not (directory / "report.html").exists()
    assert captured.out == ""


def test_help_shows_brackets_and_the_help_of_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call(monkeypatch, "bench", "--help") == 0
    shown = capsys.readouterr().out
    assert "Apply the [quick] table: the same, smaller." in shown
    assert "A grid: [base], [grid], [[cells]], [[exclude]], [quick], extends." in shown


def test_list_names_everything_and_refuses_unknown_kinds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "list") == 0
    shown = capsys.readouterr().out
    for name in ("cifar10", "hlb", "dirichlet", "weight-matching", "merge-many", "fedavg", "distill", "centralised"):
        assert name in shown
    assert call(monkeypatch, "list", "models") == 0
    assert "fedavg" not in capsys.readouterr().out
    assert call(monkeypatch, "list", "model") == 2
    assert "did you mean 'models'?" in capsys.readouterr().err


def test_report_of_a_folder_without_runs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "report", tmp_path) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_run_is_resumed_by_its_folder_alone_and_one_that_is_finished_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate_here(monkeypatch.setattr)
    monkeypatch.setattr(cli, "_report", lambda *_: None)

    def run(*args: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["fedmerge", "run", *map(str, args)])
        with suppress(SystemExit):
            cli.main()
        return capsys.readouterr()

    out = tmp_path / "a"
    given = ("--strategy", "fedavg", "--controls", "none", "--clients", 2, "--width", 8, "--local-epochs", 1)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "keep", lambda *_: 1 / 0)  # after the last round
        idle = run(*given, "--teacher", "mean", "--rounds", 2, "--out", out).out
    assert "takes none of it: teacher = mean\n" in idle  # nothing in plain FedAvg has a teacher
    assert "failed" in RunDirectory(out).status
    before = (out / "config.toml").read_bytes()
    resumed = run("--resume", "--out", out).out
    assert "continuing after round 1" in resumed
    assert "takes none of it" not in resumed
    assert RunDirectory(out).finished
    model = out / "model.safetensors"
    when = model.stat().st_mtime_ns
    said = " ".join(run("--resume", "--out", out).out.split())
    assert (
        said == f"{out} is finished, nothing is left to do: `fedmerge report {out}` shows it, another --out begins anew"
    )
    assert "another run: seed = 0 there, 1 here" in run("--resume", "--out", out, "--seed", 1).err
    assert (model.stat().st_mtime_ns, (out / "config.toml").read_bytes()) == (when, before)


def test_report_prints_the_table_and_writes_the_page(
    write_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "run")
    assert call(monkeypatch, "report", path) == 0
    assert "report:" in capsys.readouterr().out
    assert (path / "report.html").is_file()


def test_doctor_says_what_this_machine_has(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "measure_client", lambda: doctor.ClientCost("one client", 0.5, 2**20))
    assert call(monkeypatch, "doctor") == 0
    shown = capsys.readouterr().out
    for name in ("torch", "Ray", "Flower", "digits"):
        assert name.lower() in shown.lower()


def test_new_runs_get_folders_of_their_own(tmp_path: Path) -> None:
    first = cli._fresh(tmp_path, "run")
    first.mkdir()
    assert cli._fresh(tmp_path, "run").name == "run-2"
