# Everything runs in .venv, made on first use from the locked requirements. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q -n 2

.PHONY: help demo test check format bench bench-placement accuracy gpu schema nightly fuzz mutations figures lock wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

.venv/.test: requirements/test.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'planc needs Python 3.11 or newer: make PYTHON=python3.12 …'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --require-hashes -r requirements/test.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

.venv/.dev: .venv/.test requirements/dev.txt
	$(BIN)/python -m pip install -q --require-hashes -r requirements/dev.txt
	touch $@

demo: .venv/.test  ## build the reference plan: 61 layers, 64 experts, 128 GPUs
	$(BIN)/planc build specs/moe-61l-ep64-dp2.yaml
	$(BIN)/planc verify out/moe-61l-ep64-dp2
	@echo "open out/moe-61l-ep64-dp2/deployment_plan.html"

test: .venv/.test  ## all tests
	$(PYTEST) tests

nightly: .venv/.test  ## predict and prove thousands of random specs: make nightly PROOFS=3000
	PLANC_EXAMPLES=2000 $(PYTEST) tests/properties/test_predictions.py
	PLANC_EXAMPLES=500 $(PYTEST) tests/search/test_search_bound.py
	PLANC_PROOFS=$(PROOFS) $(PYTEST) tests/properties/test_proofs.py

build/fuzz-venv/.made: requirements/run.txt
	$(PYTHON) -m venv build/fuzz-venv
	build/fuzz-venv/bin/python -m pip install -q --require-hashes -r requirements/run.txt
	build/fuzz-venv/bin/python -m pip install -q atheris==3.0.0
	touch $@

SECONDS := 300
fuzz: build/fuzz-venv/.made  ## fuzz the readers of specs and of plan.json, in an environment of its own: make fuzz SECONDS=300
	PYTHONPATH=. build/fuzz-venv/bin/python tests/fuzz/fuzz_spec.py -max_total_time=$(SECONDS) -print_final_stats=1
	PYTHONPATH=. build/fuzz-venv/bin/python tests/fuzz/fuzz_plan.py -max_total_time=$(SECONDS) -print_final_stats=1
	@crashes=$$(find build/fuzz -name 'crash-*'); test -z "$$crashes" || { echo "$$crashes"; exit 1; }

check: .venv/.dev  ## lint, types, import rules, tests
	$(BIN)/ruff check planc tests benchmarks
	$(BIN)/ruff format --check planc tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) tests

format: .venv/.dev  ## rewrite the code in the house format
	$(BIN)/ruff check --fix planc tests benchmarks
	$(BIN)/ruff format planc tests benchmarks

bench: .venv/.dev  ## measure speed, memory and placement against peers
	$(BIN)/python benchmarks/build.py
	$(BIN)/python benchmarks/predict.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/placement.py

bench-placement: .venv/.dev  ## measure expert placement against the published balancers
	$(BIN)/python benchmarks/placement.py

accuracy: .venv/.dev  ## judge the shipped fits on measured tables: make accuracy DATA=folder
	$(BIN)/python benchmarks/accuracy.py --data $(DATA)

# GPU: planc's name of the GPU here; GPUS: how many of them to run collectives on. torch is installed by hand: docs/gpu.md
GPU ?= h100-sxm
GPUS ?= 1
gpu: .venv/.test  ## on a machine with a GPU: measure it, fit, and check: make gpu GPU=h100-sxm GPUS=8
	$(BIN)/python $(if $(filter-out 1,$(GPUS)),-m torch.distributed.run --nproc-per-node $(GPUS)) \
	  -m benchmarks.gpu --gpu-name $(GPU) -o out/$(GPU)-rows.csv
	$(BIN)/python -m benchmarks.gpu fit out/$(GPU)-rows.csv --gpu $(GPU) -o out/$(GPU)-fit.yaml
	$(BIN)/python -m benchmarks.gpu check out/$(GPU)-rows.csv --gpu $(GPU)
	$(BIN)/python -m benchmarks.gpu check out/$(GPU)-rows.csv --gpu $(GPU) --fit out/$(GPU)-fit.yaml

schema: .venv/.test  ## rewrite docs/spec.schema.json, which the example specs point editors to
	$(BIN)/planc schema spec > docs/spec.schema.json
	$(BIN)/planc schema plan > docs/plan.schema.json

PROOFS ?= 3000
mutations: .venv/.test  ## rewrite docs/prove-mutations.md: what catches which mistake
	PYTHONPATH=tests:tests/verify $(BIN)/python tests/prove/mutation_table.py

figures: .venv/.test  ## redraw the figure of the README
	$(BIN)/planc show moe-61l-ep64-dp2 --figure simplified -o docs/figures/simplified_moe_dag.svg

lock: .venv/.dev  ## pin every dependency again
	$(BIN)/python -m pip install -q uv
	for group in run test dev; do \
	  if [ $$group = run ]; then extra=; else extra="--group $$group"; fi; \
	  $(BIN)/uv pip compile pyproject.toml $$extra --universal --python-version 3.11 --generate-hashes \
	    --no-emit-index-url --no-header --no-annotate -q -o requirements/$$group.txt; done

wheel: .venv/.dev  ## build the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation -o dist

clean:  ## remove what make made
	rm -rf .venv build dist out/*/
