# One verb each; continuous integration calls the same ones. Tools come from .venv if there is one, else from PATH.
BIN := $(if $(wildcard .venv/bin/python),.venv/bin/,)
PYTHON := $(BIN)python
PY := kernels backends runtime tests bench

# What `make bench`, `make kernels` and `make conformance` run on, and the name of the file they write.
BACKEND ?= opencl
DEVICE ?=
MODEL ?= 135M
NAME ?= $(BACKEND)
ON_DEVICE := $(if $(DEVICE),--device "$(DEVICE)")
# The interpreter that has the peers; `python bench/peers/run.py --help` says how to install them.
PEERS ?=
COMPARE := $(PYTHON) bench/peers/run.py $(if $(PEERS),--python "$(PEERS)")

.PHONY: help check static fmt lint types fast test rtl faults fpga fpga-emulator gpu cuda-kernels bench kernels support \
	conformance peers

help:            ## this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  +##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

check: static fast  ## what must pass before a commit

static: lint types  ## everything that runs no test

fmt:             ## format the code
	$(BIN)ruff format $(PY)
	$(BIN)ruff check --fix $(PY)

lint:            ## formatting and lint rules
	$(BIN)ruff format --check $(PY)
	$(BIN)ruff check $(PY)

types:           ## type checking, strict
	$(BIN)pyright --pythonpath $(PYTHON)

fast:            ## the tests that take seconds
	$(BIN)pytest -q -m "not slow"

test:            ## all tests, as in the README
	$(BIN)pytest -n auto

rtl:             ## simulate the FPGA engine's RTL in full, and compare its cell counts (quarter of an hour)
	$(MAKE) -C hls/rtl sim check-cells

faults:          ## try every planted fault of the OpenCL kernels against the suite (half an hour)
	POLYKERN_ALL_FAULTS=1 $(BIN)pytest -q tests/test_opencl_faults.py

fpga:            ## every case of the contract on the FPGA emulator, and the default model through it
	POLYKERN_ALL_FPGA=1 $(BIN)pytest -q tests/test_fpga_emulator.py tests/test_fpga_bitstream.py

fpga-emulator:   ## fetch Intel's FPGA emulator (310 MB) into the cache; else its first use does
	$(PYTHON) -m polykern.backends.opencl.fpga install

bench:           ## time the default model on BACKEND (and DEVICE); writes bench/results/bench-$(NAME).json
	@mkdir -p bench/results
	$(BIN)runtime bench --backend $(BACKEND) $(ON_DEVICE) --json > bench/results/bench-$(NAME).json

kernels:         ## check and time the kernels of BACKEND in MODEL's shapes; writes bench/results/kernels-$(NAME).json and pictures
	$(BIN)pytest bench --backend $(BACKEND) $(ON_DEVICE) --model $(MODEL) --json bench/results/kernels-$(NAME).json
	$(PYTHON) bench/plots.py bench/results/kernels-$(NAME).json

conformance:     ## judge BACKEND (and DEVICE) against the contract; writes bench/results/conformance-$(NAME).json
	@mkdir -p bench/results
	$(BIN)runtime conformance --backend $(BACKEND) $(ON_DEVICE) --json > bench/results/conformance-$(NAME).json

support:         ## rewrite the README's support table from bench/results/conformance-*.json
	$(PYTHON) bench/support.py

peers:           ## compare with llama.cpp, OpenVINO and torch (in PEERS=python); writes bench/results/peers-*.json
	$(COMPARE) --tests pp512,tg128,tg32@d4096 -o bench/results/peers-smollm2-135m.json
	$(COMPARE) --tests pp512,tg64 --model random:smollm2-1.7b --sides tvm,opencl,llama.cpp,openvino,torch-bf16 \
		-o bench/results/peers-smollm2-1.7b.json
	$(PYTHON) bench/peers/table.py

gpu:             ## all that only a machine with a GPU can show (and DEVICE); writes bench/results/gpu-*.json
	$(PYTHON) bench/gpu.py $(ON_DEVICE)

cuda-kernels:    ## compile every CUDA kernel for four architectures; rewrites the table in backends/cuda/README.md
	$(PYTHON) bench/cuda_kernels.py
