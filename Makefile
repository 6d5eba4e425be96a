# Two commands do all the set-up: `make demo` and `make test`. Each creates .venv when there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PARALLEL := -n auto --dist loadscope

.PHONY: demo test test-slow test-cuda speed-cuda test-saebench tutorials docs browser lint format clean

demo: $(READY)
	$(BIN)/sae-nfm demo

test: $(READY)
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) -m slow

# on a machine with a GPU: the Triton kernels as a GPU runs them
test-cuda: $(READY)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m cuda

# on a machine with a GPU: the figures of docs/speed.md for one
speed-cuda: $(READY)
	$(BIN)/sae-nfm speed --device cuda --d_in 768 --d_sae 24576 --batch 4096 --repeats 15 --output runs/speed-cuda/k32.json
	$(BIN)/sae-nfm speed --device cuda --d_in 3200 --d_sae 50000 --k 1024 --nfm_dim 300 --nfm_top_k 512 --batch 4096 \
	  --autocast true --arms "joint_nfm auto" "joint_nfm no Triton" topk --output runs/speed-cuda/paper.json
	$(BIN)/sae-nfm speed --device cuda --d_in 768 --d_sae 8192 --batch 4096 --scan d_sae --scan_to 65536 \
	  --output runs/speed-cuda/scan.json

# in the environment that docs/saebench.md sets up, or that of another python named by SAE_NFM_SAEBENCH_PYTHON
test-saebench: $(READY)
	$(BIN)/python -m pytest -m saebench

# execute the notebooks in place
tutorials: $(READY)
	$(BIN)/python tutorials/execute.py

# the documentation as a site, in build/site; warnings are errors
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# the browser for the tests of pages, where they would be skipped for want of one (Debian; needs root)
browser:
	apt-get update --quiet=2
	apt-get install --quiet=2 --yes --no-install-recommends chromium

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and pinned: a bare, newer torch pulls gigabytes of CUDA packages onto a machine without a GPU.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .hypothesis
