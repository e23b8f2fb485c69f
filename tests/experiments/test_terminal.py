"""What the command prints reaches every output, and every signal that ends programs ends it."""

import io
import os
import signal
import sys
from pathlib import Path

import pytest

from experiments import cli, terminal


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
        with terminal._interruptible():
            assert signal.getsignal(number) is terminal._interrupted
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminal._interruptible():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
