# Needs Linux and Python 3.11 or later. Everything is installed into .venv, nothing elsewhere.
PYTHON ?= python3
BIN := .venv/bin
# accelerate would ask for these, and give PyTorch a single CPU thread. It finds a GPU by itself.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 \
	--mixed_precision no --dynamo_backend no --num_cpu_threads_per_process $$(nproc)

.PHONY: help demo test lint tiny

help: ## show these targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

demo: .venv/.installed ## train two adapters on the embedded toy model and look at the videos (minutes, on a CPU)
	$(LAUNCH) train/lora.py experiment=demo
	$(BIN)/python -m tools.report outputs/demo

test: .venv/.installed ## run the whole test suite
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/.installed ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

tiny: .venv/.installed ## rebuild the toy model in wan/tiny (20 minutes on one large GPU)
	$(BIN)/python -m tools.make_tiny

.venv/.installed: pyproject.toml constraints.txt
	@echo "Installing wan-lora and the versions of constraints.txt into .venv (a few minutes, once) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@
