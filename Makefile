# Every target sets up what it needs. VENV=DIR puts the virtual environment elsewhere, PYTHON=... names the Python
# that makes it (3.10 to 3.12), LATEST=1 takes torch 2.11 to 2.13 instead of ColossalAI's own 2.5.1.
ifdef LATEST
VENV ?= .venv-latest
SET = --latest
else
VENV ?= .venv
endif
PYTHON ?= python3
BIN = $(abspath $(VENV))/bin

# ColossalAI's launcher starts a bare `torchrun`, so the environment's programs come first. The checkout comes before
# an installed coati, so that an environment shared by several checkouts always runs this one.
RUN = PATH="$(BIN):$$PATH" PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"
PYTEST = $(RUN) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 WANDB_MODE=offline "$(BIN)/python" -m pytest

.PHONY: help demo demo-preferences demo-rlhf prove-preferences prove-ppo test test-fast test-long bench bench-peers lint docs venv venv-latest

help:
	@echo "make demo         fine-tune a small chat model on this machine and talk to it before and after"
	@echo "make demo-preferences   a reward model and a DPO policy, each measured on pairs it has not seen"
	@echo "make demo-rlhf    SFT, reward model and PPO, one after the other, on real prompts"
	@echo "make prove-preferences  a reward model on more pairs, for hours: it ranks more than 0.75 of unseen ones"
	@echo "make prove-ppo    PPO and GRPO learn what can be checked, ten seeds of ten, with their curves"
	@echo "make test         the tests (test-fast: without the plugin matrix; test-long: the slow ones too)"
	@echo "make bench        speed and memory of this machine (bench-peers: beside TRL)"
	@echo "make lint docs    style, format and types; the generated pages of docs/"
	@echo "make venv         only the environment, .venv or VENV=DIR"
	@echo "make venv-latest  the same with torch 2.11 to 2.13 in .venv-latest; then: make test-fast LATEST=1"

venv:
	@$(PYTHON) tools/venv.py "$(VENV)" $(SET)

venv-latest:
	@$(MAKE) --no-print-directory venv LATEST=1

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

test: venv
	@$(PYTEST) -m "not slow"

test-fast: venv
	@$(PYTEST) -m "not slow and not matrix"

test-long: venv
	@$(PYTEST)

bench: venv
	@$(RUN) bash benchmarks/bench.sh

bench-peers: venv
	@$(RUN) bash benchmarks/bench_peers.sh

lint: venv
	@$(RUN) "$(BIN)/ruff" check .
	@$(RUN) "$(BIN)/ruff" format --check --quiet .
	@$(RUN) "$(BIN)/python" -m mypy

docs: venv
	@$(RUN) "$(BIN)/python" -m tools.write_docs
