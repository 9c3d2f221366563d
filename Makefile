# Needs Python 3.11 or newer, git and make. Everything else goes into .venv at the first use.
# Only relative paths, for make cannot deal with a space in the project's own.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
PYTHON := .venv/bin/python
TESTED := runs tools threads agents_project

# The sync keeps to .venv and to the Python that made it, whatever the caller's shell has active.
unexport VIRTUAL_ENV CONDA_PREFIX PYTHONPATH PYTHONHOME PIP_USER UV_PYTHON
export UV_PROJECT_ENVIRONMENT := .venv
export UV_PYTHON_DOWNLOADS := never

.PHONY: help demo dev test test-slow test-rabbitmq lint docs bench proof mutants clean

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: .venv/ready ## 50 tool calls, two kills, an audit of a package, on servers of its own; DEMO_ARGS="--once"
	@exec $(PYTHON) manage.py demo $(DEMO_ARGS)

dev: .venv/ready ## web, workers, beat and Flower on servers of its own, until Ctrl-C
	@exec $(PYTHON) -m agents_project.dev

test: .venv/ready ## the tests that are quick; TEST_ARGS="-k claim"
	@exec $(PYTHON) -m pytest -m "not slow and not proof and not bench and not needs_rabbitmq" $(TEST_ARGS)

# pytest answers 5 when it finds no test: none of them is slow, then, which is no failure.
test-slow: .venv/ready ## the tests that take time or kill processes
	@$(PYTHON) -m pytest -m "slow and not proof and not bench and not needs_rabbitmq" $(TEST_ARGS) || { code=$$?; [ $$code -eq 5 ] || exit $$code; }

test-rabbitmq: .venv/ready ## main job, losses and deaths over RabbitMQ, which must be installed
	@exec $(PYTHON) -m pytest -m "needs_rabbitmq and not proof and not bench" $(TEST_ARGS)

lint: .venv/ready ## style, types, imports, migrations, Django's and Longhaul's checks
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy $(TESTED) tests $(wildcard benchmarks)
	$(PYTHON) -m mypy --strict clients/python/src
	cd examples/support_desk && ../../$(PYTHON) -m mypy --cache-dir ../../.mypy_cache/support_desk .
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command as lint; lint()' --no-logo
	$(PYTHON) -W "ignore:Got an error checking:RuntimeWarning" manage.py makemigrations --check --dry-run
	$(PYTHON) manage.py check --fail-level WARNING

docs: .venv/ready ## the pages of docs/ as a site, in docs/_build/html
	$(PYTHON) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

bench: .venv/ready ## what is claimed, measured; BENCH_ARGS="--quick"
	@exec $(PYTHON) -m benchmarks $(BENCH_ARGS)

proof: .venv/ready ## the long proofs
	@exec $(PYTHON) -m pytest -m proof --timeout 1800 $(TEST_ARGS)

mutants: .venv/ready ## each rule of the protocol removed from a copy: a test must fail; MUTANTS_ARGS="--shard 1/4"
	@exec $(PYTHON) -m tests.mutants $(MUTANTS_ARGS)

clean: ## end and delete the embedded servers, their data and all caches; .venv stays
	@python=$(PYTHON); [ -x $$python ] || python=python3; $$python -m agents_project.embedded remove --all
	rm -rf docs/_build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis staticfiles
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The second sync is for networks whose proxy signs with a certificate of the house, which only the system knows.
# A Python that is only a shim for a version that is not there, or has no venv, does not count.
.venv/ready: uv.lock pyproject.toml
	@if ! $(PYTHON) -m pip --version >/dev/null 2>&1; then \
		for candidate in python3 python3.13 python3.12 python3.11 python3.14; do \
			if $$candidate -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
				>/dev/null 2>&1; then found=$$candidate; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "Python 3.11 to 3.14 with its venv module is needed (on Debian: apt install python3-venv)." >&2; exit 1; \
		fi; \
		echo "Setting up .venv with $$($$found --version)"; \
		$$found -m venv --clear .venv; \
	fi
	@[ -x .venv/bin/uv ] || $(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	@.venv/bin/uv sync --frozen --quiet 2>.venv/sync.log || \
		.venv/bin/uv sync --frozen --quiet --system-certs || { cat .venv/sync.log >&2; exit 1; }
	@touch $@
