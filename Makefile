# Two commands do everything on a fresh machine:
#   make demo   run the main job on a real small model and real text, on the CPU (about ten minutes)
#   make test   lint, types and tests
# Each makes its own virtual environment the first time; later calls are quick.

PYTHON ?= python3
DEMO ?= .demo
# One thread per training process and no spinning: two processes share two cores better than one process does.
QUIET = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1

.PHONY: demo test lint types unit clean

comma := ,
# $(call environment,folder,extras): torch first, so that nothing else chooses a build of it.
define environment
$(1)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet "$$$$(grep '^torch==' constraints.txt)"
	$(1)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$(2)]"
	touch $$@
endef
$(eval $(call environment,.venv-demo,demo))
$(eval $(call environment,.venv-test,full$(comma)postgres$(comma)test))

demo: .venv-demo/.ready
	$(QUIET) .venv-demo/bin/python jobs/quickstart/prepare.py --out $(DEMO)
	$(QUIET) .venv-demo/bin/duet run $(DEMO)/study.yaml

test: lint types unit

lint: .venv-test/.ready
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .

types: .venv-test/.ready
	.venv-test/bin/mypy

unit: .venv-test/.ready
	$(QUIET) .venv-test/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf .venv-demo .venv-test $(DEMO) studies build *.egg-info
