"""Processes that tests start, and what is left of them."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
RAY = ("raylet/raylet", "gcs/gcs_server", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::ClientAppActor")


def start(*command: object, cache: Path, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "FEDMERGE_CACHE": str(cache), "COLUMNS": "120", **environment}
    return subprocess.Popen(
        [*map(str, command)], cwd=cwd, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip


def printed(*command: object, cache: Path, **options) -> str:
    running = start(*command, cache=cache, **options)
    try:
        out, err = running.communicate(timeout=400)
    finally:
        running.kill()
    assert running.returncode == 0, out + err
    return out


def ray_below(pid: int) -> dict[int, str]:
    """Ray's servers and agents, and a client, among the descendants of ``pid``: process id -> which of ``RAY``."""
    found = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()
    rows = {int(p): (int(parent), args) for p, parent, args in (line.split(None, 2) for line in found[1:])}

    def descends(p: int) -> bool:
        while p in rows and p != pid:
            p = rows[p][0]
        return p == pid

    kinds = {p: next((kind for kind in RAY if kind in args), None) for p, (_, args) in rows.items()}
    one = {kind: p for p, kind in kinds.items() if kind is not None and descends(p)}
    return {p: kind for kind, p in one.items()}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def superlinks() -> set[int]:
    found = subprocess.run(["pgrep", "-f", "flower-superlink"], capture_output=True, text=True)
    return {int(pid) for pid in found.stdout.split()}
