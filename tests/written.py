"""What runs have written, without times and costs: two runs that are the same are equal in it."""

import json
from pathlib import Path

import pandas as pd

from experiments.compare.stages import compare
from experiments.records.results import COSTS
from experiments.records.runs import find

_TIMED = {"env.json", "metrics.jsonl", "report.html", "results.csv", "results.parquet"}


def contents(out: Path) -> dict[str, object]:
    """Every file in ``out``, a run or a folder of some, that is not about time or cost; of a grid its final tables."""
    files: dict[str, object] = {}
    for file in sorted(out.rglob("*")):
        name = str(file.relative_to(out))
        if file.name == "metrics.jsonl":
            files[name] = [{**json.loads(line), "seconds": 0} for line in file.read_text().splitlines()]
        elif file.is_file() and file.name not in _TIMED and ".tfevents." not in name and "plots" not in file.parts:
            files[name] = file.read_bytes()
    if (out / "results.csv").exists():
        tidy = pd.read_csv(out / "results.csv", dtype=str)
        tables = {"table": compare(find(out)), "tidy table": tidy[tidy["metric"] != "seconds"]}
        for name, table in tables.items():
            files[name] = table[[column for column in table.columns if column not in COSTS]].to_csv(index=False)
    return files
