# make demo      a comparison of FedAvg and FedFTG on real images, in minutes
# make check     for the edit loop: the core's tests
# make test      every test but further cases of the same kind
# make test-all  all tests; needs chromium
# make lint      style and types
# make docs      the pages of docs/ and the API as a site, in build/site
# make tables    the generated parts of the pages, from docs/results/ and the code
# make gpu       compiles for a GPU, which need not be there
# make audit     known holes in what is installed; asks a service on the network

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -n 2 --dist worksteal
CHECK := $(addprefix tests/,base_test.py solvers_test.py golden_test.py \
	programs_test.py::TrainTest::test_unfinished_run_is_started_again \
	fed_ftg_test.py::PlainLoopTest::test_update_robust \
	$(addprefix methods_test.py::ContractTest::test_row_, \
	fed_avg fed_nova fed_dyn scaffold moon fed_ftg_robust))

.PHONY: demo check test test-all lint docs tables gpu audit clean

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(RUN) -m experiments.compare --flagfile=experiments/presets/demo.flags

check: $(VENV)/installed
	$(PYTEST) $(CHECK)

test: $(VENV)/installed
	$(PYTEST) -m "not slow and not browser" tests

test-all: test
	$(PYTEST) -m "slow or browser" tests

lint: $(VENV)/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --site-dir build/site

tables: $(VENV)/installed
	$(RUN) -m docs.tables

build/gpu/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv build/gpu
	build/gpu/bin/python -m pip install --quiet --disable-pip-version-check -e ".[gpu-compiler]"
	touch $@

gpu: build/gpu/installed
	build/gpu/bin/python -m experiments.gpu_programs --programs=W3,W5:conv=pallas,W4:conv=mixed,W7

audit: $(VENV)/dev
	$(RUN) -m pip_audit

clean:
	rm -rf $(VENV) build dist *.egg-info
