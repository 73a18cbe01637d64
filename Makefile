PYTHON ?= python3
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-page lint quick-demo docs

demo: .venv/ready
	$(BIN)/customize demo --overwrite_output_dir

quick-demo: .venv/ready
	$(BIN)/customize demo --quick --output runs/quick-demo --overwrite_output_dir

test: .venv/ready
	$(BIN)/python -m pytest -n auto --dist loadfile

# the web page in a real browser: apt-get install chromium, or set BROWSER to the path of a Chrome or Chromium
test-page: .venv/ready
	$(INSTALL) playwright
	$(BIN)/python -m pytest tests/test_browser.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy customize trainers pipelines app

# the pages of docs/ and an API reference from the docstrings, in build/site
docs: .venv/docs
	rm -rf build/source && mkdir -p build/source/customize
	ln -s $(CURDIR)/customize/* $(CURDIR)/pipelines $(CURDIR)/trainers $(CURDIR)/app build/source/customize/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/docs: .venv/ready
	$(INSTALL) -e ".[docs]"
	touch .venv/docs

# torch first and alone: some package indexes offer a CPU build of it, which must be chosen before others ask for it
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) -e ".[dev]"
	touch .venv/ready
