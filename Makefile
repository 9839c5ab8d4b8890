# LoraGraft's commands. Each first sets up what it needs in a virtual environment of its own.
# A CPU or a CUDA build of torch, before the first command:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
TORCH_ARGS ?= $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

# ComfyUI: named, or two folders up when this folder lies in ComfyUI/custom_nodes.
COMFYUI_PATH ?= $(if $(wildcard ../../comfy/sd.py),../..)
# The interpreter that runs it; without one, ComfyUI's requirements get an environment beside ours.
COMFYUI_PYTHON ?=
HOST := $(if $(COMFYUI_PATH),$(if $(COMFYUI_PYTHON),,$(VENV)/.host-ready))
ifneq ($(COMFYUI_PATH),)
ifeq ($(COMFYUI_PYTHON),)
COMFYUI_PYTHON := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(VENV)/host/bin/python
endif
endif
export COMFYUI_PATH COMFYUI_PYTHON

PY = "$(VENV)/bin/python"
PIP = $(PY) -m pip --disable-pip-version-check
PYTEST = $(PY) -m pytest
# Quick tests share the cores, one process each: threads of several processes would wait for each other.
PARALLEL = OMP_NUM_THREADS=1 $(PYTEST) -n auto
IN_HOST = comfy or browser

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-comfy test-full test-gpu test-fuzz check check-deps bench bench-check bench-dataset bench-gpu bench-profile bench-together fmt screenshots package

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):[^#]*## */\1\t/p' Makefile | expand -t 14

setup: $(VENV)/.ready  ## virtual environment with torch and the development tools

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else "LoraGraft needs Python 3.10 to 3.13, this is %d.%d. Name another one: PYTHON=python3.12" % v)'
	$(PYTHON) -m venv "$(VENV)"
	$(PIP) install --quiet $(TORCH) $(TORCH_ARGS)
	@touch "$@"

# torch comes first and is named again, so that nothing which depends on it chooses another build.
# The link gives mypy the package's name, whatever this folder is called.
$(VENV)/.ready: $(VENV)/.torch pyproject.toml requirements.txt
	$(PIP) install --quiet $(TORCH) -e ".[dev]"
	@mkdir -p "$(VENV)/typing" && ln -sfn "$(CURDIR)" "$(VENV)/typing/loragraft"
	@touch "$@"

# ComfyUI's requirements in an environment that lies over ours and takes torch from it: PyPI's
# torchvision does not load beside a CPU build of torch, and would break transformers for the trainer.
$(VENV)/.host-ready: $(VENV)/.ready
	$(PY) -m venv "$(VENV)/host"
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(echo "$(VENV)"/host/lib/python*/site-packages)/zz_trainer.pth"
	grep -v -E '^(torch|torchaudio)([^a-z]|$$)' "$(COMFYUI_PATH)/requirements.txt" > "$(VENV)/host/requirements.txt"
	"$(COMFYUI_PYTHON)" -m pip --disable-pip-version-check install --quiet $(TORCH) -r "$(VENV)/host/requirements.txt"
	@touch "$@"

demo: $(VENV)/.ready  ## train a LoRA on the embedded base, draw a grid, into output/demo
	$(PY) -m loragraft.trainer.demo.run --out output/demo

test: $(VENV)/.ready $(HOST)  ## all quick tests; with a ComfyUI (COMFYUI_PATH) also those in it
	$(PARALLEL) -m "not (slow or full or network or $(IN_HOST))"
	$(if $(COMFYUI_PATH),$(PYTEST) -m "($(IN_HOST)) and not (slow or full)",@echo "Skipped: the tests in ComfyUI and in a browser. COMFYUI_PATH names no ComfyUI, and none lies two folders up.")

test-comfy: $(VENV)/.ready $(HOST)  ## only the tests in a real ComfyUI and browser; fails without one
	$(PYTEST) --require-comfyui -m "($(IN_HOST)) and not (slow or full)"

test-full: $(VENV)/.ready $(HOST)  ## only the slow tests: full-size models, more characters
	$(PYTEST) -m "(slow or full) and not network"

test-gpu: $(VENV)/.ready $(HOST)  ## on a machine with a GPU: the GPU tests, and the tests in ComfyUI on that GPU
	LORAGRAFT_HOST_DEVICE=gpu $(PYTEST) tests/gpu $(if $(COMFYUI_PATH),tests/comfyui)

test-fuzz: $(VENV)/.ready  ## ten times as many cases in the property and fuzz tests
	LORAGRAFT_FUZZ=1 $(PARALLEL) tests/trainer tests/nodes

check: $(VENV)/.ready  ## ruff, mypy, floors, what ships
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	MYPYPATH="$(VENV)/typing" $(PY) -m mypy -p loragraft.trainer -p loragraft.nodes
	$(PYTEST) -q tests/test_floors.py tests/test_package.py tests/test_ship.py

check-deps: $(VENV)/.ready  ## installing our requirements changes no package of ComfyUI's (network)
	$(PYTEST) -m network tests/test_dependencies.py

ARCHITECTURE ?= sd15

bench: $(VENV)/.ready  ## ours against its peers, by turns: the cases for this machine (ARCHITECTURE=sd15, sdxl, flux-1-2)
	$(PY) -m benchmarks.run --architecture $(ARCHITECTURE)

bench-check: $(VENV)/.ready  ## fails if ours lost more than 5 % against the plain loop since the stored result
	$(PY) -m benchmarks.gate

fmt: $(VENV)/.ready  ## format, and fix what ruff can fix
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

bench-dataset: $(VENV)/.ready  ## the dataset steps: against kohya's set-up, and one core against all
	$(PY) -m benchmarks.dataset

PLAN ?= sd15

bench-gpu: $(VENV)/.ready  ## on a machine with a GPU: one plan in ten minutes (PLAN=sd15, sdxl, flux, smallest)
	$(PY) -m benchmarks.gpu $(PLAN)

bench-profile: $(VENV)/.ready  ## where a step of ours goes, and what it dispatches
	$(PY) -m benchmarks.step_profile

bench-together: $(VENV)/.ready  ## LoRAs side by side against one after the other
	$(PY) -m benchmarks.together

screenshots: $(VENV)/.ready $(HOST)  ## the README's pictures and the thumbnails, from the real page
	$(PY) tests/browser/screenshots.py

package: $(VENV)/.ready  ## build the registry's zip into dist/ and scan it
	$(PY) .ci/package.py
