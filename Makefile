# make demo   clips by the models that ship           make test   everything the tests need, and the tests
# make lint   ruff                                  make train  the small model, from nothing: hours, resumed
# make gpu      on a CUDA machine, by its own python: tests and figures in nine minutes; then REST=1: what failed or was
#               cut, in four; LIMIT=SECONDS, RESULTS=DIR, PART=NAME; DRY=1 walks through it here, without a GPU
# make faults   processes killed at random moments, two on one folder, thousands of damaged files: figures of each; then make fuzz
# make findings [DEVICE=cuda] [AGAIN=DIR]   the paper's findings in the small world: docs/findings.md, or all of it anew
#               in DIR; hours, resumed
# make trials [DEVICE=cuda]     what moves fidelity most in short runs: docs/trials.md; hours, resumed
# make large    one step of the whole G/2-T2V on the CPU, plain against shared: 12 GB of memory
# make report   docs/performance.md, README's headline table and the table of docs/scaling.md, from bench/results
# make api      docs/api.md, from the docstrings          make picture   docs/clips.png
# make study    people judge the model that ships at two guidance values: docs/study.md
# make sanitize   the C++ operators and runtime under AddressSanitizer and UndefinedBehaviorSanitizer
# make ray    200 clips on a Ray cluster of two nodes here, one of them or a worker killed: equal to one process, to the
#             byte; the same for latents, replicas that come and go, and clips by HTTP: 16 minutes
# make nodes  training over two nodes, namespaces of this machine, one of them lost: needs root, sshd and pdsh
# make fuzz   100,000 hostile files for the runtime under both, 6 minutes; FUZZ=another number
# make soak    a load test of the server, 10 minutes: nothing lost, nothing wrong, memory flat; MINUTES=another number
# make pretend [TRITON=3.6.0]   every graph, block and kernel compiled for a GPU that is not there, by that Triton; its launches
# make kernels  registers, spills and shared memory of every Triton kernel, compiled without a GPU
# make host   what a call costs the host beside PyTorch's calls, the launch stubbed
# make predictions   docs/predictions.md: what their machine code lets expect of an H200

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test faults lint train pretend kernels predictions host gpu large soak report api picture study sanitize fuzz ray nodes findings trials clean

demo: .venv/run
	$(BIN)/python -m gentron_fast.generate "a red circle moving left" --grid
	$(BIN)/python -m gentron_fast.generate "a red circle moving left" --grid --fast --out outputs/fast/

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/pytest

faults: .venv/dev
	FAULTS=20 $(BIN)/pytest -m faults
	$(MAKE) fuzz

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

train: .venv/dev
	$(BIN)/python -m gentron_train.shipped

DEVICE ?= cpu
findings: .venv/dev
	$(BIN)/python -m gentron_train.findings --device $(DEVICE) $(if $(AGAIN),--results $(AGAIN)/results \
	    --out $(AGAIN)/runs --document $(AGAIN)/findings.md)

trials: .venv/dev
	$(BIN)/python -m gentron_train.trials --device $(DEVICE)

gpu: $(if $(DRY),.venv/dev)
	@$(if $(DRY),$(BIN)/python,$(PYTHON)) bench/gpu.py $(if $(PART),--part $(PART)) $(if $(RESULTS),--results $(RESULTS)) \
	    $(if $(LIMIT),--limit $(LIMIT)) $(if $(REST),--rest) $(if $(DRY),--dry)

ray: .venv/dev
	RAY_PROMPTS=200 $(BIN)/pytest --durations=10 tests/train/data/test_on_ray.py

nodes: .venv/dev
	NODES=1 $(BIN)/pytest -s -rs tests/train/test_nodes.py

large: .venv/dev
	$(BIN)/python bench/large.py

MINUTES ?= 10
soak: .venv/dev
	$(BIN)/python bench/soak.py $(MINUTES)

report: .venv/dev
	$(BIN)/python bench/report.py
	$(BIN)/python bench/scale.py

picture: .venv/dev
	$(BIN)/python -m gentron_train.small_world.picture

api: .venv/dev
	$(BIN)/python docs/api.py

STUDY := outputs/study
study: .venv/dev
	$(BIN)/python -m gentron_fast.generate --prompts docs/study-prompts.txt --lambda-t 3 --out $(STUDY)/lambda-3/
	$(BIN)/python -m gentron_fast.generate --prompts docs/study-prompts.txt --lambda-t 7.5 --out $(STUDY)/lambda-7.5/
	test -e $(STUDY)/pairs || $(BIN)/python -m gentron_fast.study make $(STUDY)/lambda-3 $(STUDY)/lambda-7.5 \
	    --prompts docs/study-prompts.txt --names "λ_T 3" "λ_T 7.5" --out $(STUDY)/pairs
	$(BIN)/python -m gentron_fast.study serve $(STUDY)/pairs

# What stubs Triton's launches needs a process that sees no GPU. Not the interpreted ones: the
# interpreter of an older Triton does not take every numpy.
LAUNCH_TESTS := $(foreach name,launch kept_launches predictions,tests/kernels/test_$(name).py)
# Another Triton than the installed one lies in a folder of its own, before it in the path.
pretend: .venv/dev $(if $(TRITON),build/triton-$(TRITON)/triton)
	FULL=1 PYTHONPATH=$(if $(TRITON),build/triton-$(TRITON):)tests/shared \
	$(BIN)/python -m pretended_gpu -q --durations=10 tests/cuda
	$(if $(TRITON),PYTHONPATH=build/triton-$(TRITON)) $(BIN)/pytest -q $(LAUNCH_TESTS) -k "not interpreted"

build/triton-%/triton:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==$*

kernels: .venv/dev
	$(BIN)/python tests/kernels/aot.py

host: .venv/dev
	RESULTS=bench/results $(BIN)/pytest bench/bench_host.py --benchmark-only -q -s

OLDEST_TRITON := build/triton-3.6.0
predictions: .venv/dev $(OLDEST_TRITON)/triton
	$(BIN)/python tests/kernels/predictions.py
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python tests/kernels/predictions.py --add

# What throws must find libstdc++ loaded when the sanitizers start. -s: pytest would swallow what
# they report before they end the process. The sampler that the tests load is compiled without them.
SANITIZERS = $(shell g++ -print-file-name=libasan.so):$(shell g++ -print-file-name=libstdc++.so)
SANITIZED := build/sanitize
SANITIZER_OPTIONS := ASAN_OPTIONS=detect_leaks=0:max_allocation_size_mb=4096 UBSAN_OPTIONS=print_stacktrace=1
OPERATOR_TESTS := $(foreach name,layernorm_modulate temporal_attention guided_step linear,tests/kernels/test_$(name).py)
sanitize: $(SANITIZED)/built
	$(BIN)/python -m gentron_fast.export --whole --steps 20 --batch 3 --out $(SANITIZED)/clip.gentron
	GENTRON_LIBRARY=$(SANITIZED)/gentron_kernels/libgentron.so GENTRON_RUNTIME=$(SANITIZED)/gentron_fast \
	GENTRON_PACKAGE=$(SANITIZED)/clip.gentron LD_PRELOAD=$(SANITIZERS) $(SANITIZER_OPTIONS) \
	$(BIN)/pytest -s -x $(OPERATOR_TESTS) tests/gentron_fast/compiled -k "(cpu and not compile) or test_package or test_program or test_sampler"

FUZZ ?= 100000
fuzz: $(SANITIZED)/built
	$(SANITIZER_OPTIONS) $(BIN)/python tests/shared/hostile_files.py $(SANITIZED)/gentron_fast/gentron-fuzz $(FUZZ)

# By g++, or clang where there is no g++.
$(SANITIZED)/built: .venv/dev setup.py $(wildcard csrc/*.cpp csrc/*/*)
	CXX=$$(command -v g++ || command -v clang++) CC=$$(command -v gcc || command -v clang) GENTRON_SANITIZE=1 \
	$(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	touch $@

# torch comes first: packages that build from source look at it.
.venv/base:
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip "setuptools>=77" wheel
	$(INSTALL) torch
	touch $@

CPP := $(wildcard csrc/*.cpp csrc/*/*)

.venv/run: .venv/base setup.py pyproject.toml constraints.txt $(CPP)
	$(INSTALL) --no-build-isolation -e .
	touch $@

.venv/dev: .venv/base setup.py pyproject.toml constraints.txt $(CPP)
	$(INSTALL) --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build outputs *.egg-info
