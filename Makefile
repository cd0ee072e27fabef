# Every target sets itself up: `make bundle` and `make test` work in a fresh clone. What is installed is named in
# pyproject.toml and pinned in constraints.txt, and goes into .venv.

PYTHON ?= python3
RECIPE ?= recipes/default.toml
# BASE=gpt2 (a hub name or a folder) fine-tunes; CORPUS=PATH reads your own text; OUTPUT is where bundles go.
BASE ?=
CORPUS ?=
OUTPUT ?= dist
# The bundle that serve and bench use.
BUNDLE ?= $(OUTPUT)/gpt2-docs
# For serve, such as --graph ort/int8 --port 8080.
SERVE_OPTIONS ?=

BIN := .venv/bin
INSTALLED := .venv/installed
BUILD := $(BIN)/gpt2-bundle build --recipe $(RECIPE) --output $(OUTPUT) $(if $(BASE),--base "$(BASE)") $(if $(CORPUS),--corpus "$(CORPUS)")

.DEFAULT_GOAL := help
.PHONY: help install bundle serve serve-tfserving bench bench-gpt2 bench-prepare bench-training bench-tf-generate bench-peers bench-speculation bench-prefill bench-serving \
	bench-serving-peers bench-gpu test test-slow test-oracle test-ecosystem test-ray test-openapi lint man clean

help: ## Show this list.
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  %-16s %s\n", $$1, $$2}'

install: $(INSTALLED) ## Make .venv with everything pinned in constraints.txt.

# The mark comes last. Without it whatever stands in .venv may be half an installation, so it is made anew.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "error: $(PYTHON) is not Python 3.11 to 3.13; set PYTHON=/path/to/one" >&2; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[build,serve,guided,dev]'
	@touch $(INSTALLED)

bundle: $(INSTALLED) ## Text to verified bundle in dist/ (RECIPE=, BASE=, CORPUS=, OUTPUT=).
	$(BUILD)

serve: $(INSTALLED) ## Serve the bundle by HTTP at port 8000 (BUNDLE=, SERVE_OPTIONS=).
	@test -f "$(BUNDLE)/manifest.json" || $(MAKE) bundle
	$(BIN)/gpt2-bundle serve "$(BUNDLE)" $(SERVE_OPTIONS)

# TensorFlow Serving itself, as a binary or as its official container, from the folder that deploy writes.
serve-tfserving: $(INSTALLED) ## Serve the bundle's SavedModel by TensorFlow Serving, if it is on this machine (BUNDLE=).
	@folder=runs/serve/$$(basename "$(BUNDLE)"); \
	$(BIN)/gpt2-bundle deploy "$(BUNDLE)" --target tfserving --output "$$folder" || exit; \
	if command -v "$${TENSORFLOW_MODEL_SERVER:-tensorflow_model_server}" >/dev/null; then \
		exec "$$folder/run.sh"; \
	elif docker info >/dev/null 2>&1; then \
		cd "$$folder" && exec docker compose up; \
	else \
		echo "error: neither tensorflow_model_server (or TENSORFLOW_MODEL_SERVER) nor a running Docker engine is here;" \
			"install one to serve $$folder" >&2; exit 1; \
	fi

bench: $(INSTALLED) ## Measure the bundle by every runtime in it: steps, requests, limits; a page in runs/bench/ (BUNDLE=).
	@test -f "$(BUNDLE)/manifest.json" || $(MAKE) bundle
	$(BIN)/gpt2-bundle bench "$(BUNDLE)" --scenario all --rate 16 --sweep-from 32 --sweep-factor 1.5 --sweep-seconds 1.5 \
		--sweep-limit 90 --resume --output runs/bench/$$(basename "$(BUNDLE)").json

# Fewer requests and targets, and lower rates: all of it is to end in ten minutes on two cores.
bench-gpt2: $(INSTALLED) ## The same for the 124M geometry, with random weights; a page in runs/bench/.
	$(BIN)/gpt2-bundle build --recipe recipes/gpt2-geometry.toml --output $(OUTPUT)
	$(BIN)/gpt2-bundle bench "$(OUTPUT)/gpt2-geometry" --target ort/fp32 --target ort/int8 --target ort/int4 --target savedmodel \
		--target server=ort/int8 --scenario steps --scenario single --scenario offline --scenario concurrency --clients 4 \
		--scenario saturation --sweep-from 2 --sweep-factor 2 --sweep-seconds 4 --sweep-limit 110 --scenario cold-start \
		--requests 8 --resume --output runs/bench/gpt2-geometry.json

bench-prepare: $(INSTALLED) ## Time preparation of 50 MB beside the bare tokenizers library, and its memory at 100 and 500 MB.
	$(BIN)/python -m benchmarks.experiments.prepare_throughput --work runs/bench-prepare --memory 100 --memory 500 --novel 7.6 --novel 100

# Peers have an environment of their own. KerasHub asks for tensorflow-text, which GPT-2 does not need.
.venv-peers/installed:
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		torch transformers tensorflow keras safetensors rich regex
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps keras-hub==0.32.0
	@touch $@

bench-tf-generate: $(INSTALLED) .venv-peer-keras_hub/installed ## Compare the SavedModel's generation with KerasHub's compiled one at 124M.
	test -f "$(OUTPUT)/gpt2-geometry/manifest.json" || $(BIN)/gpt2-bundle build --recipe recipes/gpt2-geometry.toml --output $(OUTPUT)
	$(BIN)/python -m benchmarks.peers "$(OUTPUT)/gpt2-geometry" --runtime savedmodel --runtime keras_hub --batch-size 1 --batch-size 4 \
		--batch-size 16 --new-tokens 64 --output runs/bench-tf-generate/record.json

bench-training: $(INSTALLED) .venv-peers/installed ## Measure training beside torch and KerasHub, which are installed for it (20 minutes).
	$(BIN)/python -m benchmarks.training --peers .venv-peers/bin/python --output runs/bench-training/record.json

# One environment a peer, as their requirements clash; one that does not install here is left out. llama-cpp-python is
# compiled, some ten minutes on two cores. torchvision comes with optimum-intel, GPT-2 does not need it, and where it was
# built for another torch transformers does not import.
PEERS := torch openvino ctranslate2 genai llama keras_hub

# llama.cpp's products by AMX end in a segmentation fault (ggml-org/llama.cpp#20824); without, it uses AVX-512. A wheel
# from pip's cache may have been compiled otherwise.
NO_AMX := $(shell grep -qs amx_int8 /proc/cpuinfo && echo '-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8')

.venv-peer-%/installed: benchmarks/peers/requirements/%.txt
	rm -rf .venv-peer-$*
	$(PYTHON) -m venv .venv-peer-$*
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF $(NO_AMX)" \
		.venv-peer-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		$(if $(filter llama,$*),--no-cache-dir) --requirement $<
	@test $* != openvino || .venv-peer-$*/bin/python -m pip uninstall --quiet --yes torchvision
	@test $* != keras_hub || .venv-peer-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps keras-hub==0.32.0
	@touch $@

bench-peers: $(INSTALLED) ## Compare decode and prefill at 124M with other runtimes, and draw README's chart and tables.
	for peer in $(PEERS); do $(MAKE) .venv-peer-$$peer/installed || echo "$$peer does not install here: left out" >&2; done
	test -f "$(OUTPUT)/gpt2-geometry/ort/int4/model.onnx" || $(BIN)/gpt2-bundle build --recipe recipes/gpt2-geometry.toml --output $(OUTPUT)
	$(BIN)/python -m benchmarks.peers "$(OUTPUT)/gpt2-geometry" --resume --output runs/bench-peers/record.json
	cp runs/bench-peers/record.json benchmarks/results/$$(date -u +%Y-%m-%d)-peers-cpu.json
	$(BIN)/python -m benchmarks.peers.publish

# Drafts that hold depend on the text: take a bundle of a trained model.
bench-prefill: $(INSTALLED) ## Compare fitted prefill chunks with fixed ones of 64 tokens, and what bounds both, int8 and fp32, at 1, 4 and 16 streams.
	test -f "$(OUTPUT)/gpt2-geometry/ort/int8/model.onnx" || $(BIN)/gpt2-bundle build --recipe recipes/gpt2-geometry.toml --output $(OUTPUT)
	for graph in int8 fp32; do $(BIN)/python -m benchmarks.serving.prefill_cost "$(OUTPUT)/gpt2-geometry" --graph ort/$$graph \
		--output runs/bench-prefill/$$graph-cost.json || exit; done
	for graph in int8 fp32; do $(BIN)/python -m benchmarks.serving.engine "$(OUTPUT)/gpt2-geometry" --graph ort/$$graph --chunks 2.25x,64 \
		--new-tokens 32 --repeats 5 --output runs/bench-prefill/$$graph.json || exit; done

bench-speculation: $(INSTALLED) ## Compare speculative with plain decoding of single streams, fp32 and int8, and with prompt lookup of other runtimes (BUNDLE=, PROMPTS=).
	@test -f "$(BUNDLE)/manifest.json" || $(MAKE) bundle
	for graph in fp32 int8; do $(BIN)/python -m benchmarks.experiments.speculation "$(BUNDLE)" --graph ort/$$graph \
		$(foreach file,$(PROMPTS),--prompts $(file)) --output runs/bench-speculation/$$graph.json || exit; done
	for peer in openvino llama; do $(MAKE) .venv-peer-$$peer/installed || echo "$$peer does not install here: left out" >&2; done
	$(BIN)/python -m benchmarks.peers "$(BUNDLE)" --speculation --new-tokens 96 --work runs/bench-speculation \
		--output runs/bench-speculation/peers.json

bench-serving: $(INSTALLED) ## Measure the server beside its bare engine at 124M, then overload it, leave it and end it under load.
	test -f "$(OUTPUT)/gpt2-geometry/ort/int8/model.onnx" || $(BIN)/gpt2-bundle build --recipe recipes/gpt2-geometry.toml --output $(OUTPUT)
	mkdir -p runs/bench-serving
	for graph in int8 fp32; do $(BIN)/python -m benchmarks.serving "$(OUTPUT)/gpt2-geometry" --graph ort/$$graph \
		--output runs/bench-serving/$$graph.json || exit; done
	$(BIN)/python -m benchmarks.serving "$(OUTPUT)/gpt2-geometry" --faults --output runs/bench-serving/faults.json

# LLAMA_SERVER=PATH adds llama.cpp's own server, which no package brings; llama-cpp-python's sources hold it.
LLAMA_SERVER ?=

bench-serving-peers: $(INSTALLED) ## Measure the server at 124M beside other OpenAI-compatible ones, which are installed for it (LLAMA_SERVER=).
	for peer in llama torch; do $(MAKE) .venv-peer-$$peer/installed || echo "$$peer does not install here: left out" >&2; done
	test -f "$(OUTPUT)/gpt2-geometry/ort/int8/model.onnx" || $(BIN)/gpt2-bundle build --recipe recipes/gpt2-geometry.toml --output $(OUTPUT)
	for precision in int8 fp32; do $(BIN)/python -m benchmarks.serving.peers "$(OUTPUT)/gpt2-geometry" --precision $$precision \
		$(if $(LLAMA_SERVER),--llama-server "$(LLAMA_SERVER)") --output runs/bench-serving-peers/$$precision.json || exit; done

# onnxruntime-gpu, torch and TensorFlow are not installed for it: what BENCH_PYTHON has is measured, the rest is named.
BENCH_PYTHON ?= $(BIN)/python
bench-gpu: $(INSTALLED) ## Measure decode and prefill at 124M on a GPU, in ten minutes at most (BENCH_PYTHON=, DEVICE=cuda).
	test -f "$(OUTPUT)/gpt2-geometry/ort/fp16/greedy.onnx" || $(BIN)/gpt2-bundle build --recipe recipes/gpt2-geometry.toml --output $(OUTPUT) --set 'export.variants=["int8","int4","fp16"]'
	$(BENCH_PYTHON) -m benchmarks.peers "$(OUTPUT)/gpt2-geometry" $(if $(filter cpu,$(DEVICE)),--rehearse,--device cuda) --new-tokens 64 \
		--resume --repeats 3 --work runs/bench-gpu --output runs/bench-gpu/record.json

# More processes than four need more memory than they save time.
test: $(INSTALLED) ## Run the fast tests.
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

test-slow: $(INSTALLED) ## Run the tests that take minutes.
	$(BIN)/python -m pytest -m slow

test-oracle: $(INSTALLED) ## Install torch (CPU) too, and run the tests against it and transformers.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[oracle]'
	$(BIN)/python -m pytest -m oracle

.venv-schemathesis/installed:
	test -x .venv-schemathesis/bin/python || $(PYTHON) -m venv .venv-schemathesis
	.venv-schemathesis/bin/python -m pip install --quiet --disable-pip-version-check schemathesis==4.32.5
	@touch $@

test-openapi: $(INSTALLED) .venv-schemathesis/installed ## Install Schemathesis in an environment of its own, and run it on a server.
	SCHEMATHESIS=.venv-schemathesis/bin/st $(BIN)/python -m pytest -m ecosystem tests/ecosystem/test_schemathesis.py

# OpenAI's clients and lm_eval share an environment (1.1 GB, most of it lm_eval's data sets library).
.venv-clients/installed:
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check \
		'lm_eval[api]==0.4.13' openai==3.57.0 litellm==1.110.2 langchain-openai==1.7.4
	@touch $@

# llm asks for an openai that llama-index refuses.
.venv-frameworks/installed:
	test -x .venv-frameworks/bin/python || $(PYTHON) -m venv .venv-frameworks
	.venv-frameworks/bin/python -m pip install --quiet --disable-pip-version-check \
		llm==0.36 dspy==3.4.1 litellm==1.110.2 openai==3.57.0 locust==2.47.0
	@touch $@

.venv-llamaindex/installed:
	test -x .venv-llamaindex/bin/python || $(PYTHON) -m venv .venv-llamaindex
	.venv-llamaindex/bin/python -m pip install --quiet --disable-pip-version-check llama-index-llms-openai-like==0.8.1
	@touch $@

.venv-kserve/installed:
	test -x .venv-kserve/bin/python || $(PYTHON) -m venv .venv-kserve
	.venv-kserve/bin/python -m pip install --quiet --disable-pip-version-check kserve==0.21.0
	@touch $@

.venv-aiperf/installed:
	test -x .venv-aiperf/bin/python || $(PYTHON) -m venv .venv-aiperf
	.venv-aiperf/bin/python -m pip install --quiet --disable-pip-version-check aiperf==0.13.0
	@touch $@

# The next major versions need a newer Node.js.
.node-ai/installed:
	npm install --silent --no-fund --no-audit --prefix .node-ai ai@6.0.326 @ai-sdk/openai-compatible@2.0.92
	@touch $@

.venv-ovms/installed:
	test -x .venv-ovms/bin/python || $(PYTHON) -m venv .venv-ovms
	.venv-ovms/bin/python -m pip install --quiet --disable-pip-version-check ovmsclient==2023.1
	@touch $@

.venv-oras/installed:
	test -x .venv-oras/bin/python || $(PYTHON) -m venv .venv-oras
	.venv-oras/bin/python -m pip install --quiet --disable-pip-version-check oras==0.2.43
	@touch $@

.venv-genai/installed:
	test -x .venv-genai/bin/python || $(PYTHON) -m venv .venv-genai
	.venv-genai/bin/python -m pip install --quiet --disable-pip-version-check onnxruntime-genai==0.18.0 onnxruntime==1.32.0
	@touch $@

.venv-onnxruntime/installed:
	test -x .venv-onnxruntime/bin/python || $(PYTHON) -m venv .venv-onnxruntime
	.venv-onnxruntime/bin/python -m pip install --quiet --disable-pip-version-check onnxruntime==1.32.0 numpy==2.4.6 tokenizers==0.23.3
	@touch $@

.venv-openvino/installed:
	test -x .venv-openvino/bin/python || $(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/python -m pip install --quiet --disable-pip-version-check openvino==2026.4.1 numpy==2.4.6 tokenizers==0.23.3
	@touch $@

# optimum-onnx asks for an older transformers than the one of .venv-peer-torch.
.venv-optimum/installed:
	test -x .venv-optimum/bin/python || $(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/python -m pip install --quiet --disable-pip-version-check \
		optimum-onnx==0.1.0 optimum==2.1.0 onnxruntime==1.32.0 onnx==1.23.2 transformers==4.57.6 torch==2.13.0
	@touch $@

# Its install script would fetch libraries for CUDA.
.node-transformers/installed:
	ONNXRUNTIME_NODE_INSTALL=skip npm install --silent --no-fund --no-audit --prefix .node-transformers @huggingface/transformers@4.3.2
	@touch $@

.venv-ray/installed: pyproject.toml constraints.txt
	rm -rf .venv-ray
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[serve,onnx,ray]'
	@touch $@

test-ray: $(INSTALLED) .venv-ray/installed ## Install Ray in an environment of its own, and run the Ray Serve application on a local cluster.
	RAY_PYTHON=.venv-ray/bin/python $(BIN)/python -m pytest -m ecosystem tests/ecosystem/test_ray.py

.venv-trackers/installed: pyproject.toml constraints.txt
	rm -rf .venv-trackers
	$(PYTHON) -m venv .venv-trackers
	.venv-trackers/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[mlflow,wandb]'
	@touch $@

# A Triton with its Python backend alone, which loses the data of a newer numpy's arrays.
.venv-triton/installed:
	test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet --disable-pip-version-check onnxruntime==1.32.0 numpy==1.26.4
	.venv-triton/bin/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-pytriton==0.7.0
	@touch $@

# One environment a tool, 7 GB together; one that does not install here is left out, and its tests say so.
TOOLS := .venv-onnxruntime .venv-genai .venv-openvino .venv-optimum .venv-triton .node-transformers \
	.venv-peer-torch .venv-peer-keras_hub .venv-peer-llama .venv-schemathesis .venv-clients .venv-frameworks .venv-llamaindex \
	.venv-kserve .venv-aiperf .node-ai .venv-ovms .venv-oras .venv-ray .venv-trackers

test-ecosystem: $(INSTALLED) ## Install other tools and clients in environments of their own, and run them on a bundle and a server.
	for tool in $(TOOLS); do $(MAKE) $$tool/installed || echo "$$tool does not install here: left out" >&2; done
	CLIENTS_PYTHON=.venv-clients/bin/python OVMS_PYTHON=.venv-ovms/bin/python ORAS_PYTHON=.venv-oras/bin/python RAY_PYTHON=.venv-ray/bin/python SCHEMATHESIS=.venv-schemathesis/bin/st \
		$(BIN)/python -m pytest -m ecosystem

lint: $(INSTALLED) ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

man: $(INSTALLED) ## Write the manual page from the commands.
	$(BIN)/gpt2-bundle man > docs/gpt2-bundle.1

clean: ## Remove what was built and installed (dist/ stays).
	rm -rf .venv .venv-* .node-* runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
