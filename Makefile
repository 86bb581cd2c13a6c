# make demo: the pipeline from end to end on this machine.  make test: checks, and all tests but the slow ones.  Both
# set everything up first.
# make play: a page on this machine that draws images of assets/demo, or of EXPORT=runs/demo/pipeline.
# make docs: docs/ as a site, build/site/index.html.
# make demo-slurm: the same demo as jobs of a SLURM cluster that this machine plays.
.PHONY: demo demo-slurm play docs test test-slow check format setup clean
RUN := .venv/bin/python
# Where this is set, as in many containers, every process compiles anew what it imports: three times as long.
export PYTHONDONTWRITEBYTECODE :=

demo: setup
	@$(RUN) pipeline/run.py --config recipes/demo.yaml

demo-slurm: setup
	@scripts/setup.sh --slurm
	@$(RUN) -m tests.slurm_cluster bash scripts/demo_slurm.sh

play: setup
	@scripts/setup.sh --play
	@$(RUN) pipeline/play.py $(EXPORT)

docs: setup
	@scripts/setup.sh --docs
	@# Not --quiet: with it, mkdocs counts no warnings and strict fails nothing.
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build
	@echo build/site/index.html

test: check
	@scripts/setup.sh --test
	@# Worker processes with one thread each: two OpenMP threads beside another process stall one another.
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

test-slow: setup
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow

check: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-logo

format: setup
	@.venv/bin/ruff check --fix --quiet .
	@.venv/bin/ruff format --quiet .

setup:
	@scripts/setup.sh

clean:
	rm -rf data/demo runs/demo build/site
