#!/bin/sh
# Prove a wheel in a fresh virtual environment outside the tree: prove_wheel.sh WHEEL CONSTRAINTS [PYTHON]
# BIN=FOLDER: an environment where the wheel is installed already, instead of a fresh one.
set -eu
wheel=$(realpath "$1")
constraints=$(realpath "$2")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
unset PYTHONPATH
if [ -z "${BIN:-}" ]; then
    "${3:-python3}" -m venv venv
    BIN=$place/venv/bin
    "$BIN/python" -m pip install --quiet --constraint "$constraints" "$wheel[export]"
fi
for script in $("$BIN/python" -c '
from importlib.metadata import entry_points
print(*(script.name for script in entry_points(group="console_scripts") if script.name.startswith("stvit-")))'); do
    "$BIN/$script" --help >help.txt
    grep -q usage: help.txt
    echo "$script --help"
done
"$BIN/stvit-train" --cfg k400_stvit --print_config | grep -q "preset: kinetics"
"$BIN/stvit-train" --cfg demo_stvit --device cpu --train.epochs 1 --data.workers 0 --output run >train.txt
"$BIN/stvit-export" --checkpoint run/best.pt --to model.onnx
for model in run/best.pt model.onnx; do
    "$BIN/stvit-predict" --checkpoint "$model" data/demo/test/grow/$(ls data/demo/test/grow | head -1)
done
echo "$(basename "$wheel"): every command and a recognised video, in $place"
