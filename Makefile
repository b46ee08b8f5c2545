# make demo   set up, then compile a real trained model for this CPU and print the report
# make test   set up, then run the tests
# make lint   types and style
# make bench  the tables of the README, with torch: about three quarters of an hour
# make bench-training  every recipe for training, on handwritten digits and rendered words: about a quarter of an hour
# make bench-families  every model family through every stage: about half an hour
# make bench-nvidia  real models through TensorRT-RTX and our kernels, without a GPU: about an hour
# make bench-gpu  every kernel and whole models on the GPU of this machine; refused where there is none

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
EVAL   := benchmarks/evaluators/ppocr4_rec.py

.PHONY: demo test lint bench bench-training bench-families bench-nvidia bench-gpu clean

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "optkit needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[benchmarks]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/optkit compile "$$($(BIN)/python -m optkit.benchmarks.suite fetch ppocr4_rec)" --target cpu \
	    --calib $(EVAL):calibration --eval $(EVAL) --max-drop 1% --out build/ppocr4_rec

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m optkit.benchmarks.suite fetch
	$(BIN)/python -m optkit.benchmarks.cpu

bench-training: $(VENV)/.bench
	$(BIN)/python -m optkit.benchmarks.training

$(VENV)/.families: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[families]'
	touch $@

bench-families: $(VENV)/.families
	$(BIN)/python -m optkit.benchmarks.families

$(VENV)/.nvidia: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[benchmarks,triton,tensorrt]'
	touch $@

bench-nvidia: $(VENV)/.nvidia
	$(BIN)/python -m optkit.benchmarks.kernels --write
	$(BIN)/python -m optkit.benchmarks.nvidia

$(VENV)/.gpu: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[torch,triton]' onnxruntime-gpu
	touch $@

bench-gpu: $(VENV)/.gpu
	$(BIN)/python -m optkit.benchmarks.gpu

clean:
	rm -rf $(VENV) build
