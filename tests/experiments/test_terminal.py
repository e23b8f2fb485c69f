"""What the command prints reaches every output, and every signal that ends programs ends it."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import cli, terminal
from fedmerge.progress import counted

ROOT = Path(__file__).parents[2]


def test_an_output_that_takes_ascii_only_gets_the_nearest_characters(
    standard_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["fedmerge", "report", str(standard_run)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    sys.stdout.flush()
    text = written.getvalue().decode("ascii")
    assert not ended.value.code
    assert "+/- is the standard deviation over clients" in text
    assert "report.html" in text


def test_every_character_has_a_plain_form() -> None:
    terminal.print_anything()
    assert "93.6 ± 1.2 – Δ × é → 数".encode("ascii", "fedmerge").decode() == "93.6 +/- 1.2 - Delta x e -> ?"


def test_a_reader_that_leaves_ends_nothing(standard_run: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        console = terminal.Output(file=broken)
        console.print("lost")
        console.print("lost too")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_while_a_simulation_runs_every_ending_signal_is_taken(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with terminal._interruptible(resumes=True):
            assert getattr(signal.getsignal(number), "func", None) is terminal._interrupted
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminal._interruptible(resumes=True):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_work_is_drawn_as_bars_that_are_gone_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal, "console", terminal.Output(file=shown, force_terminal=True, width=100))
    monkeypatch.setattr(sys.modules["fedmerge.progress"], "_SECONDS", 0.0)
    monkeypatch.setattr(terminal, "_READABLE", 0.05)
    with terminal.watch() as bars:
        with counted("simulation", 1), counted("clients train", 3) as advance:
            advance(1)
            for _ in range(100):
                with counted("a step", 1):
                    bars.drawn.refresh()
            time.sleep(0.05)
            lines = bars.drawn.get_renderables()
            terminal.console.print(*lines)
            assert [(task.description, task.completed) for task in bars.drawn.tasks] == [
                ("simulation", 0), ("clients train", 1)
            ]  # fmt: skip
        assert bars.drawn.tasks == []
    assert "clients train" in shown.getvalue()
    assert "a step" not in shown.getvalue()  # over before anyone could read it
    assert "1/3" in shown.getvalue()
    assert "0/1" not in shown.getvalue()  # of one step it is enough that it goes on


def test_where_nothing_can_be_drawn_long_work_is_said_in_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["fedmerge.progress"], "_PAUSE", 0.0)
    with terminal.watch() as bars:
        display = bars.callback()
        for done in (0, 1, 2):
            display.step("clients train", done, 2)
    assert capsys.readouterr().out.split("\n")[:2] == ["clients train: 0 of 2", "clients train: 1 of 2, about 0 s left"]


def test_an_interrupt_is_told_whatever_takes_the_errors_at_that_moment() -> None:
    code = """
import contextlib, io, os, signal
from experiments.terminal import watch
with watch(), contextlib.redirect_stderr(io.StringIO()):
    os.kill(os.getpid(), signal.SIGTERM)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, "interrupted" in ended.stderr) == (143, True)
