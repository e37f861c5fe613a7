# Each target but test-gpu and bench sets up what it needs in .venv first, and reuses it the next time.
.PHONY: help demo demo-ep test test-fast test-gpu paddle-device bench lint hooks

help:
	@echo "make demo       train a small MoE language model, BF16 beside FP8 (options: make demo ARGS=--help)"
	@echo "make demo-ep    the same model with its experts on two CPU ranks (ARGS=--help likewise)"
	@echo "make test       the whole suite"
	@echo "make test-fast  lint and the quick tests"
	@echo "make test-gpu   what only a GPU shows, in the environment of $${PYTHON:-python3}, which has torch with CUDA"
	@echo "make paddle-device  the CUDA device plugin for stock Paddle, in OUT=build/paddle_device (docs/paddle_gpu.md)"
	@echo "make bench      the benchmark of the layer, likewise (ARGS='--peer-site FOLDER' to have sonic-moe beside it)"
	@echo "make lint       ruff and the rules of the house"
	@echo "make hooks      run the quick suite before each commit"

demo:
	@bash tools/ci/ensure_env.sh
	.venv/bin/python examples/train_ernie_moe.py $(ARGS)

# A clean environment: variables of a cluster's scheduler make Paddle's launcher wait for other machines. Its store on libuv
# ends rank 0 now and then when another rank hangs up first.
demo-ep:
	@bash tools/ci/ensure_env.sh
	env -i PATH="$$PATH" HOME="$$HOME" OMP_NUM_THREADS=1 FLAGS_tcp_store_using_libuv=0 \
		.venv/bin/python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo --host 127.0.0.1 \
		--log_dir build/demo-ep examples/train_ernie_moe_ep.py $(ARGS)

test:
	@bash tools/ci/run_core_tests.sh

test-fast:
	@bash tools/ci/run_core_tests.sh --fast

test-gpu:
	@bash tools/ci/run_gpu_tests.sh

paddle-device:
	@bash tools/ci/ensure_env.sh
	.venv/bin/python tools/build_paddle_device.py $(or $(OUT),build/paddle_device)

bench:
	$(or $(PYTHON),python3) benchmarks/moe.py --csv benchmarks/moe.csv --plot benchmarks/moe.png $(ARGS)

lint:
	@bash tools/ci/run_core_tests.sh --phase lint

hooks:
	git config core.hooksPath .githooks
