# `make demo` and `make test` each do all their set-up on a fresh machine, and nothing twice.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
# One more than cores: tests of Ray and of killed processes mostly wait.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test suite coverage lint docs browser format clean

demo: $(VENV)/.installed
	$(BIN)/fedmerge bench experiments/configs/demo.toml --out $(OUT) --resume

# What waits for the network beside what waits for a core; then what needs a core beside what mostly waits.
test:
	$(MAKE) -j 2 browser $(VENV)/.tested
	$(MAKE) -j 3 lint docs suite

# A file of tests stays in one process, so all that start Ray (`test_simulation.py`) run one after the other, beside the rest.
# In the order of collection, which begins with that file: sorted by their number of tests, it would come last.
suite: $(VENV)/.tested
	$(TESTS)

# The same tests, watched: they take a third longer.
coverage: $(VENV)/.tested
	$(TESTS) --cov --cov-report=
	$(BIN)/coverage report --skip-covered
	$(BIN)/coverage report --include="fedmerge/*,strategies/*" --fail-under=85 --format=total

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, strictly: a broken link, a name that is gone or a cell of a notebook that raises ends it. To read: dist/site/index.html
docs: $(VENV)/.tested
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/mkdocs build --quiet

# The report is tested in a browser. Where there is none and none can be installed, those tests are skipped and say so.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && export DEBIAN_FRONTEND=noninteractive && \
	  { apt-get install -y --no-install-recommends chromium || \
	    { apt-get update && apt-get install -y --no-install-recommends chromium; }; } >/dev/null 2>&1; } || \
	  echo "no Chromium, and none could be installed (as root: apt-get install chromium): no test in a browser"

format: $(VENV)/.tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The newest pip finds what to install in a third of the time of the one that comes with Python 3.11.
$(VENV)/bin/python:
	$(PYTHON) -m venv --upgrade-deps $(VENV)

# pip compiles on one core, file by file, which is most of its time; so another process does it beside pip, and all cores what
# is left. Not every package has Python 3 alone in it: what does not compile is as pip would leave it. What nobody here imports waits.
COMPILE = $(BIN)/python -m compileall -qq -x '/(tests?|testing|_vendored|databricks|rllib|ray/(data|llm|serve|train|tune))/' $(VENV)/lib
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable
define install
	$(INSTALL) $(1) & pip=$$!; while kill -0 $$pip 2>/dev/null; do sleep 1; $(COMPILE); done; wait $$pip
	$(COMPILE) -j 0 || true
endef

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(call install,.)
	touch $@

$(VENV)/.tested: pyproject.toml | $(VENV)/bin/python
	$(call install,".[test]")
	touch $@ $(VENV)/.installed

clean:
	rm -rf runs dist .coverage .pytest_cache .mypy_cache .ruff_cache
