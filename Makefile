# make demo      a comparison of FedAvg and FedFTG on real images, in minutes
# make check     for the edit loop: the core's tests
# make test      every test but further cases of the same kind
# make test-all  all tests; needs chromium

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -n 2 --dist worksteal
CHECK := $(addprefix tests/,base_test.py solvers_test.py golden_test.py \
	programs_test.py::TrainTest::test_unfinished_run_is_started_again \
	fed_ftg_test.py::PlainLoopTest::test_update_robust \
	$(addprefix methods_test.py::ContractTest::test_row_, \
	fed_avg fed_nova fed_dyn scaffold moon fed_ftg_robust))

.PHONY: demo check test test-all clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(VENV)/installed
	$(RUN) -m experiments.compare --flagfile=experiments/presets/demo.flags

check: $(VENV)/installed
	$(PYTEST) $(CHECK)

test: $(VENV)/installed
	$(PYTEST) -m "not slow and not browser" tests

test-all: test
	$(PYTEST) -m "slow or browser" tests

clean:
	rm -rf $(VENV)
