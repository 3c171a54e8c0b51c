# On a machine with Python 3.11+ and nothing else: `make demo` runs the main job, `make test` the tests.
# Relative paths only: the checkout may lie in a folder with spaces.
PYTHON ?= python3
CORPUS ?=

.PHONY: demo test quick lint test-all lock clean

demo: .venv/installed
	.venv/bin/tvq demo $(if $(CORPUS),--corpus "$(CORPUS)")

# A file's tests stay together, on one of two processes: many of them wait for what they started.
# In the order of the folders: the longest files are not the last, which one process would end alone.
test: .venv/installed lint
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Seconds to a verdict while editing: no Ray, no MLflow server.
quick: .venv/installed lint
	.venv/bin/python -m pytest -m "not (ray or tracking or compiles or slow or cluster or browser)" -x -q

test-all: .venv/installed lint
	.venv/bin/python -m pytest -m ""

lint: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/basedpyright

# One lock for Python 3.11 to 3.13, and one for each image: versions and hashes, no addresses.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet uv
	build/lock/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate --no-header --output-file requirements.lock
	for image in "cpu --extra server" "gpu --extra gpu" "tpu --extra tpu"; do set -- $$image; \
		build/lock/bin/uv pip compile pyproject.toml $$2 $$3 --constraint requirements.lock \
		--python-version 3.12 --python-platform x86_64-manylinux_2_36 \
		--generate-hashes --no-emit-index-url --no-annotate --no-header \
		--output-file infra/image/$$1.lock || exit 1; done

# One virtual environment for everything, from the lock; pip takes about two minutes for 1.7 GB.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "tvq needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	@echo "installing the locked packages into .venv (1.7 GB, about two minutes)"
	.venv/bin/python -m pip install --quiet --require-hashes --requirement requirements.lock
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf .venv demo dist build
