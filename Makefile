# Everything is installed into $(VENV), inside the repository; `make` alone lists the targets.
# To choose another Python:      make setup PYTHON=/path/to/python3.12
# To choose another place:       make test VENV=/path/to/a/new/folder

SHELL = /bin/sh
VENV = .venv
PYTHON ?=
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip --disable-pip-version-check --no-input
UV = uv
RECIPE = mnist
WORKSPACE = .
RESULTS = results/reproduce
ARGS =

# The stamp is written last and holds the repository's path. Without it the folder is half finished: the next make
# starts it over. A copied or moved repository does the same, because a virtual environment holds absolute paths.
STAMP = $(VENV)/.complete
OURS = $(VENV)/.made-by-make
DONE = $(shell [ -x "$(RUN)" ] && cat "$(STAMP)" 2>/dev/null)
CANDIDATES = $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11)

# Settings of the caller's shell that would lead Python out of $(VENV).
unexport PYTHONPATH PYTHONHOME

.PHONY: help setup demo reproduce test test-long lab lock clean-runs
.DEFAULT_GOAL = help

help:
	@echo "make demo                  train, attack and purify: the recipe mnist, into $(WORKSPACE)/runs"
	@echo "make demo RECIPE=cifar10   another recipe (notebooks/recipes); WORKSPACE=DIR puts its results elsewhere"
	@echo "make reproduce             AT, AP and AToP on CIFAR-10, for one GPU; ARGS='--minutes 9' in stages, ARGS=--smoke anywhere"
	@echo "make test                  run the tests, the notebooks included"
	@echo "make test-long             those that take long: kills, Slurm, the browser, third-party attacks at length"
	@echo "make lab                   JupyterLab on copies of the notebooks in lab/ (delete one to get it afresh)"
	@echo "make clean-runs            remove replaced results and leftovers in $(WORKSPACE)/runs"
	@echo "make setup                 install into $(VENV) only (the others do it when needed); PYTHON=PATH to choose"
	@echo "make lock                  compile requirements.lock again after a change in pyproject.toml (needs uv)"

setup: $(STAMP)
	@echo "$(VENV) is ready: $$($(RUN) --version)"

demo: $(STAMP)
	@$(RUN) -m atoplib.batch "$(RECIPE)" --workspace "$(WORKSPACE)" $(ARGS)

# Files side by side, one thread each; ARGS="-n 0 tests/test_attacks.py" runs one file as usual.
TEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test: $(STAMP)
	@$(TEST) -m "not long" $(ARGS)

test-long: $(STAMP)
	@$(TEST) -m long $(ARGS)

reproduce: $(STAMP)
	@$(RUN) -m atoplib.batch reproduce --workspace "$(WORKSPACE)" --results "$(RESULTS)" $(ARGS)

# Results that were replaced, which every run keeps, and what killed processes left half written.
clean-runs:
	@find "$(WORKSPACE)/runs" \( -name 'superseded-*' -o -name '.*.part' -mmin +60 \) -prune -print -exec rm -r {} +

# On copies, so that running a notebook changes nothing that is tracked; a copy that is there stays as it was left.
# Without the question about Jupyter's news, which covers the first picture.
lab: $(STAMP)
	@mkdir -p lab && for notebook in notebooks/*.ipynb; do [ -e "lab/$${notebook##*/}" ] || cp "$$notebook" lab; done
	@[ -e "$(VENV)/etc/jupyter/labconfig/page_config.json" ] || { mkdir -p "$(VENV)/etc/jupyter/labconfig" && \
	    echo '{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}' > "$(VENV)/etc/jupyter/labconfig/page_config.json"; }
	@$(RUN) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/lab/00_start.ipynb --LabApp.news_url=None $(ARGS)

ifneq ($(DONE),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): requirements.lock pyproject.toml
	@set -e; \
	if [ "$(DONE)" = "$(CURDIR)" ] && "$(RUN)" -c "" 2>/dev/null; then \
	    echo "The pinned packages have changed: bringing $(VENV) up to date."; \
	    rm -f "$(STAMP)"; \
	else \
	    if [ -n "$(DONE)" ] && [ "$(DONE)" != "$(CURDIR)" ] && [ -e "$(DONE)/pyproject.toml" ]; then \
	        echo "$(VENV) belongs to $(DONE): choose another with VENV=DIR." >&2; \
	        exit 1; \
	    fi; \
	    if [ -n "$$(ls -A "$(VENV)" 2>/dev/null)" ] && [ ! -e "$(OURS)" ]; then \
	        echo "$(VENV) exists and was not made by this Makefile: remove it, or choose another with VENV=DIR." >&2; \
	        exit 1; \
	    fi; \
	    found=""; without_venv=""; \
	    for python in $(CANDIDATES); do \
	        "$$python" -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" >/dev/null 2>&1 \
	            || continue; \
	        "$$python" -c "import ensurepip, venv" >/dev/null 2>&1 && { found="$$python"; break; }; \
	        without_venv="$${without_venv:-$$python}"; \
	    done; \
	    if [ -z "$$found" ] && [ -n "$$without_venv" ]; then \
	        version=$$("$$without_venv" -c "import sys; print('python%d.%d' % sys.version_info[:2])"); \
	        echo "$$without_venv cannot make virtual environments: its module ensurepip is missing." >&2; \
	        echo "On Debian and Ubuntu: sudo apt install $$version-venv (then run make again)." >&2; \
	        exit 1; \
	    fi; \
	    if [ -z "$$found" ]; then \
	        echo "No suitable Python: 3.11, 3.12 or 3.13 is needed, and none of these is one: $(CANDIDATES)." >&2; \
	        echo "Install one, or name one: make setup PYTHON=/path/to/python3.12" >&2; \
	        exit 1; \
	    fi; \
	    echo "Installing the pinned packages into $(VENV) with $$("$$found" --version)," \
	         "once: about 4 minutes on 2 cores, 6 GB of disk."; \
	    rm -rf "$(VENV)"; mkdir -p "$(VENV)"; touch "$(OURS)"; \
	    "$$found" -m venv "$(VENV)"; \
	fi; \
	if $(PIP) install --quiet --no-deps -r requirements.lock \
	   && $(PIP) install --quiet --no-deps --no-build-isolation -e . \
	   && $(RUN) -c "import torch, torchvision, jupyterlab, papermill"; \
	then printf '%s\n' "$(CURDIR)" > "$@"; \
	else \
	    echo "The installation did not finish (see above). Run make again: it starts over; downloads are cached." >&2; \
	    exit 1; \
	fi

# The old lock is the starting point, so that only what must change does; ARGS=--upgrade takes the newest of everything.
lock:
	@command -v "$(UV)" >/dev/null || { echo "uv is not installed: pip install uv, or UV=/path/to/uv" >&2; exit 1; }
	@set -e; new=$$(mktemp); trap 'rm -f "$$new"' EXIT; \
	cp requirements.lock "$$new"; \
	"$(UV)" pip compile --quiet --universal --extra test --python-version 3.11 --no-annotate --no-header --no-emit-index-url \
	    $(ARGS) pyproject.toml -o "$$new"; \
	{ sed '/^[^#]/,$$d' requirements.lock; cat "$$new"; } > requirements.lock.new; \
	mv requirements.lock.new requirements.lock
