# Every target sets up .venv by itself; PYTHON chooses the interpreter (3.11 or later).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint soak bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ingest,dev]'
	touch $@

demo: $(READY)
	$(BIN)/atlas ingest ingest/mini/prompts.jsonl
	$(BIN)/atlas verify
	$(BIN)/atlas status
	$(BIN)/atlas query circuits --task quotes --limit 3
	$(BIN)/atlas show aae91c729bed3a03/14/2/mlp/1824 --depth 2 --top 4

test: lint
	$(BIN)/pytest -m "not soak" -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

soak: $(READY)
	$(BIN)/pytest -m soak

bench: $(READY)
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf .venv .neo4j atlas-store
