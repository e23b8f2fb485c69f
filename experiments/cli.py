"""The command ``fedmerge``."""

import functools
import importlib.metadata
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args

import click
import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand
from typer.models import CommandInfo

# Nothing that imports torch here: `fedmerge --help` and a shell's completion would wait for it.
from experiments.terminal import console, errors, one_line, print_anything, watch
from fedmerge.errors import ConfigError, FedmergeError, RoundError, UnknownNameError

app = typer.Typer(
    name="fedmerge",
    help="Simulate federated learning in which the server aligns the clients' networks, merges them, retrains the "
    "result on public data, and compares it with FedAvg.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results; new, or empty.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what --out already holds, by its own config.toml.")]
Cpus = Annotated[int, typer.Option(help="Cores for all clients together; 0 is all of them.")]
ClientCpus = Annotated[float, typer.Option(help="Cores of one client.")]
ClientGpus = Annotated[float, typer.Option(help="Share of a GPU of one client; negative shares it equally.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Flower's and Ray's own logs too.")]
Width = Annotated[float, typer.Option(help="The network's width, in the unit of `fedmerge list models`; 0 is its own.")]
MLflow = Annotated[
    bool, typer.Option("--mlflow", help="Log to MLflow too: MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where.")
]


def main() -> None:
    """Entry point: errors that a user can act on are one line, and a non-zero exit."""
    print_anything()
    try:
        app()
    except FedmergeError as error:
        errors.print(f"[bold red]error:[/] {one_line(error)}", highlight=False, soft_wrap=True)
        sys.exit(1 if isinstance(error, RoundError) else 2)
    except (OSError, MemoryError, RecursionError) as error:  # a file or folder that may not be read or written
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else repr(error)
        errors.print(f"[bold red]error:[/] {one_line(said)}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _say_version(wanted: bool) -> None:
    if wanted:
        console.print(f"fedmerge {importlib.metadata.version('fedmerge')}", highlight=False)
        raise typer.Exit


@app.callback()
def _fedmerge(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


# -- run --------------------------------------------------------------------------------------------------


def _run(
    config: Annotated[Path | None, typer.Argument(help="A TOML file of the keys below; options change it.")] = None,
    out: Out = None,
    resume: Resume = False,
    cpus: Cpus = 0,
    client_cpus: ClientCpus = 1.0,
    client_gpus: ClientGpus = -1.0,
    mlflow: MLflow = False,
    verbose: Verbose = False,
    **options: Any,
) -> None:
    """Run one federated simulation and write its table, pictures and report.

    Every key of the configuration is an option. The run directory is complete and readable at any moment.
    """
    from experiments.launch.simulation import Resources, simulate
    from experiments.records.runs import Run
    from server import RunConfig, RunDirectory, changed, read_toml

    asked = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
    if resume and out is None:
        raise ConfigError("--resume continues the run of a folder; name it with --out")
    if resume and config is None and out is not None and (not asked or (out / "config.toml").exists()):
        config = out / "config.toml"
    given = read_toml(config) if config is not None else {}
    source = str(config) if config is not None and not asked else "options"
    parsed = RunConfig.parse(changed(given, asked), source)
    if resume and out is not None and RunDirectory(out).finished:
        RunDirectory.open(out, parsed, resume=True)
        console.print(
            f"{out} is finished, nothing is left to do: `fedmerge report {out}` shows it, another --out begins anew",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        return
    tracker = _tracker(mlflow)
    path = out or _fresh(Path("runs"), f"{parsed.strategy}-{Path(parsed.dataset).name}-seed{parsed.seed}")
    with watch() as display:
        resources = Resources(cpus, client_cpus, client_gpus)
        simulate([(parsed, path)], resources=resources, callbacks=[display], resume=resume, verbose=verbose)
    _conclude([Run.load(path)])
    _report(path, tracker)


def _fresh(folder: Path, name: str) -> Path:
    """``folder/name``, or with the next free number behind it."""
    return next(p for i in range(1, 10**6) if not (p := folder / (name if i == 1 else f"{name}-{i}")).exists())


@functools.cache
def _with_config_options(function: Any) -> Any:
    """Give ``function`` an option for every key of :class:`server.RunConfig`."""
    from server import RunConfig, choices

    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    position = next(i for i, p in enumerate(parameters) if p.name == "out")
    keys = []
    for name, field in RunConfig.model_fields.items():
        kind = bool if True in get_args(field.annotation) else field.annotation
        kind = kind if kind in (int, float, bool, str) else str
        listed = ", ".join(choices(name))
        default = field.default if field.default != "" else "the model's own" if listed or kind is bool else "none"
        shown = f"{field.description}{listed and ': '}{listed} [dim](default: {default})[/]"
        option = typer.Option(help=shown, show_default=False, rich_help_panel="Configuration")
        annotation = Annotated[Union[kind, None], option]  # type: ignore[valid-type]  # noqa: UP007
        keys.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    before = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    function.__signature__ = signature.replace(parameters=[*before[:position], *keys, *before[position:]])
    function.__annotations__ = {p.name: p.annotation for p in function.__signature__.parameters.values()}
    return function


class _RunCommand(TyperCommand):
    """``run``, whose options are those of :class:`server.RunConfig`: made when they are asked for, see the imports."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Its options, and with them what it does."""
        if not self.params:
            info = CommandInfo("run", callback=_with_config_options(_run))
            full = typer.main.get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode="rich")
            self.params, self.callback = full.params, full.callback
        return super().get_params(ctx)


app.command("run", cls=_RunCommand, help=inspect.getdoc(_run))(lambda: None)


# -- bench ------------------------------------------------------------------------------------------------


@app.command()
def bench(
    config: Annotated[
        Path,
        typer.Argument(
            help=r"A grid: \[base], \[grid], [\[cells]], [\[exclude]], \[quick], extends. Or the name of a shipped one."
        ),
    ],
    out: Out = None,
    resume: Resume = False,
    quick: Annotated[bool, typer.Option("--quick", help=r"Apply the \[quick] table: the same, smaller.")] = False,
    cpus: Cpus = 0,
    client_cpus: ClientCpus = 1.0,
    client_gpus: ClientGpus = -1.0,
    mlflow: MLflow = False,
    verbose: Verbose = False,
) -> None:
    """Run a grid of simulations and compare them: mean and standard deviation over seeds.

    Finished runs are never repeated: after an interruption the same command with --resume goes on. A run that fails
    is reported at the end, the others go on, and --resume tries it again.
    """
    from experiments.grids import bench as benches
    from experiments.grids import files as grid
    from experiments.launch.simulation import Resources, full_disk_named, try_out
    from experiments.records.runs import find

    tracker = _tracker(mlflow)
    config = grid.found(config)
    cells = grid.read(config, quick=quick, check=try_out)
    name = f"{config.stem}-quick" if quick else config.stem
    path = out or (Path("runs") / name if resume else _fresh(Path("runs"), name))
    console.print(f"{len(cells)} runs into {path}", highlight=False)
    with watch() as display:
        resources = Resources(cpus, client_cpus, client_gpus)
        failed = benches.run(cells, path, resources=resources, callbacks=[display], resume=resume, verbose=verbose)
    if len(failed) < len(cells):
        _conclude(find(path))
        with full_disk_named(path):
            _report(path, tracker)
    for cell, reason in failed.items():
        errors.print(f"[bold red]{cell} failed:[/] {one_line(reason)}", highlight=False, soft_wrap=True)
    if failed:
        raise RoundError(
            f"{len(failed)} of {len(cells)} runs failed, the others are complete; --resume with --out {path} tries "
            "again, fedmerge run CONFIG --verbose with the config.toml of a failed run shows more"
        )


# -- merge ------------------------------------------------------------------------------------------------


@app.command("merge")
def merge_files(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two or more safetensors files of one architecture.")],
    model: Annotated[str, typer.Option(help="A network by name, or module:factory.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The merged checkpoint.")],
    dataset: Annotated[str, typer.Option(help="Data set: gives shape and classes, and images for --repair.")] = "",
    classes: Annotated[int, typer.Option(help="Number of classes, without --dataset.")] = 10,
    input_shape: Annotated[str, typer.Option(help="Channels, height, width, without --dataset.")] = "3,32,32",
    width: Width = 0.0,
    kernel_size: Annotated[int, typer.Option(help="The network's kernel size; 0 is its own.")] = 0,
    weights: Annotated[str, typer.Option(help="One number a checkpoint, for example 2,1,1; equal if left out.")] = "",
    merger: Annotated[str, typer.Option(help="How the networks are combined.")] = "merge-many",
    base: Annotated[Path | None, typer.Option(help="Where their training began: for task-arithmetic, ties.")] = None,
    aligner: Annotated[str, typer.Option(help="How one network is aligned to another.")] = "weight-matching",
    repair: Annotated[str, typer.Option(help="How statistics are corrected.")] = "none",
    fold: Annotated[bool, typer.Option("--fold", help="Carry BatchNorm into the weights before it.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the climb.")] = 0,
) -> None:
    """Align and merge checkpoints without any federation."""
    from experiments.tools import checkpoints as files

    network = files.architecture(
        model, dataset=dataset, classes=classes, input_shape=_numbers("--input-shape", input_shape, int, 3),
        width=width, kernel_size=kernel_size,
    )  # fmt: skip
    shares = _numbers("--weights", weights, float, len(checkpoints)) if weights else None
    found = files.merge_checkpoints(
        checkpoints,
        out,
        network,
        weights=shares,
        merger=merger,
        aligner=aligner,
        repairing=repair,
        fold=fold,
        base=base,
        seed=seed,
        say=lambda line: console.print(line, highlight=False, soft_wrap=True),
    )
    climb = f", objective {found.objective:.6g} after {found.sweeps} sweeps" if found.history else ""
    console.print(f"{len(checkpoints)} networks merged into {out}{climb}", highlight=False, soft_wrap=True)


def _numbers(option: str, text: str, kind: Any, count: int) -> Any:
    """``count`` numbers separated by commas."""
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise ConfigError(f"{option} {text!r}: expected {count} numbers separated by commas")
    return numbers


# -- spec -------------------------------------------------------------------------------------------------


@app.command()
def spec(
    model: Annotated[str, typer.Argument(help="A network by name, or module:factory.")],
    dataset: Annotated[str, typer.Option(help="Data set: gives shape and classes.")] = "",
    classes: Annotated[int, typer.Option(help="Number of classes, without --dataset.")] = 10,
    input_shape: Annotated[str, typer.Option(help="Channels, height, width, without --dataset.")] = "3,32,32",
    width: Width = 0.0,
    kernel_size: Annotated[int, typer.Option(help="The network's kernel size; 0 is its own.")] = 0,
    draw: Annotated[Path | None, typer.Option(help="Also draw them: a .png, .svg or .pdf file.")] = None,
) -> None:
    """Print the permutation symmetries of a network: which axes move together, which stay and why."""
    from experiments.tools import checkpoints as files
    from fedmerge import perm_spec

    network = files.architecture(
        model, dataset=dataset, classes=classes, input_shape=_numbers("--input-shape", input_shape, int, 3),
        width=width, kernel_size=kernel_size,
    )  # fmt: skip
    found = perm_spec(network.model, network.example)
    if draw is not None:
        found.draw(draw, title=model)
    console.print(str(found), highlight=False, markup=False, soft_wrap=True)
    if draw is not None:
        console.print(f"picture: {draw}", highlight=False, markup=False, soft_wrap=True)


# -- report, list, doctor -----------------------------------------------------------------------------------


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Run directories, or folders of runs.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the report; of several directories runs/comparison if left out."),
    ] = None,
    mlflow: MLflow = False,
) -> None:
    """Make tables, pictures and the self-contained report.html again, from the files of runs.

    Several directories are compared in one report; of two runs it also says in which keys they differ. The exit is not
    zero if no run finished.
    """
    from experiments.records.differences import differences
    from experiments.records.runs import find, is_run
    from experiments.report.tables import side_by_side

    path = out or (directories[0] if len(directories) == 1 else Path("runs") / "comparison")
    if is_run(path) and [path.resolve()] != [directory.resolve() for directory in directories]:
        raise ConfigError(f"--out {path} is a run with a report of its own; give another folder")
    tracker = _tracker(mlflow)
    runs = find(*directories)
    _conclude(runs)
    if len(runs) == 2:
        console.print(side_by_side(differences(runs), [run.name for run in runs]))
    for run in runs if len(runs) > 1 else ():
        if run.problem:
            errors.print(f"[yellow]{one_line(run.name)} {one_line(run.problem)}[/]", highlight=False, soft_wrap=True)
    _report(path, tracker, runs)
    if all(run.problem for run in runs) and any(run.status != "unfinished" for run in runs):
        why = f"{runs[0].path} {runs[0].problem}" if len(runs) == 1 else f"none of the {len(runs)} runs finished"
        raise RoundError(why)


def _conclude(runs: Sequence[Any]) -> None:
    """The verdict, then the table that it can be checked against."""
    from experiments.compare.stages import compare, stage_table
    from experiments.compare.verdict import sentence, verdicts
    from experiments.report.tables import render

    for verdict in verdicts(runs):
        console.print(sentence(verdict), style="bold", markup=False, highlight=False)
    table = compare(runs) if len(runs) > 1 else stage_table(runs[0])
    failures = [failure for run in runs if run.finished or len(runs) == 1 for failure in run.failures]
    if len(table):
        console.print(render(table, failures, title=runs[0].label if len(runs) == 1 else None))


def _report(path: Path, tracker: Any, runs: Any = None) -> None:
    from experiments.report.page import write_report

    written = write_report(path, runs)
    console.print(f"report: {written}", highlight=False, soft_wrap=True)
    if tracker is not None:
        tracker.log(path, runs)


def _tracker(wanted: bool) -> Any:
    """MLflow, reached before anything long begins; None where it is not wanted."""
    if not wanted:
        return None
    from experiments.tools.tracking import Tracker

    return Tracker()


@app.command("list")
def list_names(
    kind: Annotated[
        str | None, typer.Argument(help="datasets, models, partitions, aligners ...; all if left out.")
    ] = None,
) -> None:
    """List what can be named in a configuration, one line each."""
    import strategies
    from experiments.grids import files as grid
    from fedmerge import aligners, data, mergers, models, repairs, running_averages
    from fedmerge.registry import REGISTRIES
    from server import CONTROLS

    kinds: dict[str, Mapping[str, str]] = {
        "datasets": data.summaries(),
        "models": models.summaries(),
        "partitions": data.partition_summaries(),
        "aligners": aligners(),
        "mergers": mergers(),
        "repairs": repairs(),
        "retrainings": strategies.retrainings(),
        "running-averages": running_averages(),
        "strategies": strategies.summaries(),
        "controls": CONTROLS.summaries(),
        "grids": grid.shipped(),
    }
    if kind is not None and kind not in kinds:
        raise UnknownNameError("kind", kind, kinds)
    brought = {registry.group: registry.offers() for registry in REGISTRIES.values()}
    for name in [kind] if kind else kinds:
        table = Table(
            title=name, box=None, show_header=False, title_justify="left", title_style="bold", padding=(0, 2, 0, 0)
        )
        for entry, summary in kinds[name].items():
            table.add_row(f"[cyan]{entry}[/]", summary)
        for plugin, summary, problem in brought.get(name, []):
            said = f"[yellow]cannot be used:[/] {one_line(problem)}" if problem else escape(summary)
            table.add_row(f"[cyan]{escape(plugin.name)}[/]", f"{said} [dim](from {escape(plugin.package)})[/]")
        console.print(table)
        console.print()


@app.command()
def doctor() -> None:
    """Say what this machine has: torch, CUDA, Ray, Flower, data found, and how many clients fit at once."""
    from experiments.tools import doctor as doctors

    with console.status("measuring one client"):
        findings = doctors.diagnose()
    console.print(doctors.render(findings))
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)
