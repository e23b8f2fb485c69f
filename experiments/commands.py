"""Commands about studies and single networks, for ``experiments.cli``. Nothing that imports torch at the top."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.options import Classes, InputShape, KernelSize, Out, Width, fresh, numbers, said_by_images
from experiments.terminal import console, errors, watch
from fedmerge.errors import ConfigError
from fedmerge.progress import counted


def study(
    name: Annotated[str, typer.Argument(help="One of `fedmerge list studies`, or module:name.")],
    quick: Annotated[bool, typer.Option("--quick", help="The same in seconds, on digits.")] = False,
    full: Annotated[bool, typer.Option("--full", help="In the published size, for a GPU.")] = False,
    out: Out = None,
    seeds: Annotated[str, typer.Option(help="Others than the study's, for example 0,1,2.")] = "",
    dataset: Annotated[str, typer.Option(help="Another than the study's, by name or folder; the page names it.")] = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --out holds, its seeds too; with --seeds, add those.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Processes that share what is independent in it, its seeds mostly.")] = 1,
) -> None:
    """Run one study: its rows, a picture, and a page with its answer, the published numbers and ours.

    Rows are written as they are measured; the same command with --resume goes on after an interruption.
    """
    from experiments.studies import STUDIES, runner

    if quick and full:
        raise ConfigError("--quick and --full are two sizes; give one")
    size = "quick" if quick else "full" if full else "default"
    found = STUDIES[name]
    given = numbers("--seeds", seeds, int, seeds.count(",") + 1) if seeds else ()
    if min(given, default=0) < 0:
        raise ConfigError(f"--seeds {seeds}: a seed is a whole number of 0 or above")
    config = found.config(size, given, dataset)
    folder = f"study-{found.name}" if size == "default" else f"study-{found.name}-{size}"
    path = out or (Path("runs") / folder if resume else fresh(Path("runs"), folder))
    if resume and not seeds:
        config = runner.as_begun(config, path)
    with watch():
        page = runner.run(
            found, config, path, size=size, resume=resume, jobs=jobs,
            say=lambda line: console.print(line, markup=False),
        )  # fmt: skip
    console.print(f"page: {page}", highlight=False, markup=False, soft_wrap=True)


def compare(
    ctx: typer.Context,
    a: Annotated[Path, typer.Argument(help="A checkpoint, which stays as it is.")],
    b: Annotated[Path, typer.Argument(help="Another of the same architecture, which is aligned to it.")],
    model: Annotated[str, typer.Option(help="Their network by name, or module:factory.")],
    dataset: Annotated[
        str,
        typer.Option(help="Data set on whose test images, or all if it has none, they answer; without, weights only."),
    ] = "",
    images: Annotated[int, typer.Option(help="How many of them; 0 for all.")] = 2000,
    classes: Classes = 10,
    input_shape: InputShape = "3,32,32",
    width: Width = 0.0,
    kernel_size: KernelSize = 0,
    aligner: Annotated[str, typer.Option(help="How the second is aligned to the first.")] = "weight-matching",
    repair: Annotated[str, typer.Option(help="How statistics are corrected at each point of the line.")] = "none",
    points: Annotated[int, typer.Option(help="Points of the line between them.")] = 25,
    draw: Annotated[Path | None, typer.Option(help="Draw the line too: a .png, .svg or .pdf file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the alignment.")] = 0,
) -> None:
    """Compare two checkpoints: distance, agreement, and the line between them before and after alignment."""
    from experiments.tools import checkpoints as files
    from experiments.tools import compare as comparing
    from fedmerge import data, pictures

    if draw is not None:
        pictures.check_format(draw)
        if not dataset:
            raise ConfigError("--draw needs images to evaluate the line on; name a data set with --dataset")
    if images < 0 or points < 2:
        raise ConfigError(f"--images {images} and --points {points}: expected at least 0 and at least 2")
    said_by_images(ctx)
    network = files.architecture(
        model, dataset=dataset, classes=classes, input_shape=numbers("--input-shape", input_shape, int, 3),
        width=width, kernel_size=kernel_size,
    )  # fmt: skip
    seen = None
    if dataset:
        loaded = data.load(dataset)
        seen = loaded.train if loaded.test is None else loaded.test
        seen = seen.first(images or len(seen))
    with watch(resumes=False):
        found = comparing.compare(
            a, b, network, seen=seen, aligner=aligner, repairing=repair, points=points, seed=seed
        )  # fmt: skip
    console.print(comparing.render(found), highlight=False)
    if draw is not None:
        _draw_line(found, a, b, draw)


def _draw_line(found: Any, a: Path, b: Path, path: Path) -> None:
    from experiments.report.plots import line_between
    from fedmerge import pictures
    from server.records import Curve

    naive, aligned = (Curve(tuple(line.losses), tuple(line.accuracies)) for line in found.lines.values())
    alphas = next(iter(found.lines.values())).alphas
    title = f"From {a.stem} to {b.stem} in a straight line"
    pictures.save(line_between(title, f"α (0: {a.stem}, 1: {b.stem}); {found.images}", alphas, naive, aligned), path)
    console.print(f"picture: {path}", highlight=False, markup=False, soft_wrap=True)


def audit(
    directory: Annotated[Path, typer.Argument(help="A run directory, or a folder of runs.")],
    shadows: Annotated[int, typer.Option(help="Shadow federations of each run; more find more and take longer.")] = 16,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write what each network predicts, a CSV file a network.")
    ] = False,
) -> None:
    """Attack the networks of finished runs: was an image in the training set, and whose was it?

    Trains shadow federations of each run's configuration on other draws of its images, and attacks every stage of the
    run with them. Writes audit.json and audit.csv, and the report shows them.
    """
    from experiments.records.runs import find
    from experiments.report.page import write_report

    runs = find(directory)
    with watch(resumes=False):
        attack(directory, runs, shadows=shadows, probabilities=probabilities)
    with watch(resumes=False), counted("writing the report", 1):
        written = write_report(directory, runs)
    console.print(f"report: {written}", highlight=False, markup=False, soft_wrap=True)


def attack(directory: Path, runs: Sequence[Any], *, shadows: int, probabilities: bool = False) -> None:
    """Audit ``runs``, write what was found, beside those of a folder together too, and print it."""
    from experiments.audit import audit as auditing
    from experiments.report.leakage import table

    found = auditing.audit(runs, shadows=shadows, probabilities=probabilities)
    if [run.path for run in runs] != [directory]:
        auditing.write(directory, found)
    for run in runs:
        if not run.finished:
            errors.print(f"left out: {run.path} {run.problem}", markup=False, highlight=False, soft_wrap=True)
    console.print(found.sentence, style="bold", markup=False, highlight=False)
    console.print(table(found))
