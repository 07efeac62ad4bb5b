# Every target sets up what it needs. VENV=DIR puts the virtual environment elsewhere, PYTHON=... names the Python
# that makes it (3.11 to 3.14), PINNED=1 takes ColossalAI's own torch 2.5.1 and transformers 4.51.3 (Python 3.10 to 3.12).
ifdef PINNED
VENV ?= .venv-pinned
SET = --pinned
else
VENV ?= .venv
endif
PYTHON ?= python3
BIN = $(abspath $(VENV))/bin

# ColossalAI's launcher starts a bare `torchrun`, so the environment's programs come first. The checkout comes before
# an installed coati, so that an environment shared by several checkouts always runs this one.
# Imports are compiled once: where the variable is set, every process would compile torch and transformers anew.
RUN = PYTHONDONTWRITEBYTECODE= PATH="$(BIN):$$PATH" PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"
PYTEST = $(RUN) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 WANDB_MODE=offline "$(BIN)/python" -m pytest

.PHONY: help demo demo-preferences demo-rlhf prove-preferences prove-ppo prove-tools prove-online-dpo prove-qlora prove-distillation prove-best-of prove-ilql test test-fast test-long bench bench-peers bench-gpu lint docs models-table venv package site

help:
	@echo "make demo         fine-tune a small chat model on this machine and talk to it before and after"
	@echo "make demo-preferences   a reward model and a DPO policy, each measured on pairs it has not seen"
	@echo "make demo-rlhf    SFT, reward model and PPO, one after the other, on real prompts"
	@echo "make prove-preferences  a reward model on more pairs, for hours: it ranks more than 0.75 of unseen ones"
	@echo "make prove-ppo    PPO and GRPO learn what can be checked, ten seeds of ten, with their curves"
	@echo "make prove-tools  GRPO learns to ask a calculator, on ten seeds"
	@echo "make prove-online-dpo   online DPO learns what can be checked, ten seeds of ten"
	@echo "make prove-qlora  LoRA on a base of 4 or 8 bits beside LoRA, on SmolLM2: is its loss within 2%?"
	@echo "make prove-distillation a student of half SmolLM2's depth learns more from it than from rows alone"
	@echo "make prove-best-of  the best of 8 responses beats a single one, with its interval"
	@echo "make prove-ilql   ILQL on random walks: it beats behavior cloning, five seeds of five"
	@echo "make test         the tests (test-fast: without the plugin matrix; test-long: the slow ones too)"
	@echo "make bench        speed and memory of this machine (bench-peers: beside TRL; bench-gpu: of an NVIDIA GPU)"
	@echo "make lint docs    style, format and types; the generated pages of docs/"
	@echo "make site         docs/ as a website in site/, built in an environment of its own, .venv-site"
	@echo "make models-table docs/models.md: every model family under every plugin, tried anew; 15 minutes"
	@echo "make venv         only the environment, .venv or VENV=DIR"
	@echo "make package      wheel and source archive in dist/"
	@echo "PINNED=1          any of these with torch 2.5.1 and transformers 4.51.3, in .venv-pinned: make test-fast PINNED=1"

venv:
	@$(PYTHON) tools/venv.py "$(VENV)" $(SET)

demo: venv
	@$(RUN) bash examples/demo/demo.sh

demo-preferences: venv
	@$(RUN) bash examples/demo/demo_preferences.sh

demo-rlhf: venv
	@$(RUN) bash examples/demo/demo_rlhf.sh

prove-preferences: venv
	@$(RUN) bash examples/demo/prove_preferences.sh

prove-ppo: venv
	@$(RUN) bash examples/demo/prove_ppo.sh

prove-tools: venv
	@$(RUN) "$(BIN)/python" examples/demo/prove_tools.py --seeds 10

prove-online-dpo: venv
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(RUN) "$(BIN)/python" examples/demo/prove_online.py online_dpo \
		--seeds "$${SEEDS:-10}"

prove-qlora: venv
	@$(RUN) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} "$(BIN)/python" examples/demo/prove_qlora.py

prove-distillation: venv
	@$(RUN) "$(BIN)/python" examples/demo/prove_distillation.py

prove-best-of: venv
	@$(RUN) bash examples/demo/prove_best_of.sh

prove-ilql: venv
	@$(RUN) "$(BIN)/python" examples/demo/prove_ilql.py --seeds 5

test: venv
	@$(PYTEST) -m "not slow"

test-fast: venv
	@$(PYTEST) -m "not slow and not matrix"

test-long: venv
	@$(PYTEST)

bench: venv
	@$(RUN) "$(BIN)/python" -m coati bench all

bench-peers: venv
	@$(RUN) bash benchmarks/bench_peers.sh

bench-gpu: venv
	@$(RUN) "$(BIN)/python" benchmarks/bench_gpu.py

lint: venv
	@$(RUN) "$(BIN)/ruff" check .
	@$(RUN) "$(BIN)/ruff" format --check --quiet .
	@$(RUN) "$(BIN)/python" -m mypy

docs: venv
	@$(RUN) "$(BIN)/python" -m tools.write_docs

# The wheel is built from the source archive, so that neither lacks what it needs.
package: venv
	@"$(BIN)/python" -m build --no-isolation --outdir dist .

# NO_MKDOCS_2_WARNING: the theme advertises its successor otherwise. No --quiet: it would hide the warnings from --strict.
site:
	@$(PYTHON) tools/venv.py .venv-site --site
	@NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs build --strict --site-dir site
	@echo "site/index.html is the start page; the search needs a server: $(PYTHON) -m http.server --directory site"

models-table: venv
	@$(RUN) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$(BIN)/python" -m tests.models_table
