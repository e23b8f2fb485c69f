"""How much memory does it take to merge many networks that lie on a disk?

Question: N VGG11 (width 1, 9.2 million parameters, 37 MB each) are merged by MergeMany from memory-mapped safetensors.
What is the largest amount of private memory, in copies of one model, beyond what the process has after its imports?

Expected: at most 6 copies, whatever N; read into memory first, the same merge needs N more.

Private memory is the anonymous resident set of a child process, sampled every 20 ms; pages of mapped files are the
system's to drop and do not count.

Cost: about two CPU minutes with ``--restarts 1`` and 32 networks.

    python -m experiments.benchmarks.memory [--n 32] [--restarts 1] [--model vgg11] [--how mapped]
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import fedmerge as fm
from fedmerge.streams import numpy_stream

SHAPE = (3, 32, 32)
BOUND = 6.0
HOW = ("mapped", "in memory")


def private_bytes() -> int:
    """Anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process its anonymous memory")


def child(folder: Path, model: str, restarts: int, lazy: bool) -> None:
    """Merge all networks in ``folder`` and print the peak, in copies, and the CPU seconds."""
    torch.set_num_threads(1)
    fm.perm_spec(torch.nn.Linear(2, 2), torch.zeros(1, 2))  # torch imports its tracer when it first traces
    before, peak, done = private_bytes(), 0, threading.Event()
    template = fm.models.build(model, classes=10, in_shape=SHAPE, seed=0)
    spec = fm.perm_spec(template, torch.zeros(2, *SHAPE))
    size = sum(t.numel() * t.element_size() for t in template.state_dict().values())
    paths = sorted(folder.glob("*.safetensors"))
    del template

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.process_time()
    held = [fm.open_params(path) if lazy else load_file(path) for path in paths]
    models = held if lazy else [{name: tensor.clone() for name, tensor in m.items()} for m in held]
    found = fm.merge_many(models, spec=spec, restarts=restarts, rng=numpy_stream(0, "merge"))
    spent = time.process_time() - began
    done.set()
    watcher.join()
    print(f"{(peak - before) / size:.2f} {spent:.1f} {found.sweeps} {found.objective:.6g}")


def main(arguments: list[str] | None = None) -> int:
    """Print a row a way of reading; 1 if the mapped one needs more than the bound."""
    parser = argparse.ArgumentParser(description="Peak memory of merging from disk")
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--model", default="vgg11")
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--how", nargs="+", choices=HOW, default=HOW)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        child(Path(given.child[0]), given.model, given.restarts, given.child[1] == "mapped")
        return 0
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        template = fm.models.build(given.model, classes=10, in_shape=SHAPE, seed=0)
        spec = fm.perm_spec(template, torch.zeros(2, *SHAPE))
        truth = template.state_dict()
        for i in range(given.n):
            generator = torch.Generator().manual_seed(i)
            noisy = {
                k: t + t.std(correction=0) * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
                for k, t in truth.items()
            }
            save_file(fm.permute(noisy, spec.random(generator), spec=spec), Path(folder) / f"{i:03d}.safetensors")
        del template, truth
        print(f"| {given.n} x {given.model} | peak, copies of one model | CPU s | sweeps | objective |")
        print("|---|--:|--:|--:|--:|")
        for how in given.how:
            command = [sys.executable, "-m", "experiments.benchmarks.memory", "--model", given.model]
            command += ["--restarts", str(given.restarts), "--child", folder, how]
            shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            peaks[how] = float(shown[0])
            print(f"| {how} | " + " | ".join(shown) + " |", flush=True)
    return 0 if peaks.get("mapped", 0.0) <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
