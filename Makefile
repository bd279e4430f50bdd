# Two commands need nothing but Python >= 3.11 and make: `make demo`, `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTHON_NEWEST ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
# Python compiles a module when it is first imported, and keeps that for the
# hundreds of processes that the tests start; most modules are never imported.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/python $(INSTALL)

.PHONY: demo docs test test-experiments test-hosts test-kills test-slurm test-attack \
  test-docs test-oracles test-report test-wheel test-oldest test-newest lint \
  data environments clean

demo: $(VENV)/.train  ## train, evaluate and report on handwritten digits
	$(BIN)/modelstock demo

# What a target of its own runs, with more than the tests of the package take.
APART := tests/docs tests/experiments tests/packaging/test_wheel.py \
  tests/report/test_report_browser.py

# Two processes, each of which takes file after file, the slowest first: those
# that tests/conftest.py names.
TWO := -n 2 --no-loadscope-reorder --dist

test: $(VENV)/.test  ## the package: all that needs neither TensorFlow nor torch
	$(BIN)/python -m pytest $(TWO) loadfile \
	  -m 'not oracle and not hosts and not kills and not attack and not slurm' \
	  $(APART:%=--ignore=%)

test-experiments: $(VENV)/.test  ## the programs of experiments/
	$(BIN)/python -m pytest $(TWO) loadfile tests/experiments

test-hosts: $(VENV)/.test  ## several processes of one run
	$(BIN)/python -m pytest -m hosts tests/training tests/merging tests/files

# ATTACK_SHARE=0.1 runs a tenth of the cases of these two.
test-kills: $(VENV)/.test  ## commands that are killed, and that race
	$(BIN)/python -m pytest $(TWO) loadfile -m 'kills and not oracle' \
	  tests/kills tests/training

# As root, with Debian's slurmctld, slurmd, slurm-client and munge.
test-slurm: $(VENV)/.test  ## docs/pods/train.sbatch on a cluster of one node
	$(BIN)/python -m pytest -m slurm tests/pods

test-attack: $(VENV)/.test  ## thousands of mutated files and settings
	$(BIN)/python -m pytest -m attack tests/attack

test-oracles: $(VENV)-oracles/.done  ## against mergekit, TensorFlow, ...
	$(VENV)-oracles/bin/python -m pytest $(TWO) loadfile -m oracle \
	  tests/oracles tests/scenic tests/kills tests/data

# Needs a Chromium: on Debian `apt-get install chromium`, or name one: CHROMIUM=.
test-report: $(VENV)/.develop  ## opens the report in headless Chromium
	$(BIN)/python -m pytest tests/report/test_report_browser.py

test-wheel: $(VENV)/.develop  ## builds the release and runs it elsewhere
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest --noconftest \
	  tests/packaging/test_wheel.py

DOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m

docs: $(VENV)/.develop  ## the documentation, in build/site
	$(DOCS) mkdocs build --strict

test-docs: $(VENV)/.develop  ## builds it, runs its notebooks and commands
	$(DOCS) pytest $(TWO) loadscope tests/docs

lint: $(VENV)/.develop  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

data: $(VENV)-oracles/.done  ## writes the bundled data sets again
	$(VENV)-oracles/bin/python -m experiments.digits.prepare modelstock_jax/data/prepared

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

$(VENV)/.train: $(BIN)/python setup.py constraints.txt
	$(PIP) --constraint constraints.txt --editable '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(PIP) --constraint constraints.txt --editable '.[train,test]'
	$(PIP) --no-deps --constraint constraints.txt open_clip_torch
	touch $@

$(VENV)/.develop: $(VENV)/.test
	$(PIP) --constraint constraints.txt --editable '.[train,test,lint,docs]' \
	  build playwright twine
	touch $@

# CLIP's vocabulary and ImageNet's class names come with open_clip_torch, which
# asks for torch but is only read. mergekit asks for forty packages, of which
# its merge needs torch and pydantic; moto asks for an older python-dateutil.
# What open_clip itself is run with lies apart: transformers would take a
# torchvision beside it, built for CUDA, and fail.
$(VENV)-oracles/.done: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)-oracles
	$(VENV)-oracles/bin/python $(INSTALL) \
	  --constraint constraints.txt --editable '.[train,test,prepare,oracle]'
	$(VENV)-oracles/bin/python $(INSTALL) --no-deps \
	  --constraint constraints.txt mergekit open_clip_torch clip-anytorch \
	  peft accelerate \
	  datasets dill multiprocess pandas xxhash webdataset braceexpand \
	  moto boto3 botocore s3transfer jmespath responses xmltodict cryptography \
	  cffi pycparser flask flask-cors blinker itsdangerous py-partiql-parser
	$(VENV)-oracles/bin/python $(INSTALL) --no-deps \
	  --constraint constraints.txt --target $(VENV)-oracles/open_clip \
	  torchvision timm ftfy wcwidth
	touch $@

# The lower bounds of setup.py, and the newest jax, which needs Python 3.12:
# the merge of trees and of files, and a run that is interrupted and goes on.
ENDS := $(wildcard tests/merging/test_stock*.py) tests/merging/test_trees.py \
  tests/merging/test_periodic.py tests/files/test_merge.py \
  tests/training/test_resume.py::test_a_second_ctrl_c_does_not_wait

test-oldest: $(VENV)-oldest/.done  ## with the oldest supported versions
	$(VENV)-oldest/bin/python -m pytest $(TWO) loadfile $(ENDS)

test-newest: $(VENV)-newest/.done  ## with the newest ones
	$(VENV)-newest/bin/python -m pytest $(TWO) loadfile $(ENDS)

# Compiled here: tests would raise what Python warns of in old modules.
$(VENV)-oldest/.done: setup.py constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python $(filter-out --no-compile,$(INSTALL)) \
	  --constraint constraints-oldest.txt --editable '.[train,test]'
	$(VENV)-oldest/bin/python $(INSTALL) --no-deps \
	  --constraint constraints.txt open_clip_torch
	touch $@

$(VENV)-newest/.done: setup.py constraints.txt
	$(PYTHON_NEWEST) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python $(INSTALL) \
	  --constraint constraints.txt --editable '.[train,test]'
	$(VENV)-newest/bin/python $(INSTALL) --no-deps \
	  --constraint constraints.txt open_clip_torch
	touch $@

environments: $(VENV)-oracles/.done $(VENV)-oldest/.done \
  $(VENV)-newest/.done  ## those of the oracles, and of oldest and newest

clean:
	rm -rf $(VENV) $(VENV)-* build *.egg-info .pytest_cache .hypothesis .ruff_cache
