# make demo      a comparison of FedAvg and FedFTG on real images, in minutes
# make test      every test that needs no minutes of its own
# make test-all  all tests; needs chromium

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-all clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(VENV)/installed
	$(RUN) -m experiments.compare --flagfile=experiments/presets/demo.flags

test: $(VENV)/installed
	$(RUN) -m pytest -n 2 --dist loadscope -m "not slow and not browser" tests

test-all: test
	$(RUN) -m pytest -n 2 --dist loadscope -m "slow or browser" tests

clean:
	rm -rf $(VENV)
