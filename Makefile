# Everything from a fresh clone: `make demo` trains and scores a video STViT, `make test` runs the tests.
# PYTHON: which interpreter (3.11 or newer) makes the virtual environment.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo demo-image test soak lint clean

demo: $(VENV)/installed
	$(RUN) tools/train_net.py --cfg configs/demo_stvit.yaml --overwrite
	$(RUN) tools/test_net.py --cfg configs/demo_stvit.yaml --checkpoint runs/demo/best.pt

# The control: the same recipe on single frames, which say nothing of the class.
demo-image: $(VENV)/installed
	$(RUN) tools/train_net.py --cfg configs/demo_image_control.yaml --overwrite
	$(RUN) tools/test_net.py --cfg configs/demo_image_control.yaml --checkpoint runs/demo-image/best.pt

test: lint
	$(RUN) -m pytest

# The long forms of the tests.
soak: $(VENV)/installed
	$(RUN) -m pytest -m slow

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .[dev]
	touch $@

clean:
	rm -rf $(VENV) runs data/demo
