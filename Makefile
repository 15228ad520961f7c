# Two commands do all the set-up on a fresh machine: `make demo` and `make test`. The rest is for developers.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
SOURCES := $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*) setup.py

.PHONY: demo test chaos bench bench-quick bench-demo gpu install clean

demo: install  ## the whole flow on real handwritten digits, into runs/demo
	$(BIN)/bnfuse demo

test: install  ## every test
	$(BIN)/python -m pytest

chaos: install  ## kills a synthesis 50 times at random; it has to end with the same bytes
	$(BIN)/python tests/chaos.py

# BENCH="--threads 4", BENCH="--device cuda" and the like: see benchmarks/conftest.py
bench: install  ## every site, step and network against its rivals, into benchmarks/results and the README
	$(BIN)/python -m pytest benchmarks $(BENCH)
	$(BIN)/python -m pytest benchmarks/test_operators.py --layout channels_last $(BENCH)
	$(BIN)/python benchmarks/report.py

bench-quick: install  ## a part of that, into benchmarks/results/quick.json
	$(BIN)/python -m pytest benchmarks --quick $(BENCH)

# On a machine with an NVIDIA GPU, nvcc and a torch that has CUDA: builds and installs in place for that torch and that GPU, with
# nothing to download. GPU_PYTHON=… names the interpreter, OUT=… the folder of the figures (JSON) and of their tables (gpu.md),
# which show this run alone: of a suite that failed there are none, whatever an earlier run has left in the folder. A test that
# fails keeps nothing from being measured; it fails the command in the end.
# Where pytest-xdist is there, tests run side by side: compiling Triton's kernels takes most of their time. The benchmarks' share
# of the nine minutes is reckoned in tests/test_timing.py; compiling torch.compile's rivals takes most of it, so there are some
# of one network.
GPU_PYTHON ?= python3
OUT ?= benchmarks/results
GPU_BENCH := $(GPU_PYTHON) -m pytest benchmarks -q --device cuda --batch 256 --layout channels_last
GPU_NEEDS := PIL hypothesis jinja2 numpy pytest pytest_benchmark safetensors setuptools torch torchvision tqdm triton
GPU_PARALLEL = $(GPU_PYTHON) -c 'import importlib.util as u, os; print("-n %d" % min(12, os.cpu_count()) if u.find_spec("xdist") else "")'
GPU_ARCHITECTURE = $(GPU_PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())'

gpu:  ## builds the CUDA kernels in place, runs the GPU tests, then the benchmarks of the ImageNet networks
	@$(GPU_PYTHON) -c 'import importlib.util as u, sys; missing = [m for m in sys.argv[1:] if not u.find_spec(m)]; sys.exit("make gpu needs these modules in " + sys.executable + ": " + " ".join(missing) if missing else 0)' $(GPU_NEEDS)
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu: torch " + torch.__version__ + " in " + sys.executable + " sees no CUDA device")'
	BNFUSE_CUDA=1 TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$($(GPU_ARCHITECTURE))}" $(GPU_PYTHON) -m pip --disable-pip-version-check install -q --no-deps --no-build-isolation -e .
	$(GPU_PYTHON) -m bnfuse doctor
	failed=0; began=$$(mktemp); \
	$(GPU_PYTHON) -m pytest -q $$($(GPU_PARALLEL)) tests/test_gpu.py tests/test_triton.py || failed=1; \
	BNFUSE_RESULTS=$(OUT) $(GPU_BENCH) --dtype bfloat16 --networks resnet50 resnet18 mobilenet_v2 --compile-for resnet50 || failed=1; \
	BNFUSE_RESULTS=$(OUT) $(GPU_BENCH) --dtype float32 --networks resnet50 resnet18 --compile-for || failed=1; \
	BNFUSE_RESULTS=$(OUT) $(GPU_PYTHON) benchmarks/convolutions.py --device cuda --dtype bfloat16 --batch 256 --networks resnet18 || failed=1; \
	$(GPU_PYTHON) benchmarks/step_profile.py --device cuda --dtype bfloat16 --batch 256 --network resnet18 || failed=1; \
	$(GPU_PYTHON) benchmarks/report.py --gpu $(OUT) --since $$began || failed=1; rm $$began; exit $$failed

bench-demo: install  ## the rate of the demo's synthesis with the compiled kernels over the eager reference, into the README
	$(BIN)/python benchmarks/synthesis_rate.py
	$(BIN)/python benchmarks/report.py

install: $(VENV)/.built

$(VENV)/.dependencies: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "bnfuse needs Python 3.10 or newer, " + sys.executable + " is " + sys.version.split()[0] + "; run make PYTHON=python3.11")'
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "this Python cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "bnfuse needs a C++17 compiler; on Debian: apt install g++"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(PIP) install -c constraints.txt setuptools wheel numpy pillow safetensors tqdm scikit-learn jinja2 \
		torchmetrics scipy torchvision timm triton pytest hypothesis expecttest pytest-timeout pytest-benchmark matplotlib \
		datasets webdataset tensorboard
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

clean:  ## removes what the build made; `rm -rf .venv runs` removes the rest
	rm -rf build bnfuse.egg-info bnfuse/_C*.so
