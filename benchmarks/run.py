"""`make bench`: runs every benchmark, each in a process of its own, and writes RESULTS.md beside this file.

    python -m benchmarks.run [MODULE...]      only these; the other sections of RESULTS.md stay as they are

All comparisons are ratios taken within one run. Seconds are those of the machine named in the table.
"""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
BENCHES = [
    ("A prompt before the database", "bench_ingest", ["mini", "gpt2"]),
    ("Encoding beside its matrix products", "bench_encode", ["64", "512"]),
    ("Against circuit-tracer", "bench_circuit_tracer", ["32", "64"]),
    ("Loading GPT-2 small's dictionaries", "bench_load", ["gpt2"]),
    ("Writing", "bench_write", ["embedded", "neo4j"]),
    ("Labels", "bench_labels", ["embedded", "neo4j"]),
    ("Questions", "bench_queries", ["both"]),
]


def main(only: list[str]) -> None:
    """Run all, or some, and write the tables."""
    earlier = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", _text(HERE / "RESULTS.md"), re.MULTILINE | re.DOTALL))
    parts = [f"# Benchmarks\n\nWritten by `make bench`. {machine()}\n"]
    for title, module, arguments in BENCHES:
        body = earlier.get(title, "\nNot run yet.\n") if only and module not in only else section(module, arguments)
        parts.append(f"## {title}\n{body.rstrip()}\n")
    (HERE / "RESULTS.md").write_text("\n".join(parts), encoding="utf-8")
    print((HERE / "RESULTS.md").read_text(encoding="utf-8"))


def section(module: str, arguments: list[str]) -> str:
    """What a benchmark says of itself, and its table."""
    rows = [row for argument in arguments for row in run(module, argument)]
    doc = HERE.joinpath(f"{module}.py").read_text(encoding="utf-8").split('"""')[1].strip()
    return f"\n{doc}\n\n{table(rows)}"


def run(module: str, argument: str) -> list[dict[str, object]]:
    """The JSON object that a benchmark prints last, or several, one for each column."""
    print(f"benchmarks.{module} {argument} ...", file=sys.stderr)
    command = [sys.executable, "-m", f"benchmarks.{module}", argument]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found if isinstance(found, list) else [found]


def table(rows: list[dict[str, object]]) -> str:
    """Rows as a Markdown table, one column a run."""
    lines = [
        "| | " + " | ".join(str(next(iter(row.values()))) for row in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for key in list(rows[0])[1:]:
        cells = [row[key] if isinstance(row[key], str) else f"{row[key]:,}" for row in rows]
        lines.append(f"| {key} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def machine() -> str:
    """The machine and the versions that the figures belong to."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "?")
    memory = next((int(line.split()[1]) // 2**20 for line in _lines("/proc/meminfo") if "MemTotal" in line), 0)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformer-lens", "arcadedb-embedded"))
    return (
        f"Machine: {os.cpu_count()} cores ({cpu}), {memory} GB, no GPU; "
        f"Python {platform.python_version()}, {versions}. {datetime.now(UTC):%Y-%m-%d}."
    )


def _lines(path: str) -> list[str]:
    return _text(Path(path)).splitlines()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    main(sys.argv[1:])
