# make demo | test | bench | lint | assets: each makes .venv and installs what it needs; quick the second time.
#
# PYTHON       interpreter that makes .venv                      (python3)
# TORCH_INDEX  index to take torch from, for the CPU build of it (pip's own)

PYTHON      ?= python3
TORCH       := 2.13.0
TORCH_INDEX ?=
VENV        := .venv
BIN         := $(VENV)/bin
PIP         := $(BIN)/python -m pip --disable-pip-version-check -qq
SOURCES     := $(shell find csrc -type f 2>/dev/null)

.DELETE_ON_ERROR:
.PHONY: demo test bench lint assets clean help

help:
	@echo "make demo    distil the tiny student, stream it before and after, write out/demo/index.html (minutes)"
	@echo "make test    the tests"
	@echo "make bench   every op beside its torch reference"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make assets  train the tiny world's models again (hours)"

demo: $(VENV)/.built
	$(BIN)/stream-r1 demo $(ARGS)

test: $(VENV)/.tools
	$(BIN)/python -m pytest -q $(ARGS) tests

bench: $(VENV)/.tools
	$(BIN)/python -m pytest -q --benchmark-only $(ARGS) benchmarks

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy stream_r1 stream_r1_kernels ptx_executor
	find csrc tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror

# The tiny world from the film on; each step resumes where it was stopped.
assets: $(VENV)/.built
	$(BIN)/stream-r1 data fetch
	$(BIN)/python -m stream_r1.tiny_world vae recipes/tiny/assets/vae.yaml
	$(BIN)/python -m stream_r1.tiny_world vae recipes/tiny/assets/vae-long.yaml
	$(BIN)/python -m stream_r1.tiny_world teacher recipes/tiny/assets/teacher.yaml
	$(BIN)/python -m stream_r1.tiny_world student recipes/tiny/assets/student.yaml
	$(BIN)/python -m stream_r1.rewards.film_training
	$(BIN)/stream-r1 data reference
	$(BIN)/stream-r1 data baselines

clean:
	rm -rf build out *.egg-info
	find stream_r1 stream_r1_kernels -name '*.so' -delete

# torch first and pinned: what comes after finds it there and pulls no other build of it.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "$(PYTHON) lacks venv (on Debian: apt-get install python3-venv)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch $(TORCH) into $(VENV)"
	@$(PIP) install torch==$(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(PIP) install "setuptools>=77" wheel ninja
	@touch $@

# The package, editable, with the extension compiled; again when its sources change.
$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py build_support/cuda.py $(SOURCES)
	@echo "building and installing stream-r1"
	@$(PIP) install --no-build-isolation -e . torch==$(TORCH)
	@touch $@

$(VENV)/.tools: $(VENV)/.built
	@$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['dev'])" \
	  | xargs $(PIP) install torch==$(TORCH)
	@touch $@
