# Two commands do everything on a fresh machine with Python >= 3.11:
#   make demo    trains AlexNet on real digits, exports, verifies, benchmarks, says where the report is
#   make test    lint, types and the whole test suite
# make unit  runs the tests that need neither TensorFlow nor processes of their own, in a minute.
# make bench measures AlexNet and VGG-16 on every runtime of this CPU.
# make docs  builds the documentation's site.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test unit lint bench docs clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cnnedge needs Python 3.11 or newer: make PYTHON=python3.11 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[cpu,export,rtx,openvino,litert,report,sign,dev]"
	touch $(READY)

demo: $(READY)
	mkdir -p demo
	$(BIN)/cnnedge train alexnet_v1 --data digits --epochs 6 -o demo/alexnet_v1.keras
	$(BIN)/cnnedge export demo/alexnet_v1.keras -o demo/alexnet_v1 --force
	$(BIN)/cnnedge verify demo/alexnet_v1 --data digits
	$(BIN)/cnnedge bench demo/alexnet_v1 --reference demo/alexnet_v1.keras --data digits --html demo/bench.html
	$(BIN)/cnnedge predict demo/alexnet_v1 demo/alexnet_v1/selftest/golden-00.png --top 3
	@echo "the reports: demo/alexnet_v1/report.html, demo/bench.html"

# Models first (minutes, the first time), then the suite: under a quarter of an hour on two cores.
bench: $(READY)
	$(BIN)/python benchmarks/prepare.py build/bench
	$(BIN)/cnnedge bench benchmarks/edge-cpu.toml -o build/bench/edge-cpu.json \
	  --html build/bench/edge-cpu.html --markdown build/bench/edge-cpu.md --csv build/bench/edge-cpu.csv
	@echo "the page: build/bench/edge-cpu.html"

docs: $(READY)
	$(BIN)/mkdocs build --strict
	@echo "the site: build/docs/index.html; with its search: $(PYTHON) -m http.server -d build/docs"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/pytest -m unit -n 2

# Three workers on two cores: a third of the time a test waits for a process of its own.
test: lint
	$(BIN)/pytest -n 3 --dist loadfile --durations=25 -rfE

clean:
	rm -rf $(VENV) demo build dist *.egg-info
