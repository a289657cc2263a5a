#!/bin/sh
# Make the environment in which llm-compressor runs: it pins transformers, and newer
# compressed-tensors and auto-round do not install beside it. CPU is enough; where pip
# would fetch torch with CUDA, point it at torch's CPU wheels first (PIP_INDEX_URL or
# PIP_EXTRA_INDEX_URL), and it takes the version below from there.
#
#     sh scripts/parity/llmcompressor_env.sh FOLDER
set -eu
folder=${1:?"give the folder of the new environment"}
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install \
  torch==2.13.0 transformers==5.17.0 llmcompressor==0.14.0.1 \
  compressed-tensors==0.19.0 auto-round==0.15.1 accelerate==1.15.0 datasets==5.2.0
"$folder/bin/python" -m pip check
