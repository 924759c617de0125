# make run   installs into .venv/ and runs the whole recipe (ARGS="scale=... data.sources=[~/docs]" to override)
# make test  installs and runs the tests (ARGS="tests/unit" for some of them)
# A machine that brings its own torch (GPU): make run VENV=--system-site-packages TORCH=
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?=
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
TESTS := .venv/.installed-tests

.PHONY: run test
run: $(STAMP)
	$(BIN)/cuvee run $(ARGS)

test: $(TESTS)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# torch goes first, by its exact version: any other request makes pip fetch gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else "Cuvee needs Python 3.11 or 3.12, found %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	@echo "cuvee: installing into .venv (a few minutes the first time)"
	@rm -f $(STAMP); test -x $(BIN)/python || rm -rf .venv
	@test -d .venv || $(PYTHON) -m venv $(VENV) .venv || { echo "cuvee: could not create .venv with $(PYTHON); is its venv module installed?"; exit 1; }
	@test -z "$(TORCH)" || $(BIN)/python -m pip install -q $(TORCH) || { echo "cuvee: could not install $(TORCH); see pip's message above"; exit 1; }
	@$(BIN)/python -m pip install -q -c constraints.txt -e . || { echo "cuvee: the installation failed; see pip's message above"; exit 1; }
	@touch $@

$(TESTS): $(STAMP)
	@echo "cuvee: installing what the tests need"
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]" || { echo "cuvee: the installation failed; see pip's message above"; exit 1; }
	@touch $@
