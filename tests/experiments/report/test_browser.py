"""The report of a bench in a real browser: headless Chromium, driven by Playwright, with the network switched off."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest

from experiments.compare.stages import compare, outcomes
from experiments.records.runs import find
from experiments.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

COLLIDING = """[...document.querySelectorAll('figure svg')].flatMap(svg => {
    const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim() && t.checkVisibility())
        .map(t => [t.textContent, t.getBoundingClientRect()]);
    return texts.flatMap(([name, a], i) => texts.slice(i + 1).filter(([, b]) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.3 * Math.min(a.height, b.height)
    ).map(([other]) => `${svg.dataset.name}: ${name} on ${other}`));
})"""
"""Texts of pictures that lie on one another."""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on PATH (chromium, chromium-browser, google-chrome); on Debian: apt-get install chromium",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, writer: Callable[..., Path]) -> Path:
    """Three strategies, two initialisations, three seeds; one strategy only with one initialisation."""
    path = tmp_path_factory.mktemp("browser") / "bench"
    for strategy, inits in (("fedavg", ("independent", "shared")), ("merge-many", ("independent", "shared")),
                            ("fedprox", ("shared",))):  # fmt: skip
        for init in inits:
            for seed in range(3):
                folder = path / "cells" / f"{strategy}-{init}-seed={seed}"
                writer(folder, strategy=strategy, init=init, seed=seed, rounds=2)
    write_report(path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert CHROMIUM is not None
    playwright = pytest.importorskip("playwright.sync_api")
    # Some distributions have a file of that name that only says how to get a browser.
    if subprocess.run([CHROMIUM, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"{CHROMIUM} is no browser: it does not even say its version")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS, timeout=120_000)
        yield started
        started.close()


@dataclass
class Opened:
    """A page, and what it said and asked for while it was open."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def rows(self, table: str) -> list[dict[str, str]]:
        """The rows that are shown, in their order, by the names of the columns."""
        found = self.page.evaluate(
            """id => {
              const t = document.getElementById(id), text = c => c.textContent.replace(/\\s+/g, ' ').trim();
              return [[...t.tHead.rows[0].cells].map(text),
                      ...[...t.tBodies[0].rows].filter(r => r.checkVisibility()).map(r => [...r.cells].map(text))];
            }""",
            f"{table}-table",
        )
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]

    def header(self, table: str, name: str) -> Any:
        return self.page.locator(f"#{table}-table thead button", has_text=re.compile(rf"^{re.escape(name)}$"))

    def tools(self, table: str) -> Any:
        return self.page.locator(f"#{table} .tools")

    @property
    def filters(self) -> Any:
        return self.page.locator("#filters")

    def marks(self, picture: str) -> list[str]:
        """What the marks of a picture that are shown say."""
        return self.page.evaluate(
            """id => [...document.querySelectorAll(`#picture-${id} [data-tip]`)]
                .filter(m => m.getClientRects().length).map(m => m.dataset.tip)""",
            picture,
        )

    def copied(self, table: str, kind: str) -> str:
        """What a button under a table puts into the clipboard."""
        self.page.locator(f"#{table} .export button", has_text=kind).click()
        self.page.wait_for_function(
            "[...document.querySelectorAll('.export')].some(p => p.innerText.includes('Copied'))"
        )
        return str(self.page.evaluate("navigator.clipboard.readText()"))


@pytest.fixture
def opened(browser: Any, bench: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    given = {"permissions": ["clipboard-read", "clipboard-write"]} | getattr(request, "param", {})
    context = browser.new_context(**given, offline=True)
    context.set_default_timeout(120_000)  # a busy machine is slow, not wrong
    found = Opened(context.new_page())
    found.page.on("console", lambda message: found.said.append(message.text))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.on("request", lambda asked: found.asked.append(asked.url))
    found.page.goto((bench / "report.html").as_uri())
    yield found
    context.close()


def test_the_page_opens_without_errors_and_asks_for_nothing_else(opened: Opened, bench: Path) -> None:
    assert opened.page.title() == "Strategies on digits · fedmerge"
    opened.page.wait_for_load_state("networkidle")
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [(bench / "report.html").as_uri()]
    assert opened.page.locator("figure svg").count() > 0


def test_its_numbers_are_those_of_the_results_table(opened: Opened, bench: Path) -> None:
    table = pd.read_parquet(bench / "results.parquet")
    end = table[
        (table["metric"] == "accuracy")
        & (table["split"] == "test")
        & (table["round"] == table["rounds_done"])
        & (table["stage"] == "retrained")
    ]
    by_setup = end.groupby(["init", "strategy"])["value"].agg(["mean", "std", "count"])
    costs = table.drop_duplicates("cell").groupby(["init", "strategy"])[["client_seconds", "bytes_up"]].mean()
    shown = [row for row in opened.rows("results") if "retrain" in row["Network"]]
    assert {(row["init"], row["strategy"]) for row in shown} == set(by_setup.index)
    for row in shown:
        of = by_setup.loc[(row["init"], row["strategy"])]
        assert row["Accuracy %"] == f"{100 * of['mean']:.2f} ± {100 * of['std']:.2f}"
        assert row["n"] == str(int(of["count"]))
        took = costs.loc[(row["init"], row["strategy"])]
        assert float(row["Clients, s"]) == pytest.approx(took["client_seconds"], rel=5e-3)
        assert float(row["Up, MB"]) == pytest.approx(took["bytes_up"] / 1e6, rel=5e-3)


def test_a_click_sorts_by_the_exact_value_and_another_turns_it(opened: Opened) -> None:
    before = opened.rows("stages")
    head = opened.page.locator("#stages-table th", has_text="Accuracy %")
    assert head.get_attribute("aria-sort") == "none"
    opened.header("stages", "Accuracy %").click()
    falling = opened.rows("stages")
    assert head.get_attribute("aria-sort") == "descending"  # the best first
    means = [float(row["Accuracy %"].split(" ")[0]) for row in falling]
    assert means == sorted(means, reverse=True)
    opened.header("stages", "Accuracy %").click()
    assert head.get_attribute("aria-sort") == "ascending"
    means = [float(row["Accuracy %"].split(" ")[0]) for row in opened.rows("stages")]
    assert means == sorted(means)
    assert sorted(map(str, before)) == sorted(map(str, falling))


def test_the_keyboard_sorts_too_and_text_goes_by_the_alphabet(opened: Opened) -> None:
    button = opened.header("results", "strategy")
    button.focus()
    opened.page.keyboard.press("Enter")
    names = [row["strategy"] for row in opened.rows("results")]
    assert names == sorted(names)
    opened.page.keyboard.press("Space")
    assert [row["strategy"] for row in opened.rows("results")] == sorted(names, reverse=True)
    assert opened.page.locator("#results-table th[aria-sort=descending]").count() == 1


def test_what_was_not_measured_comes_last_either_way(opened: Opened) -> None:
    for _ in range(2):
        opened.header("stages", "Δ points").click()
        shown = [row["Δ points"] for row in opened.rows("stages")]
        missing = shown.count("–")
        assert missing > 0
        assert shown[-missing:] == ["–"] * missing


def test_a_choice_acts_on_tables_pictures_and_runs_alike(opened: Opened) -> None:
    results, stages, marks = opened.rows("results"), opened.rows("stages"), opened.marks("outcomes")
    assert opened.filters.locator("output").inner_text() == "15 of 15 runs, 5 of 5 setups"
    opened.filters.get_by_label("strategy").select_option("=merge-many")
    assert opened.filters.locator("output").inner_text() == "6 of 15 runs, 2 of 5 setups"
    assert opened.rows("results") == [row for row in results if row["strategy"] == "merge-many"]
    assert opened.rows("stages") == [row for row in stages if row["strategy"] == "merge-many"]
    assert {row["strategy"] for row in opened.rows("runs")} == {"merge-many"}
    for picture in ("outcomes", "steps", "accuracy-over-rounds", "ranks", "stage-accuracy"):
        shown = opened.marks(picture)
        assert shown
        assert all("merge-many" in mark for mark in shown), picture
    assert set(opened.marks("outcomes")) == {mark for mark in marks if "merge-many" in mark}
    assert opened.page.locator("details.run:visible").count() == 6
    assert {row["Setup"] for row in opened.rows("results")} == set(
        opened.page.locator("#classes tbody tr:visible th").all_text_contents()
    )
    opened.filters.get_by_text("Show all").click()
    assert (opened.rows("results"), opened.marks("outcomes")) == (results, marks)


def test_words_and_choices_filter_together(opened: Opened) -> None:
    everything = opened.rows("runs")
    opened.filters.get_by_label("strategy").select_option("=merge-many")
    opened.filters.get_by_label("Filter").fill("SHARED seed=2")
    wanted = [r for r in everything if r["strategy"] == "merge-many" and r["init"] == "shared" and r["Seed"] == "2"]
    assert len(wanted) == 1
    assert opened.rows("runs") == wanted
    opened.filters.get_by_label("Filter").fill("no such words")
    assert opened.rows("results") == opened.rows("stages") == opened.rows("runs") == []


def test_one_seed_keeps_its_own_marks_and_says_that_tables_are_means(opened: Opened) -> None:
    assert opened.page.locator("#results .seeded:visible").count() == 0
    opened.filters.get_by_label("Seed").select_option("=1")
    assert {row["Seed"] for row in opened.rows("runs")} == {"1"}
    seeds = {match[1] for mark in opened.marks("outcomes") if (match := re.search(r"seed (\d)", mark))}
    assert seeds == {"1"}
    assert opened.page.locator("#results .seeded:visible").count() == 1
    assert len(opened.rows("results")) == 5  # every setup has a run of that seed


def test_a_table_has_a_choice_of_its_own(opened: Opened) -> None:
    opened.tools("stages").get_by_label("Network").select_option("=Best client")
    assert {row["Network"] for row in opened.rows("stages")} == {"Best client"}
    assert len(opened.rows("stages")) == len(opened.rows("results")) == 5


def test_the_legend_switches_a_series_off_and_on_by_mouse_and_keyboard(opened: Opened) -> None:
    every = opened.marks("accuracy-over-rounds")
    entry = opened.page.locator("#picture-accuracy-over-rounds [role=button]").first
    name = entry.get_attribute("aria-label")
    entry.click()
    assert entry.get_attribute("aria-pressed") == "false"
    left = opened.marks("accuracy-over-rounds")
    assert left == [mark for mark in every if not mark.startswith((f"{name};", f"{name}, seed")) and mark != name]
    assert len(left) < len(every)
    entry.focus()
    opened.page.keyboard.press("Enter")
    assert opened.marks("accuracy-over-rounds") == every


def test_a_mark_under_the_pointer_says_what_it_is(opened: Opened) -> None:
    tip = opened.page.locator("#tip")
    assert not tip.is_visible()
    mark = opened.page.locator("#picture-outcomes [data-tip*='seed 1']").first
    mark.hover()
    assert tip.inner_text() == mark.get_attribute("data-tip")


def test_markdown_and_latex_are_those_of_the_rows_that_are_shown(opened: Opened) -> None:
    opened.filters.get_by_label("init").select_option("=shared")
    shown = opened.rows("results")
    lines = opened.copied("results", "Markdown").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert cells[0] == list(shown[0])
    assert set(lines[1]) <= set("| -:")
    assert cells[2:] == [list(row.values()) for row in shown]
    opened.page.reload()
    tex = opened.copied("results", "LaTeX")
    assert tex.count(r" \\") == 1 + 5
    assert r"Accuracy \% &" in tex
    assert r"$\pm$" in tex
    assert "±" not in tex
    assert re.search(r"\\begin\{tabular\}\{lr+l{3}r+\}", tex)


def test_csv_has_the_exact_values_and_their_spread(opened: Opened, bench: Path) -> None:
    opened.filters.get_by_label("strategy").select_option("=fedavg")
    with opened.page.expect_download() as waiting:
        opened.page.locator("#results .export button", has_text="Save CSV").click()
    assert waiting.value.suggested_filename == "results.csv"
    taken = pd.read_csv(waiting.value.path())
    ends = outcomes(compare(find(bench))).set_index("setup")
    assert len(taken) == 2
    for row in taken.to_dict("records"):
        end = ends.loc[f"init={row['init']}, strategy=fedavg"]
        assert (row["Accuracy %"], row["Accuracy % ±"]) == (end["accuracy"], end["sd"])


def test_a_picture_is_saved_as_an_svg_of_its_own(opened: Opened) -> None:
    figure = opened.page.locator("#picture-outcomes")
    figure.hover()
    with opened.page.expect_download() as waiting:
        figure.get_by_text("Save SVG").click()
    assert waiting.value.suggested_filename == "outcomes.svg"
    text = Path(waiting.value.path()).read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text


def test_the_first_two_columns_stay_in_sight(opened: Opened) -> None:
    opened.page.set_viewport_size({"width": 700, "height": 800})
    moved = opened.page.evaluate("""() => {
        const box = document.querySelector('#results .scroll'), cells = [...box.querySelector('tbody tr').cells];
        const at = () => cells.map(cell => cell.getBoundingClientRect().left - box.getBoundingClientRect().left);
        const before = at();
        box.scrollLeft = 10000;
        return at().map((left, i) => before[i] - left);
    }""")
    assert moved[:2] == pytest.approx([0, 0], abs=1)
    assert min(moved[2:]) > 50


def test_a_link_to_a_run_opens_its_details(opened: Opened) -> None:
    opened.page.locator("#runs-table a", has_text="fedprox-shared-seed=1").click()
    opened.page.locator("details.run[open]").wait_for()
    assert [d.get_attribute("id") for d in opened.page.locator("details.run[open]").all()] == [
        "run-fedprox-shared-seed=1"
    ]


@pytest.mark.parametrize(
    "opened",
    [
        {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
        {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
        {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
        {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
    ],
    ids=["wide light", "wide dark", "narrow light", "narrow dark"],
    indirect=True,
)
def test_nothing_is_wider_than_the_screen_in_light_and_dark(opened: Opened, request: pytest.FixtureRequest) -> None:
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = "dark" in request.node.callspec.id
    assert background == ("rgb(22, 26, 31)" if dark else "rgb(255, 255, 255)")
    colours = opened.page.evaluate(
        "[...new Set([...document.querySelectorAll('#pictures svg text')].map(t => getComputedStyle(t).fill))]"
    )
    ink, soft = ("rgb(232, 234, 237)", "rgb(162, 171, 182)") if dark else ("rgb(27, 31, 36)", "rgb(91, 99, 110)")
    series = "rgb(86, 180, 233)" if dark else "rgb(0, 114, 178)"  # of a value below the axis
    assert {ink, soft} <= set(colours) <= {ink, soft, series}
    outside = opened.page.evaluate("""[...document.querySelectorAll('#pictures svg')].flatMap(svg => {
        const box = svg.getBoundingClientRect()
        return [...svg.querySelectorAll('text')].filter(t => {
            const own = t.getBoundingClientRect()
            return own.left < box.left - 1 || own.right > box.right + 1
        }).map(t => t.textContent)
    })""")
    assert outside == []
    assert opened.page.evaluate(COLLIDING) == []


@pytest.mark.parametrize("opened", [{"java_script_enabled": False}], indirect=True)
def test_without_scripts_all_rows_are_there(opened: Opened) -> None:
    assert opened.page.locator("#stages-table tbody tr:visible").count() > 20
    assert opened.page.locator(".tools:visible, .export").count() == 0
    assert opened.page.locator("#picture-outcomes title").count() > 10  # the browser's own tooltips


def test_a_page_of_paper_holds_every_column_and_no_controls(opened: Opened) -> None:
    opened.page.emulate_media(media="print")
    opened.page.set_viewport_size({"width": 680, "height": 960})  # A4 between margins of 15 mm
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 680
    assert opened.page.locator(".tools:visible, .export:visible, nav:visible").count() == 0
    assert opened.page.locator("#results-table tbody tr:visible").count() == len(opened.rows("results"))
