# make book    the rendered book, in _build/html      make test   everything tested
# make lab     the chapters as notebooks              make data   the data sets
# make pdf     the site as one PDF
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CHAPTERS := $(wildcard book/*.md)
export KEOPS_VERBOSE = 0
# Threads that wait spin for a moment, then sleep: sleeping at once halves the speed of
# an idle machine, spinning for long costs ten times as much on a busy one.
export GOMP_SPINCOUNT = 10000
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: axe pdf book test lab notebooks tangle data check clean

book: $(VENV)/.ready
	@$(BIN)/python tools/tangle.py
	@$(BIN)/python tools/build.py

# The printed book: the site's pages one after the other, in _build/book.pdf.
pdf: book
	@$(BIN)/python tools/pdf.py

test: $(VENV)/.ready check
	@test -f _build/axe.min.js || ! command -v npm >/dev/null || $(MAKE) --no-print-directory axe || echo "no axe-core: its tests are skipped"
	$(BIN)/python -m pytest

lab: $(VENV)/.ready
	$(BIN)/jupyter lab book

notebooks: $(VENV)/.ready
	@mkdir -p _build/notebooks
	$(BIN)/jupytext --to ipynb --output-dir _build/notebooks $(CHAPTERS)

tangle: $(VENV)/.ready
	$(BIN)/python tools/tangle.py

data: $(VENV)/.ready
	$(BIN)/s4mini data

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/tangle.py --check
	$(BIN)/mypy

# axe-core finds what keeps readers out; tests/test_site.py uses it where it is present.
axe:
	@mkdir -p _build
	cd _build && npm pack --silent axe-core@4.10.3 && tar -xzf axe-core-4.10.3.tgz --strip-components=1 package/axe.min.js

clean:
	rm -rf _build $(VENV)

# The environment, made anew when what it should hold has changed.
$(VENV)/.ready: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, found %d.%d.%d; name it with make PYTHON=...' % tuple(v[:3]))"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/jupytext-config --settings-file $(VENV)/share/jupyter/lab/settings/overrides.json set-default-viewer markdown myst
	@touch $@
