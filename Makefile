# Two commands do all the set-up: `make demo` and `make test`. Each creates .venv when there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PARALLEL := -n auto --dist loadscope

.PHONY: help demo demo-smollm2 test test-slow test-cuda speed-cuda test-saebench tutorials times docs browser lint format clean

help: ## this list; seconds are wall seconds of docs/times.md, measured on the machine named there
	@awk -F '[|`]' 'FNR == NR { if ($$3 ~ /^make /) seconds[substr($$3, 6)] = $$6; next } \
	  match($$0, /^[a-z0-9-]+:.*## /) { name = $$0; sub(/:.*/, "", name); told = substr($$0, RSTART + RLENGTH); \
	    printf "make %-15s %s%s\n", name, told, name in seconds ? " (" seconds[name] + 0 " s)" : "" }' docs/times.md Makefile

demo: $(READY) ## install, train four SAEs on the embedded language model, print the table, write a page
	$(BIN)/sae-nfm demo

demo-smollm2: $(READY) ## the same on SmolLM2, a real model, which it fetches first: about 10 CPU minutes
	$(BIN)/sae-nfm models fetch smollm2
	$(BIN)/sae-nfm demo --model smollm2 --d-sae 2304 --training-tokens 100000 --batch-size 512 --lr 2e-3 \
	  --held-out-tokens 5000 --output runs/smollm2
	$(BIN)/sae-nfm attribute "The old bridge stood at the edge of the" --sae runs/smollm2/saes/joint_nfm \
	  --save runs/smollm2/attribution.json
	$(BIN)/sae-nfm report runs/smollm2

test: $(READY) ## install, run the tests, in as many processes as there are cores (at most 4)
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(READY) ## the heavier checks, which `make test` leaves out
	$(BIN)/python -m pytest $(PARALLEL) -m slow

test-cuda: $(READY) ## on a machine with a GPU: the Triton kernels as a GPU runs them
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m cuda

speed-cuda: $(READY) ## on a machine with a GPU: the figures of docs/speed.md for one
	$(BIN)/sae-nfm speed --device cuda --d-in 768 --d-sae 24576 --batch 4096 --repeats 15 --save runs/speed-cuda/k32.json
	$(BIN)/sae-nfm speed --device cuda --d-in 3200 --d-sae 50000 --k 1024 --nfm-dim 300 --nfm-top-k 512 --batch 4096 \
	  --autocast true --arms "joint_nfm auto" "joint_nfm no Triton" topk --save runs/speed-cuda/paper.json
	$(BIN)/sae-nfm speed --device cuda --d-in 768 --d-sae 8192 --batch 4096 --scan d_sae --scan-to 65536 \
	  --save runs/speed-cuda/scan.json

# the environment is the one that docs/saebench.md sets up, or that of another python named by SAE_NFM_SAEBENCH_PYTHON
test-saebench: $(READY) ## in SAEBench's own environment: the adapter (docs/saebench.md)
	$(BIN)/python -m pytest -m saebench

tutorials: $(READY) ## execute the eight notebooks in place
	$(BIN)/python tutorials/execute.py

times: $(READY) ## measure docs/times.md anew, on a machine that does nothing else
	$(BIN)/python docs/measure_times.py

docs: $(READY) ## the documentation as a site in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

browser: ## install Chromium for the tests of pages, which are skipped without one (Debian; needs root)
	apt-get update --quiet=2
	apt-get install --quiet=2 --yes --no-install-recommends chromium

lint: $(READY) ## ruff, ruff format, the order of imports, pyright strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

format: $(READY) ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and pinned: a bare, newer torch pulls gigabytes of CUDA packages onto a machine without a GPU.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean: ## remove .venv, runs and caches
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache
