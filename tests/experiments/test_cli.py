"""The command line, in this process: everything but the simulation itself, which has its own tests."""

import sys
from pathlib import Path

import pytest

from experiments import cli
from strategies import Failure


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedmerge", *map(str, args)])
    monkeypatch.setattr(cli.errors, "file", sys.stderr)
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


def test_what_clients_and_folders_are_called_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are the terminal's markup; a client's error that holds some must not end the run."""
    for text in ("bad [/path] token", "[red", r"back\\slash\[/x]", "ends in \\"):
        with cli._watch() as display:
            display.say(f"fedavg on {text}")
            display.waiting("training", 1)
            display.failure(Failure(1, 0, text))
        shown = " ".join(capsys.readouterr().out.split())
        assert f"fedavg on {text}" in shown
        assert f"round 1: client 0 left out: {text}" in shown


def test_an_unknown_option_has_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "run", "--local-epoch", "3") == 2
    assert "--local-epochs" in capsys.readouterr().err


def test_every_key_of_the_configuration_is_an_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from server import RunConfig

    monkeypatch.setenv("COLUMNS", "200")
    assert call(monkeypatch, "run", "--help") == 0
    shown = capsys.readouterr().out
    for name in RunConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in shown


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


def test_spec_prints_the_table_and_draws_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "new" / "mlp.png"
    assert call(monkeypatch, "spec", "mlp", "--dataset", "digits", "--width", 6, "--draw", drawn) == 0
    shown = capsys.readouterr().out
    assert "fc1        6        2.9  fc1.*[0] | fc2.weight[1]" in shown
    assert f"picture: {drawn}" in shown
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("spec", "resnet21"), "did you mean 'resnet20'?"),
        (("spec", "cnn", "--dataset", "digits"), "8x8"),
        (("spec", "mlp", "--input-shape", "3,32"), "expected 3 numbers"),
        (("spec", "mlp", "--draw", "mlp.gif"), "mlp.gif: a picture is a .png, .svg, .pdf file"),
        (("spec", "mlp", "--draw", "taken/mlp.png"), "cannot be written"),
    ],
)
def test_spec_refuses_bad_input_in_one_line(
    args: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *args) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


def test_report_of_a_folder_without_runs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "report", tmp_path) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_report_prints_the_table_and_writes_the_page(
    write_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "run")
    assert call(monkeypatch, "report", path) == 0
    assert "report:" in capsys.readouterr().out
    assert (path / "report.html").is_file()


def test_doctor_says_what_this_machine_has(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "doctor") == 0
    shown = capsys.readouterr().out
    for name in ("torch", "Ray", "Flower", "digits"):
        assert name.lower() in shown.lower()


def test_new_runs_get_folders_of_their_own(tmp_path: Path) -> None:
    first = cli._fresh(tmp_path, "run")
    first.mkdir()
    assert cli._fresh(tmp_path, "run").name == "run-2"
