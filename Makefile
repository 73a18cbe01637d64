PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint quick-demo

demo: .venv/ready
	$(BIN)/customize demo --overwrite_output_dir

quick-demo: .venv/ready
	$(BIN)/customize demo --quick --output runs/quick-demo --overwrite_output_dir

test: .venv/ready
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy customize trainers pipelines app

# torch first and alone: some package indexes offer a CPU build of it, which must be chosen before others ask for it
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch .venv/ready
