# make demo | test | bench | lint | docs | sanitize | compat | assets: each makes .venv and installs what it needs; quick the second time.
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
.PHONY: demo pictures study test test-executor bench gpu-check lint docs sanitize cross compat packages assets clean help

help:
	@echo "make demo    distil the tiny student, stream it before and after, write out/demo/index.html (minutes)"
	@echo "make pictures  the README's, from the demo"
	@echo "make study   every way of weighting beside plain distribution matching, writes out/study/index.html (hours)"
	@echo "make test    the tests"
	@echo "make test-executor  those of the PTX executor (minutes; when it or a compiler changes)"
	@echo "make bench   every op beside its baselines; writes docs/benchmarks.md, .json and docs/roofline.svg"
	@echo "make gpu-check  on a machine with a GPU: build, tests, timings; writes docs/gpu-measured.md"
	@echo "make lint    ruff, mypy, vermin, clang-format"
	@echo "make docs    the documentation as a site that needs no network: out/site/index.html"
	@echo "make sanitize  the ops' tests with AddressSanitizer and UndefinedBehaviorSanitizer (minutes)"
	@echo "make cross   compile the CPU kernels for aarch64 (needs g++-aarch64-linux-gnu)"
	@echo "make compat  build the ops once, test them with the oldest and the newest torch in range (downloads gigabytes)"
	@echo "make packages  sdist and wheel, each installed into an empty environment and run (minutes)"
	@echo "make assets  train the tiny world's models again, from nothing (hours)"

demo: $(VENV)/.built
	$(BIN)/stream-r1 demo $(ARGS)

pictures: demo
	$(BIN)/python -m build_support.pictures out/demo

study: $(VENV)/.built
	$(BIN)/stream-r1 study recipes/studies/tiny.yaml $(ARGS)

test: $(VENV)/.tools
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(ARGS) --ignore tests/executor tests

# Minutes, and another answer only where the executor or a compiler changed: .ci/run runs it then.
test-executor: $(VENV)/.tools
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(ARGS) tests/executor
	$(BIN)/python -m build_support.executor_state --keep

bench: $(VENV)/.tools
	$(BIN)/python -m pytest -q --benchmark-only --report docs $(ARGS) benchmarks

# Exits with 3 (make says so, and exits with 2) where torch finds no GPU.
gpu-check: $(VENV)/.tools
	$(BIN)/python -m benchmarks.gpu_check --budget 3000 --page docs/gpu-measured.md $(ARGS)

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy stream_r1 stream_r1_kernels ptx_executor
	$(BIN)/vermin --quiet --no-tips --violations --target=3.10- stream_r1 stream_r1_kernels ptx_executor build_support setup.py
	find csrc tests/cuda benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# The runtimes come before the interpreter's own allocations; libstdc++ has to be there when they look for throw.
sanitize: $(VENV)/.tools
	STREAM_R1_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib build/sanitize
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 STREAM_R1_EXTENSION=build/sanitize/stream_r1_kernels \
	  $(BIN)/python -m pytest -q $(ARGS) tests/ops

# Kernel files are plain C++, so that another architecture's compiler is all they need.
cross:
	@mkdir -p build/aarch64
	@for file in csrc/cpu/*_kernel.cpp; do echo $$file; aarch64-linux-gnu-g++ -std=c++20 -O2 -fopenmp -Wall -fno-math-errno \
	  -fno-trapping-math -DSTREAM_R1_ISA=baseline -Icsrc -c $$file -o build/aarch64/$$(basename $$file .cpp).o || exit 1; done

# What people download: each installs into an empty environment and runs a short demo in an empty folder.
packages: $(VENV)/.built
	rm -rf build/packages && mkdir -p build/packages
	$(BIN)/python -c "from setuptools import build_meta as b; b.build_sdist('build/packages'); b.build_wheel('build/packages')" > build/packages/log.txt
	@for package in build/packages/*.tar.gz build/packages/*.whl; do echo "== $$package"; \
	  $(PYTHON) -m venv build/packages/env && \
	  build/packages/env/bin/python -m pip --disable-pip-version-check -qq install torch==$(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) && \
	  build/packages/env/bin/python -m pip --disable-pip-version-check -qq install "setuptools>=77" wheel && \
	  build/packages/env/bin/python -m pip --disable-pip-version-check -qq install --no-build-isolation $$package torch==$(TORCH) && \
	  rm -rf build/packages/empty && mkdir build/packages/empty && \
	  (cd build/packages/empty && ../env/bin/stream-r1 demo --set budget=60 --set evaluated_videos=2 --set teacher_steps=0) || exit 1; \
	  rm -rf build/packages/env; done

# The ops as people install them: one wheel, in environments that have nothing else of this repository. Run from a folder without
# the package, so that the wheel's is imported. COMPAT_PYTHON: the interpreter of those environments.
COMPAT_TORCH  ?= 2.10.0 2.14.1
COMPAT_PYTHON ?= $(PYTHON)
compat: $(VENV)/.built
	rm -rf build/compat && mkdir -p build/compat
	$(PIP) wheel --no-build-isolation --no-deps -w build/compat ./kernels
	@for torch in $(COMPAT_TORCH); do echo "== torch $$torch"; \
	  $(COMPAT_PYTHON) -m venv build/compat/env && \
	  build/compat/env/bin/python -m pip --disable-pip-version-check -qq install torch==$$torch numpy pytest hypothesis build/compat/*.whl && \
	  (cd build/compat && env/bin/python -m stream_r1_kernels.info && \
	    env/bin/python -m pytest -q --import-mode=importlib -c /dev/null --rootdir ../.. ../../tests/ops --ignore ../../tests/ops/test_devices.py $(ARGS)) || exit 1; \
	  rm -rf build/compat/env; done

# The tiny world from nothing; each training resumes where it was stopped. The teacher takes nearly all of the time:
# TEACHER_ARGS="training.steps=1800" makes a worse one sooner.
assets: $(VENV)/.built
	$(BIN)/python -m stream_r1.tiny_world codec recipes/tiny/assets/codec.yaml
	$(BIN)/python -m stream_r1.tiny_world codec recipes/tiny/assets/codec-decoder.yaml
	$(BIN)/python -m stream_r1.tiny_world teacher recipes/tiny/assets/teacher.yaml $(TEACHER_ARGS)
	$(BIN)/python -m stream_r1.tiny_world teacher recipes/tiny/assets/teacher-longer.yaml $(TEACHER_ARGS)
	$(BIN)/python -m stream_r1.tiny_world student recipes/tiny/assets/student.yaml
	$(BIN)/python -m stream_r1.tiny_world reward recipes/tiny/assets/reward.yaml
	$(BIN)/python -m stream_r1.tiny_world reward recipes/tiny/assets/judge.yaml
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
	@$(PIP) install "setuptools>=77" wheel
	@touch $@

# The package, editable, with the extension compiled; again when its sources change.
$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py build_support/cuda.py build_support/objects.py $(SOURCES)
	@echo "building and installing stream-r1"
	@$(PIP) install --no-build-isolation -e . torch==$(TORCH)
	@touch $@

# Development tools, and what the documentation is made with.
$(VENV)/.tools: EXTRA := dev
$(VENV)/.docs: EXTRA := docs
$(VENV)/.tools $(VENV)/.docs: $(VENV)/.built
	@$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['$(EXTRA)'])" \
	  | xargs $(PIP) install torch==$(TORCH)
	@touch $@
