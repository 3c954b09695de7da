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
	$(BIN)/python -m ingest.demo

test: lint
	$(BIN)/pytest -m "not soak"

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
