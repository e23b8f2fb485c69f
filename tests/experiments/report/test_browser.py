"""The report of a bench in a real browser: headless Chromium, driven by Playwright, with the network switched off."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

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
              const t = document.getElementById(id), text = c => c.innerText.trim();
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


@pytest.fixture
def opened(browser: Any, bench: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    context = browser.new_context(**getattr(request, "param", {}), offline=True)
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


def test_words_and_choices_filter_together_and_are_counted(opened: Opened) -> None:
    everything = opened.rows("stages")
    opened.tools("stages").get_by_label("strategy").select_option("=merge-many")
    assert opened.rows("stages") == [row for row in everything if row["strategy"] == "merge-many"]
    opened.tools("stages").get_by_label("Filter").fill("RETRAIN shared")
    shown = opened.rows("stages")
    assert shown == [
        row for row in everything
        if row["strategy"] == "merge-many" and row["init"] == "shared" and "retrain" in row["Network"]
    ]  # fmt: skip
    assert opened.tools("stages").locator("output").inner_text() == f"{len(shown)} of {len(everything)} rows"
    opened.tools("stages").get_by_label("Filter").fill("no such words")
    assert opened.rows("stages") == []
    assert len(opened.rows("results")) > 0  # the other table has its own


def test_numbers_can_be_taken_away_as_csv(opened: Opened, bench: Path) -> None:
    with opened.page.expect_download() as waiting:
        opened.page.locator("#stages a[download]").click()
    assert waiting.value.suggested_filename == "stages.csv"
    taken = pd.read_csv(waiting.value.path())
    assert len(taken) == len(opened.rows("stages"))
    assert {"accuracy", "difference", "low", "high", "p_holm", "reference"} <= set(taken.columns)


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
    assert set(colours) == {ink, soft}
    outside = opened.page.evaluate("""[...document.querySelectorAll('#pictures svg')].flatMap(svg => {
        const box = svg.getBoundingClientRect()
        return [...svg.querySelectorAll('text')].filter(t => {
            const own = t.getBoundingClientRect()
            return own.left < box.left - 1 || own.right > box.right + 1
        }).map(t => t.textContent)
    })""")
    assert outside == []


@pytest.mark.parametrize("opened", [{"java_script_enabled": False}], indirect=True)
def test_without_scripts_all_rows_are_there(opened: Opened) -> None:
    assert opened.page.locator("#stages-table tbody tr:visible").count() > 20
    assert opened.page.locator(".tools").count() == 0


def test_in_print_there_are_no_controls(opened: Opened) -> None:
    opened.page.emulate_media(media="print")
    assert opened.page.locator(".tools:visible").count() == 0
    assert opened.page.locator("#results-table tbody tr:visible").count() == len(opened.rows("results"))
