#!/bin/sh
# Collects the wheels that a device without a network lacks. In the root: tests/gpu/collect_wheels.sh FOLDER [pip's words]
# For Python 3.12 on x86-64 Linux, with torch, transformers, accelerate, pyarrow, pandas, matplotlib and pytest there.
# Versions are those of $PYTHON, default .venv's, and of requirements-gpu.txt. What is still missing: add it here.
set -eu
python=${PYTHON:-.venv/bin/python}
folder=$1
shift
names="
unsloth unsloth_zoo trl datasets peft dill multiprocess msgspec cut-cross-entropy tyro docstring-parser typeguard
hf_transfer pydantic pydantic-core annotated-types typing-inspection nest-asyncio structlog json5
nbclient nbformat nbconvert jupyter_client jupyter_core traitlets fastjsonschema jsonschema jsonschema-specifications
referencing rpds-py platformdirs beautifulsoup4 soupsieve bleach webencodings defusedxml jupyterlab-pygments mistune
pandocfilters ipykernel ipywidgets jupyterlab-widgets widgetsnbextension comm debugpy ipython matplotlib-inline
nest-asyncio2 pyzmq tornado ipython-pygments-lexers jedi parso pexpect ptyprocess prompt-toolkit wcwidth stack-data
executing asttokens pure-eval"
mkdir -p "$folder"
versions=$(mktemp)
trap 'rm -f "$versions"' EXIT
grep -E "^(msgspec|cut-cross-entropy|tyro|hf_transfer)==" requirements-gpu.txt >"$versions"
$python -m pip list --format=freeze | grep -v -e "^msgspec" -e "^tyro" -e "^hf" -e "+" >>"$versions"
$python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -c "$versions" -d "$folder" "$@" $names
du -ch "$folder"/*.whl | tail -n 1
test "$(du -cm "$folder"/*.whl | tail -n 1 | cut -f 1)" -le 64 || { echo "more than 64 MiB: leave some out"; exit 1; }
