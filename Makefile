# Everything from a fresh clone: `make demo` trains and scores a video STViT, `make test` runs the tests.
# PYTHON: which interpreter (3.11 or newer) makes the virtual environment; `make gpu` runs on it as it is.

PYTHON ?= python3
DEVICE ?= cuda
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo demo-image demo-finetune demo-segment demo-detect demo-detect-swin demo-actions demo-actions-control \
	test lint clean soak gpu wheel

demo: $(VENV)/installed
	$(RUN) tools/train_net.py --cfg configs/demo_stvit.yaml --overwrite
	$(RUN) tools/test_net.py --cfg configs/demo_stvit.yaml --checkpoint runs/demo/best.pt

# The control: the same recipe on single frames, which say nothing of the class.
demo-image: $(VENV)/installed
	$(RUN) tools/train_net.py --cfg configs/demo_image_control.yaml --overwrite
	$(RUN) tools/test_net.py --cfg configs/demo_image_control.yaml --checkpoint runs/demo_image_control/best.pt

# From an image checkpoint: still frames by shape first, then motion in fewer epochs; beside it the demo's curve.
demo-finetune: $(VENV)/installed
	$(RUN) tools/train_net.py --cfg configs/demo_image.yaml --overwrite
	$(RUN) tools/train_net.py --cfg configs/demo_finetune.yaml --overwrite
	$(RUN) tools/test_net.py --cfg configs/demo_finetune.yaml --checkpoint runs/demo_finetune/best.pt

# Segmentation: a small ViT on the embedded scenes; then STEP: which patches share a token, and the same ViT with
# shared tokens and an early exit, beside the plain one in mIoU, tokens, multiply-adds and images/s.
demo-segment: $(VENV)/installed
	$(RUN) tools/train_net.py --cfg configs/demo_segment.yaml --overwrite
	$(RUN) tools/train_net.py --cfg configs/demo_policy.yaml --overwrite
	$(RUN) tools/train_net.py --cfg configs/demo_step.yaml --overwrite
	$(RUN) tools/test_net.py --cfg configs/demo_segment.yaml --checkpoint runs/demo_segment/best.pt
	$(RUN) tools/test_net.py --cfg configs/demo_step.yaml --checkpoint runs/demo_step/best.pt
	$(RUN) tools/benchmark.py step --checkpoints runs/demo_segment/best.pt runs/demo_step/best.pt

# Objects in images: a detector on STViT-R, and on the dense Swin of the same size; each scored on unseen images.
demo-detect: $(VENV)/installed
	$(RUN) tools/train_net.py --cfg configs/demo_detect.yaml --overwrite
	$(RUN) tools/test_net.py --cfg configs/demo_detect.yaml --checkpoint runs/demo_detect/best.pt

demo-detect-swin: $(VENV)/installed
	$(RUN) tools/train_net.py --cfg configs/demo_detect_swin.yaml --overwrite
	$(RUN) tools/test_net.py --cfg configs/demo_detect_swin.yaml --checkpoint runs/demo_detect_swin/best.pt

# Who does what: several shapes at a time, each in a box, scored by frame mAP; then its control on single frames.
demo-actions: $(VENV)/installed
	$(RUN) tools/train_net.py --cfg configs/demo_actions.yaml --overwrite
	$(RUN) tools/test_net.py --cfg configs/demo_actions.yaml --checkpoint runs/demo_actions/best.pt

demo-actions-control: $(VENV)/installed
	$(RUN) tools/train_net.py --cfg configs/demo_actions_control.yaml --overwrite
	$(RUN) tools/test_net.py --cfg configs/demo_actions_control.yaml --checkpoint runs/demo_actions_control/best.pt

test: lint
	$(RUN) -m pytest

# The long forms: a thousand damaged files, thousands of clips.
soak: $(VENV)/installed
	$(RUN) -m pytest -m slow -s

# On a GPU machine: tests/gpu and tables of speed, in ten minutes, into docs/gpu.md. Installs nothing: PYTHON needs
# torch, torchvision, timm, einops and pytest. DEVICE=cpu: a rehearsal.
gpu:
	PYTHONPATH=. $(PYTHON) tools/gpu.py --device $(DEVICE)

# Builds the wheel and proves it in a fresh environment outside this folder: each command, recipes by name, a model
# trained for one epoch, exported, and one demo video scored by checkpoint and file.
wheel: $(VENV)/installed
	rm -rf dist build
	$(RUN) -m build --wheel --outdir dist
	sh tools/prove_wheel.sh dist/*.whl constraints.txt $(PYTHON)

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
	rm -rf $(VENV) runs data/demo data/demo_movers
