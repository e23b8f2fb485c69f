"""The command ``fedmerge``."""

import importlib.metadata
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from click.core import ParameterSource

# Nothing that imports torch here: `fedmerge --help` and a shell's completion would wait for it.
from experiments import commands
from experiments.options import Classes, InputShape, KernelSize, Out, Width, said_by_images, with_config_options
from experiments.options import fresh as _fresh
from experiments.options import numbers as _numbers
from experiments.terminal import console, errors, one_line, print_anything, watch
from fedmerge.errors import ConfigError, FedmergeError, RoundError
from fedmerge.progress import counted

app = typer.Typer(
    name="fedmerge",
    help="Simulate federated learning in which the server aligns the clients' networks, merges them, retrains the "
    "result on public data, and compares it with FedAvg.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


Resume = Annotated[bool, typer.Option("--resume", help="Continue what --out already holds, by its own config.toml.")]
Cpus = Annotated[int, typer.Option(help="Cores for all clients together; 0 is all of them.")]
ClientCpus = Annotated[float, typer.Option(help="Cores of one client.")]
ClientGpus = Annotated[float, typer.Option(help="Share of a GPU of one client; negative shares it equally.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Flower's and Ray's own logs too.")]
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
    with watch() as bars:
        with counted("loading Ray", 1):
            from experiments.launch.simulation import Resources, simulate
            from experiments.records.keys import unused
            from experiments.records.runs import Run
            from server import RunConfig, RunDirectory, changed, held, read_toml

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
            shown = f"`fedmerge report {out}` shows it, another --out begins anew"
            said = f"{out} is finished, nothing is left to do: {shown}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
            return
        if idle := [f"{key} = {value}" for key, value in asked.items() if key in unused(parsed.flat())]:
            said = f"not used, for the rest of this configuration takes none of it: {', '.join(idle)}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
        tracker = _tracker(mlflow)
        path = out or _fresh(Path("runs"), f"{parsed.strategy}-{Path(parsed.dataset).name}-seed{parsed.seed}")
        resources, display = Resources(cpus, client_cpus, client_gpus), bars.callback()
        with held(path):
            simulate([(parsed, path)], resources=resources, callbacks=[display], resume=resume, verbose=verbose)
            _conclude([Run.load(path)])
            _report(path, tracker)


@contextmanager
def _loading() -> Iterator[None]:
    with watch(), counted("loading torch and Flower", 1):
        yield


app.command("run", cls=with_config_options(_run, _loading), help=inspect.getdoc(_run))(lambda: None)


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
    audit: Annotated[
        int, typer.Option(help="Attack the finished runs too, each with so many shadow federations; 0 for no audit.")
    ] = 0,
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
    with watch() as bars:
        with counted("loading torch, Flower and Ray", 1):
            from experiments.grids import bench as benches
            from experiments.grids import files as grid
            from experiments.launch.simulation import Resources, full_disk_named, try_out
            from experiments.records.runs import find

        tracker = _tracker(mlflow)
        config = grid.found(config)
        cells = grid.read(config, quick=quick, check=try_out)
        if audit:
            from experiments.audit.audit import check_shadows

            for planned in cells:
                check_shadows(planned.config, audit)
        name = f"{config.stem}-quick" if quick else config.stem
        path = out or (Path("runs") / name if resume else _fresh(Path("runs"), name))
        console.print(f"{len(cells)} runs into {path}", highlight=False, markup=False)
        resources, display = Resources(cpus, client_cpus, client_gpus), bars.callback()
        failed = benches.run(cells, path, resources=resources, callbacks=[display], resume=resume, verbose=verbose)
        if len(failed) < len(cells):
            _conclude(find(path))
            with full_disk_named(path):
                if audit:
                    commands.attack(path, find(path), shadows=audit)
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
    ctx: typer.Context,
    checkpoints: Annotated[
        list[Path],
        typer.Argument(help="Two or more safetensors or .pt files of one network; or a recipe, a .toml file."),
    ],
    model: Annotated[str, typer.Option(help="A network by name, or module:factory.")] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The merged checkpoint.")] = None,
    dataset: Annotated[str, typer.Option(help="Data set: gives shape and classes, and images for --repair.")] = "",
    classes: Classes = 10,
    input_shape: InputShape = "3,32,32",
    width: Width = 0.0,
    kernel_size: KernelSize = 0,
    weights: Annotated[str, typer.Option(help="One number a checkpoint, for example 2,1,1; equal if left out.")] = "",
    merger: Annotated[str, typer.Option(help="How the networks are combined.")] = "merge-many",
    base: Annotated[Path | None, typer.Option(help="Where their training began: for mergers that need a base.")] = None,
    aligner: Annotated[str, typer.Option(help="How one network is aligned to another.")] = "weight-matching",
    repair: Annotated[str, typer.Option(help="How statistics are corrected.")] = "none",
    fold: Annotated[bool, typer.Option("--fold", help="Carry BatchNorm into the weights before it.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the climb.")] = 0,
) -> None:
    """Align and merge checkpoints without any federation, as the options or a recipe say."""
    from experiments.tools import checkpoints as files

    if len(checkpoints) == 1 and checkpoints[0].suffix == ".toml":
        given = [name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        _carry_out(checkpoints[0], out, [name for name in given if name not in ("checkpoints", "out")])
        return
    if not model or out is None:
        raise ConfigError("merge needs --model and --out, or a recipe: fedmerge merge recipe.toml")
    said_by_images(ctx)
    network = files.architecture(
        model, dataset=dataset, classes=classes, input_shape=_numbers("--input-shape", input_shape, int, 3),
        width=width, kernel_size=kernel_size,
    )  # fmt: skip
    shares = _numbers("--weights", weights, float, len(checkpoints)) if weights else None
    with watch(resumes=False):
        found = files.merge_checkpoints(
            checkpoints, out, network, weights=shares, merger=merger, aligner=aligner, repairing=repair, fold=fold,
            base=base, seed=seed, say=lambda line: console.print(line, highlight=False, soft_wrap=True),
        )  # fmt: skip
    climb = f", objective {found.objective:.6g} after {found.sweeps} sweeps" if found.history else ""
    console.print(
        f"{len(checkpoints)} networks merged into {out}{climb}", highlight=False, markup=False, soft_wrap=True
    )


def _carry_out(path: Path, out: Path | None, options: list[str]) -> None:
    """Merge by a recipe; ``out`` is another place for the result."""
    from experiments.tools import recipes

    if options:
        raise ConfigError(f"--{options[0].replace('_', '-')} beside {path}: write it into the recipe")
    recipe = recipes.MergeRecipe.read(path)
    recipe = recipe.model_copy(update={"out": out}) if out is not None else recipe
    with watch(resumes=False):
        table = recipes.carry_out(recipe, lambda line: console.print(line, highlight=False, soft_wrap=True))
    console.print(table)
    console.print(
        f"{len(recipe.models)} networks merged into {recipe.out}", highlight=False, markup=False, soft_wrap=True
    )


app.command()(commands.study)
app.command()(commands.compare)
app.command()(commands.audit)


# -- spec -------------------------------------------------------------------------------------------------


@app.command()
def spec(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A network by name, or module:factory.")],
    dataset: Annotated[str, typer.Option(help="Data set: gives shape and classes.")] = "",
    classes: Classes = 10,
    input_shape: InputShape = "3,32,32",
    width: Width = 0.0,
    kernel_size: KernelSize = 0,
    draw: Annotated[Path | None, typer.Option(help="Also draw them: a .png, .svg or .pdf file.")] = None,
) -> None:
    """Print the permutation symmetries of a network: which axes move together, which stay and why."""
    from experiments.tools import checkpoints as files
    from fedmerge import perm_spec

    said_by_images(ctx)
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
    zero if no run finished, and one of them failed or cannot be read; a run that is not over yet is no failure.
    """
    from experiments.records.differences import differences
    from experiments.records.runs import find, is_run
    from experiments.report.tables import side_by_side

    path = out or (directories[0] if len(directories) == 1 else Path("runs") / "comparison")
    if is_run(path) and [path.resolve()] != [directory.resolve() for directory in directories]:
        raise ConfigError(f"--out {path} is a run with a report of its own; give another folder")
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder with --out")
    tracker = _tracker(mlflow)
    with watch(resumes=False):
        runs = find(*directories)
    _conclude(runs)
    if len(runs) == 2:
        console.print(side_by_side(differences(runs), [run.name for run in runs]))
    for run in runs:
        if run.problem and (len(runs) > 1 or run.status == "unfinished"):
            errors.print(f"[yellow]{one_line(run.name)} {one_line(run.problem)}[/]", highlight=False, soft_wrap=True)
    with watch(resumes=False):
        _report(path, tracker, runs)
    if all(run.problem for run in runs) and any(run.status != "unfinished" for run in runs):
        why = f"{runs[0].path} {runs[0].problem}" if len(runs) == 1 else f"none of the {len(runs)} runs finished"
        raise RoundError(why)


def _conclude(runs: Sequence[Any]) -> None:
    """The verdict, then the table that it can be checked against."""
    from experiments.compare.stages import compare, stage_table
    from experiments.compare.verdict import sentence, verdicts
    from experiments.report.tables import privacy_lines, render

    for verdict in verdicts(runs):
        console.print(sentence(verdict), style="bold", markup=False, highlight=False)
    table = compare(runs) if len(runs) > 1 else stage_table(runs[0])
    failures = [failure for run in runs if run.finished or len(runs) == 1 for failure in run.failures]
    if len(table):
        title = runs[0].label if len(runs) == 1 else None
        console.print(render(table, failures, title=title, notes=privacy_lines(runs)))


def _report(path: Path, tracker: Any, runs: Any = None) -> None:
    with counted("writing the report", 1):
        from experiments.report.page import write_report

        written = write_report(path, runs)
    console.print(f"report: {written}", highlight=False, markup=False, soft_wrap=True)
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
    from experiments.grids.files import shipped
    from experiments.studies import STUDIES
    from experiments.tools.listing import tables

    studies = {name: f"{study.summary}; {study.cost}" for name, study in STUDIES.items()}
    for table in tables(kind, {"grids": shipped(), "studies": studies}):
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
