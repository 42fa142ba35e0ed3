# Each target creates .venv when it is missing. `make demo` and `make test` are all that a newcomer needs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check format soak bench bench-training clean

$(STAMP): pyproject.toml proto/build_hook.py $(wildcard proto/kasa/v1/*.proto)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

soak: $(STAMP)
	cd tests && ../$(BIN)/python -m oracle

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint proto
	proto/breaking.sh $(BIN)/buf

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/peers.py --short

bench-training: $(STAMP)
	$(BIN)/python benchmarks/training.py

clean:
	rm -rf .venv gen build dist
