"""`make bench`: runs every benchmark, each in a process of its own, and writes RESULTS.md beside this file.

    python -m benchmarks.run [MODULE...]      only these; the other sections of RESULTS.md stay as they are
    python -m benchmarks.run --device cuda    those that compute, on a GPU; writes RESULTS.cuda.md

All comparisons are ratios taken within one run. Seconds are those of the machine named in the table. The goals are
for a processor, and are not named beside a GPU's figures.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from atlas.errors import AtlasError

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
CUDA_BENCHES = [
    ("A prompt before the database", "bench_ingest", ["mini cuda", "gpt2 cuda", "gpt2 cuda bfloat16"]),
    ("Encoding beside its matrix products", "bench_encode", ["64 cuda", "512 cuda"]),
    ("Against circuit-tracer", "bench_circuit_tracer", ["32 cuda", "64 cuda"]),
]


def main() -> None:
    """Run all, or some, and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    parser.add_argument("only", nargs="*", metavar="MODULE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    asked = parser.parse_args()
    benches, file, command = BENCHES, HERE / "RESULTS.md", "make bench"
    if asked.device == "cuda":
        benches, file, command = CUDA_BENCHES, HERE / "RESULTS.cuda.md", "python -m benchmarks.run --device cuda"
        _check_cuda()
    earlier = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", _text(file), re.MULTILINE | re.DOTALL))
    parts = [f"# Benchmarks\n\nWritten by `{command}`. {machine(asked.device)}\n"]
    for title, module, arguments in benches:
        skip = asked.only and module not in asked.only
        body = earlier.get(title, "\nNot run yet.\n") if skip else section(module, arguments)
        parts.append(f"## {title}\n{body.rstrip()}\n")
    text = "\n".join(parts)
    file.write_text(re.sub(r" \(goal: .*?\)", "", text) if asked.device == "cuda" else text, encoding="utf-8")
    print(file.read_text(encoding="utf-8"))


def section(module: str, arguments: list[str]) -> str:
    """What a benchmark says of itself, and its table."""
    rows = [row for argument in arguments for row in run(module, argument)]
    doc = HERE.joinpath(f"{module}.py").read_text(encoding="utf-8").split('"""')[1].strip()
    return f"\n{doc}\n\n{table(rows)}"


def run(module: str, arguments: str) -> list[dict[str, object]]:
    """The JSON object that a benchmark prints last, or several, one for each column."""
    print(f"benchmarks.{module} {arguments} ...", file=sys.stderr)
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments.split()]
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


def machine(device: str) -> str:
    """The machine and the versions that the figures belong to."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "?")
    memory = next((int(line.split()[1]) // 2**20 for line in _lines("/proc/meminfo") if "MemTotal" in line), 0)
    versions = [_version(name) for name in ("torch", "transformer-lens", "arcadedb-embedded")]
    return (
        f"Machine: {os.cpu_count()} cores ({cpu}), {memory} GB, {_gpu() if device == 'cuda' else 'no GPU'}; "
        f"{', '.join([f'Python {platform.python_version()}', *filter(None, versions)])}. {datetime.now(UTC):%Y-%m-%d}."
    )


def _version(package: str) -> str | None:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


def _gpu() -> str:
    """The GPU's name and memory, and the driver's version."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    name, memory, driver = found.stdout.splitlines()[0].split(", ")
    return f"{name} ({memory}, driver {driver})"


def _check_cuda() -> None:
    """Stop with a sentence where there is no GPU."""
    from ingest.model import check_device

    try:
        check_device("cuda")
    except AtlasError as error:
        sys.exit(str(error))


def _lines(path: str) -> list[str]:
    return _text(Path(path)).splitlines()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    main()
