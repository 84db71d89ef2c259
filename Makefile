# Every target sets up what it needs: a fresh clone can start with any of them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install readers quickstart talks test test-all check bench gpu docs clean

help:
	@echo "make quickstart   train a small model on real text, sample from it, export it (a few minutes)"
	@echo "make talks        finetune it to answer questions about lines of Python, and count its right answers"
	@echo "make test         every kind of test"
	@echo "make test-all     every test grid whole"
	@echo "make readers      llama.cpp and CTranslate2 for make test-all (llama.cpp compiles for minutes)"
	@echo "make check        ruff, basedpyright, import-linter"
	@echo "make bench        benchmarks beside peers"
	@echo "make gpu          checks and speeds of a GPU, eight minutes; without one in tiny sizes"
	@echo "make docs         write the generated reference pages"
	@echo "make install      only set up .venv"

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmtrain needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(STAMP)

# The quickstart trains on text that every machine with Python has: the standard library's own source.
QS := quickstart
STDLIB = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
QS_TEXT = '$(STDLIB)/*.py' '$(STDLIB)/asyncio/*.py' '$(STDLIB)/email/*.py' '$(STDLIB)/json/*.py' '$(STDLIB)/unittest/*.py'
RUN := $(QS)/runs/quickstart

$(QS)/tokenizer.model: | $(STAMP)
	@mkdir -p $(QS)
	$(BIN)/llmtrain data tokenizer $(QS_TEXT) $@ --vocab-size 2048

$(QS)/data/train/manifest.json: $(QS)/tokenizer.model
	$(BIN)/llmtrain data shards $(QS_TEXT) $(QS)/data --tokenizer $< --valid-fraction 0.1 --overwrite

quickstart: $(STAMP) $(QS)/data/train/manifest.json
	$(BIN)/llmtrain train configs/runs/quickstart.yaml
	$(BIN)/llmtrain report $(RUN)
	$(BIN)/llmtrain export $(RUN) $(QS)/export --to hf --overwrite
	$(BIN)/llmtrain generate $(QS)/export --prompt 'def __init__(self' --temperature 0.7 --top-p 0.95 --max-tokens 80
	@printf '%s\n' "" \
	  "Done. The text above was written by the model that you have just trained." \
	  "  run folder      $(RUN)  (metrics.jsonl, checkpoints, logs)" \
	  "  report          $(RUN)/report.html  (open it in a browser)" \
	  "  Hugging Face    $(QS)/export  (AutoModelForCausalLM.from_pretrained loads it)" \
	  "Next:" \
	  "  . $(BIN)/activate" \
	  "  llmtrain generate $(RUN) --prompt 'import '" \
	  "  llmtrain train configs/runs/quickstart.yaml train.steps=600      # go on training" \
	  "  llmtrain train configs/runs/quickstart.yaml name=mine seed=7     # another run; then: llmtrain report $(RUN) $(QS)/runs/mine"

# What docs/finetuning-example.md tells, on the text of the quickstart; asyncio's lines are those it is asked about.
TEXTS := $(BIN)/python docs/examples/code_texts.py

talks: quickstart
	$(TEXTS) chats $(QS)/chats.jsonl $(STDLIB)/*.py $(STDLIB)/email/*.py $(STDLIB)/json/*.py $(STDLIB)/unittest/*.py
	$(TEXTS) questions $(QS)/questions.jsonl $(STDLIB)/asyncio/*.py
	$(BIN)/llmtrain data chat $(QS)/chats.jsonl $(QS)/talks --tokenizer $(QS)/tokenizer.model --template chatml --grow --overwrite
	$(BIN)/llmtrain train docs/examples/line_talks.yaml
	$(BIN)/llmtrain generate $(QS)/runs/line-talks --prompts $(QS)/questions.jsonl --out $(QS)/answers.jsonl --temperature 0 --max-tokens 32 --overwrite
	$(TEXTS) score $(QS)/answers.jsonl

# Two tests side by side, a thread each (docs/design/parallel-tests.md): most start ranks or commands, and wait for them.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist worksteal --durations 20

# Programs that read exports, each in a folder of its own so that none changes what the project itself uses.
READERS := $(VENV)/readers
INTO = $(BIN)/pip install --quiet --upgrade --no-deps --target

$(READERS)/transformers/.installed: | $(STAMP)
	-$(INTO) $(@D) 'transformers>=4.57,<4.58' 'tokenizers>=0.22,<0.23' 'huggingface_hub>=0.34,<1' && touch $@

# Not beside the project's own packages: transformers imports it where it finds it, whether or not anything needs it.
$(READERS)/torchao/.installed: | $(STAMP)
	-$(INTO) $(@D) 'torchao>=0.18' && touch $@

# What rules of data pipelines are compared with: 18 MB, and what its filters import. Of its own needs, most are others'.
$(READERS)/datatrove/.installed: | $(STAMP)
	-$(INTO) $(@D) 'datatrove>=0.10,<0.11' 'loguru>=0.7' 'humanize>=4' && touch $@

# The judge of adapters: 7 MB, in a process of its own. What it needs is the project's already.
$(READERS)/peft/.installed: | $(STAMP)
	-$(INTO) $(@D) 'peft>=0.21,<0.22' && touch $@

# The judge of quantized models, 2 MB: transformers imports it where a config.json asks for it.
$(READERS)/compressed_tensors/.installed: | $(STAMP)
	-$(INTO) $(@D) 'compressed-tensors>=0.20,<0.21' 'loguru>=0.7' && touch $@

# The extra `onnx`, 130 MB, and what it needs that the project does not have.
$(READERS)/onnx/.installed: | $(STAMP)
	-$(INTO) $(@D) 'onnx>=1.19' 'onnxscript>=0.5.4' 'onnxruntime>=1.23' onnx_ir ml_dtypes flatbuffers && touch $@

# The judge of evaluations and the extra `eval`, 330 MB, in a process of its own; with what the project does not have.
$(READERS)/lm_eval/.installed: | $(STAMP)
	-$(INTO) $(@D) 'lm-eval>=0.4.13,<0.5' 'datasets>=2.16' evaluate multiprocess dill scikit-learn scipy joblib \
	  threadpoolctl cloudpickle narwhals nltk rouge-score sacrebleu portalocker tabulate colorama sqlitedict \
	  pytablewriter DataProperty mbstrdecoder pathvalidate tabledata tcolorpy typepy word2number more-itertools \
	  'chardet<7' && touch $@

# The judge of bottleneck adapters, 3 MB; it needs transformers 4, which it is given.
$(READERS)/adapters/.installed: | $(STAMP)
	-$(INTO) $(@D) 'adapters>=1.3,<1.4' && touch $@

# The extra `gguf`, 100 MB, and llama.cpp's own reader and writer of its files.
$(READERS)/gguf/.installed: | $(STAMP)
	-$(INTO) $(@D) 'xllamacpp>=2026.7' 'gguf>=0.19' && touch $@

$(READERS)/ctranslate2/.installed: | $(STAMP)
	$(INTO) $(@D) 'ctranslate2>=4.6'
	touch $@

$(READERS)/datasketch/.installed: | $(STAMP)
	-$(INTO) $(@D) 'datasketch>=2' scipy && touch $@

# The source package has llama.cpp and its converter in it.
$(READERS)/llama.cpp/.installed: | $(STAMP)
	rm -rf $(@D) $(READERS)/source && mkdir -p $(READERS)/source
	$(BIN)/pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(READERS)/source 'llama-cpp-python>=0.3'
	tar -xzf $(READERS)/source/llama_cpp_python-*.tar.gz -C $(READERS)/source
	mv $(READERS)/source/llama_cpp_python-*/vendor/llama.cpp $(@D)
	touch $@

$(READERS)/llama_cpp/.installed: $(READERS)/llama.cpp/.installed
	CMAKE_ARGS='-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF' \
	  $(INTO) $(@D) $(READERS)/source/llama_cpp_python-*.tar.gz diskcache
	touch $@

# Where one cannot be had (no compiler, no network), its tests are skipped and say so.
readers: $(READERS)/transformers/.installed $(READERS)/torchao/.installed $(READERS)/datatrove/.installed \
  $(READERS)/datasketch/.installed $(READERS)/peft/.installed $(READERS)/adapters/.installed $(READERS)/lm_eval/.installed \
  $(READERS)/gguf/.installed $(READERS)/compressed_tensors/.installed $(READERS)/onnx/.installed
	-$(MAKE) $(READERS)/ctranslate2/.installed
	-$(MAKE) $(READERS)/llama_cpp/.installed

test: $(STAMP) $(READERS)/transformers/.installed $(READERS)/torchao/.installed $(READERS)/datatrove/.installed \
  $(READERS)/peft/.installed $(READERS)/gguf/.installed $(READERS)/compressed_tensors/.installed $(READERS)/onnx/.installed
	$(PYTEST) -m 'not whole_grid'

test-all: $(STAMP) readers
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

bench: $(STAMP) $(READERS)/datatrove/.installed $(READERS)/datasketch/.installed $(READERS)/peft/.installed \
  $(READERS)/onnx/.installed $(READERS)/gguf/.installed
	$(BIN)/python -m tests.benchmarks

# On a machine with a GPU eight minutes; elsewhere the same in tiny sizes.
gpu: $(STAMP) $(READERS)/torchao/.installed
	PYTHONPATH=$(READERS)/torchao $(BIN)/python -m tests.gpu --out gpu.json

docs: $(STAMP)
	$(BIN)/python -m docs.generate

clean:
	rm -rf $(VENV) build dist *.egg-info
