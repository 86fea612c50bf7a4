# make repro    environment, model and data, the whole pipeline, what it found
# make test     environment, tests
# make test-next  the tests of models, again with the transformers of requirements-next.txt
# make lint     ruff, pyright and the rooms' contract
# make ui       the runs in MLflow's UI on 127.0.0.1 (PORT=5000)
# make bench    the project's own timings
# make faults   kill processes at random moments, run them again, count what is wrong (MOMENTS=30)
# make readme   the generated blocks of README.md and docs/
# make lock     requirements.txt anew from pyproject.toml
# make clean    remove the environment and the caches; data, models, results and runs stay
#
# VENV=/path/to/environment uses one that is already there, as it is.
# PYTHON=/path/to/python3.11 chooses the interpreter that .venv is made with.

VENV ?= .venv
PORT ?= 5000
MOMENTS ?= 30
PYTHON ?=
UV := uv==0.13.9

# Stages are started by DVC and MLflow as plain `python`: it must be the environment's.
IN_ENV := PATH="$(abspath $(VENV))/bin:$$PATH"

# $(call find_python): sets `python` to the first interpreter that runs, is 3.11 or 3.12 and can
# make an environment. A name on PATH may be a launcher for a version that is not installed, or the
# environment that is about to be replaced: its base interpreter is what counts.
define find_python
for name in $(PYTHON) python3.11 python3.12 python3 python; do \
  python=$$($$name -c 'import ensurepip, os, sys, venv; v = sys.version_info[:2]; \
print(os.path.join(sys.base_prefix, "bin", "python%d.%d" % v)) if v in [(3, 11), (3, 12)] else 0' \
    2>/dev/null) && [ -x "$$python" ] && break; \
  python=; \
done; \
if [ -z "$$python" ]; then \
  echo "make: no Python 3.11 or 3.12 that can make an environment among $(PYTHON) python3.11" \
    "python3.12 python3 python: install one, or name it with PYTHON=/path/to/python3.11" >&2; \
  exit 1; \
fi
endef

.PHONY: env repro test test-next lint ui bench faults readme lock clean

ifeq ($(origin VENV),file)
# The list that was installed is the stamp: equal contents install nothing, whatever the dates.
env:
	@cmp -s requirements.txt $(VENV)/installed.txt && exit 0; \
	$(find_python); \
	echo "Installing into $(VENV) with $$python: about 3 GB to download and 7 GB on disk;" \
	  "3 minutes from a nearby mirror, 10 or more over a slow line."; \
	$$python -m venv --clear $(VENV) \
	&& $(VENV)/bin/python -m pip install --no-input --no-deps -r requirements-hashed.txt \
	&& $(VENV)/bin/python -m pip check \
	&& cp requirements.txt $(VENV)/installed.txt \
	&& echo "Installed."
else
env:
	@$(VENV)/bin/python -c '' || { echo "make: VENV=$(VENV) is no environment: its bin/python does not run" >&2; exit 1; }
endif

repro: env
	@echo "Model and data, verified, then the pipeline: each stage says what it does."
	@$(IN_ENV) python -m sparc3 main
	@$(IN_ENV) python -m sparc3 committed || true
	@$(IN_ENV) python -m sparc3 show

test: env
	$(IN_ENV) python -m pytest --numprocesses 2 --dist loadfile

# An environment upon the other one: what it installs comes before what is there.
NEXT_TESTS := models lrp prune generate likelihood export bad_models check
test-next: env
	@cmp -s requirements-next.txt .next/installed.txt \
	|| { $(VENV)/bin/python -m venv --clear --without-pip .next \
	&& $(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$(.next/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth \
	&& .next/bin/python -m pip install --quiet --no-input --no-deps -r requirements-next.txt \
	&& cp requirements-next.txt .next/installed.txt; }
	@$(IN_ENV) MLFLOW_TRACKING_URI=sqlite:///.next/mlflow.db \
	  python -m sparc3 fetch 2> /dev/null  # which transformers 5 cannot: it converts GGUF
	.next/bin/python -m pytest --numprocesses 2 --dist loadfile \
	  $(NEXT_TESTS:%=tests/test_%.py)

lint: env
	$(IN_ENV) ruff check .
	$(IN_ENV) ruff format --check .
	$(IN_ENV) lint-imports --no-cache
	$(IN_ENV) PYRIGHT_PYTHON_IGNORE_WARNINGS=1 pyright --pythonpath $(VENV)/bin/python

ui: env
	@$(IN_ENV) python -m sparc3 ui --port $(PORT)

bench: env
	$(IN_ENV) python -m benchmarks

faults: env
	$(IN_ENV) PYTHONPATH=.:tests python -m faults --moments $(MOMENTS)

readme: env
	$(IN_ENV) python -m sparc3 readme

# What is locked already stays where it is, unless pyproject.toml says otherwise. requirements.txt is
# the lock without the digests of its files, which pip takes with --no-deps only, and MLflow and
# conda do not say that. MLflow names a conda environment by the digest of conda.yaml alone, so
# conda.yaml carries the digest of the lock.
lock:
	@$(find_python); \
	$$python -m venv --clear .lock \
	&& .lock/bin/python -m pip install --quiet $(UV) \
	&& .lock/bin/uv pip compile --quiet --universal --python-version 3.11 --all-extras --group dev --no-annotate \
	  --generate-hashes --custom-compile-command "make lock" pyproject.toml -o requirements-hashed.txt \
	&& sed -E '/^ +--hash=/d; s/ \\$$//' requirements-hashed.txt > requirements.txt \
	&& digest=$$($$python -c 'import hashlib; print(hashlib.sha256(open("requirements.txt", "rb").read()).hexdigest())') \
	&& sed -i.bak "s/^# sha256 of requirements.txt: .*/# sha256 of requirements.txt: $$digest/" conda.yaml \
	&& rm -rf conda.yaml.bak .lock

clean:
	rm -rf .venv .next .lock .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
