# `make demo` and `make test` need nothing but Python 3.11: each makes .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo families buildable introduced matrix matrix-next test test-families test-slow test-install test-distributed test-peers test-serve test-serve-vllm serve-table fuzz lint format docs site bench engines clean

demo: $(STAMP)
	$(BIN)/graft demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not fuzz and not distributed and not peers and not serve and not families and not install"

# Every model type; `make test` has those that people ask for and a tenth of the others, which changes every day.
test-families: $(STAMP)
	GRAFTKIT_FAMILY_TURN=all $(BIN)/python -m pytest -n 2 tests/families

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow"

# What an index would give: the wheel in an environment of its own.
test-install: $(STAMP)
	$(BIN)/python -m pytest -m "install" tests/install

# DeepSpeed builds with the ninja that it brings, which has to be found like a command.
test-distributed: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[distributed]"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "distributed"

# The package index brings PEFT's own tests.
test-peers: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[peers]"
	$(BIN)/python -m pytest -rP -m "peers" tests/peers

# llama.cpp is compiled: about half of the half hour. vLLM has a target of its own for its 3.5 GB.
test-serve: $(STAMP)
	for engine in llama.cpp mlx; do $(BIN)/python -m graftkit.serving.install $$engine .engines/$$engine || exit 1; done
	$(BIN)/python -m pytest -n 2 -m "serve" -k "not vllm"

test-serve-vllm: $(STAMP)
	$(BIN)/python -m graftkit.serving.install vllm .engines/vllm
	$(BIN)/python -m pytest -m "serve" -k "vllm"

# Writes what the engines in .engines do into tests/serve/expected.toml, for a new release of one; then `make docs`.
serve-table: engines
	GRAFTKIT_WRITE_SERVE_TABLE=1 $(BIN)/python -m pytest -m "serve" tests/serve

# GRAFTKIT_FUZZ_EXAMPLES says how many mutations each test tries.
fuzz: $(STAMP)
	$(BIN)/python -m pytest -m "fuzz" tests/fuzz

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m graftkit.checks.engine.pages docs/rules --check
	$(BIN)/python -m graftkit.recipes.write docs/recipe.schema.json --check
	$(BIN)/python -m graftkit.report.serving_table docs tests/serve/expected.toml --check
	$(BIN)/python -m graftkit.matrix.page docs/matrix.jsonl.gz docs/matrix.html --check

docs: $(STAMP) docs/images/demo.png
	$(BIN)/python -m graftkit.checks.engine.pages docs/rules
	$(BIN)/python -m graftkit.recipes.write docs/recipe.schema.json
	$(BIN)/python -m graftkit.report.serving_table docs tests/serve/expected.toml
	$(BIN)/python -m graftkit.matrix.page docs/matrix.jsonl.gz docs/matrix.html

# The documentation as a site, in site/; what mkdocs warns of is an error.
site: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean
	$(BIN)/python -m pytest tests/docs/test_site.py

# The README's picture, by the Chromium that is installed.
docs/images/demo.png: $(wildcard src/graftkit/demo/*.py src/graftkit/report/html.py src/graftkit/report/templates/report*) | $(STAMP)
	$(BIN)/graft demo --out .demo
	$(BIN)/python -m tests.docs.picture .demo/report.html $@

# What is known of each model class: hours for all; TYPES=a,b makes those entries alone.
families: $(STAMP)
	$(BIN)/python -m graftkit.twins.write_known $(if $(TYPES),--types $(TYPES))

# Which model types are built from their default configuration, for a new transformers.
buildable: $(STAMP)
	$(BIN)/python -m tests.families.buildable

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Ratios to peers, five turns each, into benchmarks/results.md; about an hour. ONLY=plan,survey measures these alone,
# BENCH_OPTIONS=--quick tries small sizes and keeps nothing. The exit status 1 says that one could not be measured.
bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ONLY) $(BENCH_OPTIONS)

# Which families go with which methods: hours on two cores, told before; an interrupted run goes on where it stopped.
# The exit status 1 says that a cell failed, which the page shows.
JOBS ?= 2
FIRST_METHODS := dora,rslora,pissa,oft,ia3,vera,loha,lokr,adalora
MATRIX := .matrix/matrix.jsonl
matrix: $(STAMP)
	mkdir -p .matrix
	test -f $(MATRIX) -o ! -f docs/matrix.jsonl.gz || gunzip -c docs/matrix.jsonl.gz > $(MATRIX)
	$(BIN)/graft matrix --all --methods lora --jobs $(JOBS) --store $(MATRIX) || test $$? = 1
	$(BIN)/graft matrix --wanted --methods $(FIRST_METHODS) --jobs $(JOBS) --store $(MATRIX) || test $$? = 1
	$(BIN)/graft matrix --wanted --methods all --jobs $(JOBS) --store $(MATRIX) || test $$? = 1
	$(BIN)/graft matrix --store $(MATRIX) --pack docs/matrix.jsonl.gz --html docs/matrix.html > .matrix/summary.txt || test $$? = 1

# The same with the newest transformers, PEFT and TRL, in a venv of its own, against today's matrix: what is new, what
# broke, what got well. MATRIX_OLD is the store to compare with, NEXT_FAMILIES what to try.
MATRIX_OLD ?= docs/matrix.jsonl.gz
NEXT_FAMILIES ?= --all
NEXT_CHECKS ?= twin,plan,attach,gradients,merge,reload
matrix-next:
	test -d .matrix/next || $(PYTHON) -m venv .matrix/next
	.matrix/next/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	.matrix/next/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	.matrix/next/bin/python -m graftkit.matrix.newest pyproject.toml constraints.txt .matrix/next/requirements.txt
	.matrix/next/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --requirement .matrix/next/requirements.txt
	.matrix/next/bin/graft matrix $(NEXT_FAMILIES) --methods lora --checks $(NEXT_CHECKS) --jobs $(JOBS) \
	  --store .matrix/next.jsonl --compare $(MATRIX_OLD) || test $$? = 1

# Which release of transformers brought which model type, from the wheel of a release: `make introduced RELEASE=5.24.0`.
introduced: $(STAMP)
	$(BIN)/python -m pip download --quiet --no-deps --dest .matrix/wheels "transformers==$(RELEASE)"
	$(BIN)/python -m graftkit.matrix.write_introduced .matrix/wheels/*.whl

# What a proof serves adapters in: 5 GB and, where llama.cpp has to be compiled, half an hour.
engines: $(STAMP)
	for engine in llama.cpp mlx vllm; do $(BIN)/python -m graftkit.serving.install $$engine .engines/$$engine || exit 1; done

# torch first and by its exact version: a range would let pip replace a CPU build by one with CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[train,quant,gguf,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) graft-demo .demo site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
