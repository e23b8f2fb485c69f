"""What the doctor finds on this machine and on imagined ones."""

import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console

from experiments.tools import doctor
from experiments.tools.doctor import ClientCost, Finding, clients_at_once, gpu_share
from fedmerge.memory import usable_cores, usable_memory

GIB = 2**30


def _by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def _write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_a_real_client_is_measured_and_fits_here() -> None:
    found = _by_name(doctor.diagnose())
    for name in ("Python", "PyTorch", "Ray", "Flower", "Cores", "Memory", "Data: digits", "One client"):
        assert found[name].ok is True, found[name]
    assert "mlp, one pass over" in found["One client"].value
    assert 1 <= int(found["Clients at once"].value.split(",")[0]) <= usable_cores()


def test_without_measuring_no_client_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "measure_client", lambda: pytest.fail("a client was trained"))
    assert "One client" not in _by_name(doctor.diagnose(measure=False))


def test_a_client_that_fails_is_a_finding_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> ClientCost:
        raise RuntimeError("DataError: disk full")

    monkeypatch.setattr(doctor, "measure_client", failing)
    finding = _by_name(doctor.diagnose())["One client"]
    assert (finding.ok, finding.value) == (False, "failed: DataError: disk full")


def test_the_last_line_of_a_failed_client_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback ...\nDataError: no images\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RuntimeError, match=r"^DataError: no images$"):
        doctor.measure_client(device="cpu")


def test_a_client_that_hangs_or_dies_silently_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*args: Any, **options: Any) -> None:
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(RuntimeError, match="took more than 300 s"):
        doctor.measure_client(device="cpu")
    dead = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: dead)
    with pytest.raises(RuntimeError, match="it ended with code -9"):
        doctor.measure_client(device="cpu")


def test_gpu_memory_of_a_client_is_what_is_gone_while_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    said = '{"work": "mlp", "seconds": 0.5, "memory": 100, "gpu_free": 60}'
    monkeypatch.setattr(doctor, "_free_gpu_memory", lambda: 80)
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **options: subprocess.CompletedProcess([], 0, f"chatter\n{said}\n", "")
    )
    assert doctor.measure_client() == ClientCost("mlp", 0.5, 100, gpu_memory=20)


@pytest.mark.parametrize(
    ("cores", "memory", "gpu", "cost", "expected"),
    [
        (4, 100 * GIB, 0, ClientCost("", 1, GIB), 4),
        (16, 5 * GIB, 0, ClientCost("", 1, GIB), 4),  # the server takes the fifth
        (16, 100 * GIB, 8 * GIB, ClientCost("", 1, GIB, 3 * GIB), 2),
        (1, GIB // 2, 0, ClientCost("", 1, GIB), 0),
        (2, 100 * GIB, GIB, ClientCost("", 1, GIB, 2 * GIB), 0),
    ],
)
def test_the_scarcest_part_decides_how_many_fit(
    cores: int, memory: int, gpu: int, cost: ClientCost, expected: int
) -> None:
    assert clients_at_once(cost, cores=cores, memory=memory, gpu_memory=gpu) == expected


def test_the_share_of_a_gpu_is_rounded_up() -> None:
    assert gpu_share(ClientCost("", 1, 1, gpu_memory=1), 3) == 0.334
    assert gpu_share(ClientCost("", 1, 1, gpu_memory=9), 3) == 1.0
    assert gpu_share(ClientCost("", 1, 1), 0) == 0.0


def test_the_report_tells_the_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "measure_client", lambda: ClientCost("work", 0.1, 1, gpu_memory=GIB))
    monkeypatch.setattr(doctor, "_free_gpu_memory", lambda: 80 * GIB)
    found = _by_name(list(doctor._clients()))
    assert "1.00 GiB of GPU memory" in found["One client"].value
    assert found["Clients at once"].value.endswith(", each with 0.013 of a GPU")


def test_a_machine_without_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "measure_client", lambda: ClientCost("work", 0.1, 2**60))
    finding = _by_name(list(doctor._clients()))["Clients at once"]
    assert (finding.value, finding.ok, finding.hint) == ("0", False, "free some memory")


@pytest.mark.parametrize(
    "files",
    [
        {"cpu_DOT_max": "100000 100000"},
        {"cpu_DOT_max": "20000 100000"},
        {"cpu__cpu_DOT_cfs_quota_us": "100000", "cpu__cpu_DOT_cfs_period_us": "100000"},
    ],
)
def test_the_quota_of_a_container_limits_the_cores(tmp_path: Path, files: dict[str, str]) -> None:
    assert usable_cores(_write(tmp_path, **files)) == 1


@pytest.mark.parametrize(
    "files",
    [{}, {"cpu_DOT_max": "max 100000"}, {"cpu__cpu_DOT_cfs_quota_us": "-1", "cpu__cpu_DOT_cfs_period_us": "100000"}],
)
def test_without_a_quota_the_affinity_counts(
    tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert usable_cores(_write(tmp_path, **files)) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores(tmp_path) == 6


def test_memory_is_the_least_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8192))
    assert usable_memory(tmp_path) == 8192
    _write(tmp_path, memory_DOT_max="max", memory_DOT_current="5")
    assert usable_memory(tmp_path) == 8192
    _write(tmp_path, memory_DOT_max="5000", memory_DOT_current="1000")
    assert usable_memory(tmp_path) == 4000
    _write(tmp_path, memory_DOT_max="5000", memory_DOT_current="6000")
    assert usable_memory(tmp_path) == 0


def test_a_missing_package_is_a_finding_and_ends_the_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_ray(name: str) -> ModuleType:
        if name == "ray":
            raise ModuleNotFoundError("No module named 'ray'")
        return sys.modules[name] if name in sys.modules else ModuleType(name)

    monkeypatch.setattr(importlib, "import_module", without_ray)
    found = _by_name(doctor.diagnose())
    assert found["Ray"].ok is False
    assert found["Ray"].value == "cannot be imported: ModuleNotFoundError: No module named 'ray'"
    assert found["Ray"].hint == 'pip install "flwr[simulation]"'
    assert "Data: digits" not in found


def test_a_package_that_is_only_on_the_path_is_told_apart() -> None:
    finding = doctor._package("Experiments", "experiments", "")
    assert finding.ok is None
    assert finding.value.startswith("imported from ")


def test_data_are_looked_for_where_the_variable_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "train-00000-of-00001.parquet").write_bytes(b"12345")
    monkeypatch.setenv("FEDMERGE_DATA", str(tmp_path))
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "new" / "cache"))
    found = _by_name(list(doctor._data()))
    assert found["FEDMERGE_DATA"].ok is True
    assert found["Data: cifar10"].value == f"1 files, 0 MB, in {tmp_path / 'cifar10'}"
    assert found["Data: mnist"].ok is None
    assert found["Cache"].ok is True
    assert not (tmp_path / "new").exists()


def test_a_variable_that_points_nowhere_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMERGE_DATA", str(tmp_path / "absent"))
    finding = _by_name(list(doctor._data()))["FEDMERGE_DATA"]
    assert (finding.ok, finding.hint) == (False, "set it to an existing folder, or unset it")
    monkeypatch.delenv("FEDMERGE_DATA")
    assert _by_name(list(doctor._data()))["FEDMERGE_DATA"].value == "not set"


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "file"))
    finding = _by_name(list(doctor._data()))["Cache"]
    assert (finding.ok, finding.hint) == (False, "set FEDMERGE_CACHE to a folder of your own")
    assert doctor._writable(tmp_path)
    assert not doctor._writable(tmp_path / "absent")


def test_little_memory_and_each_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(doctor, "usable_memory", lambda: GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (30 * GIB, 40 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU of test {i}")
    found = _by_name(list(doctor._processors()))
    assert (found["Memory"].ok, found["Memory"].hint) == (False, "Ray and two clients need about 2 GiB")
    assert found["GPU 1"].value == "GPU of test 1, 30.0 of 40.0 GiB free"
    assert doctor._free_gpu_memory() == 30 * GIB


def test_without_torch_the_processors_are_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert list(_by_name(list(doctor._processors()))) == ["Cores", "Memory"]


def test_the_terminal_shows_mark_value_and_hint() -> None:
    out = io.StringIO()
    findings = [Finding("A", "fine", True), Finding("B", "[b]broken", False, "mend it"), Finding("C", "so", None)]
    Console(file=out, width=60).print(doctor.render(findings))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert lines == [["ok", "A", "fine"], ["no", "B", "[b]broken"], ["mend", "it"], ["--", "C", "so"]]
