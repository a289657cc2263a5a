#!/bin/sh
# Make the environment in which GPTQModel and optimum run: GPTQModel pins what the other
# peers do not bear. CPU is enough; where pip would fetch torch with CUDA, point it at
# torch's CPU wheels first, as in `llmcompressor_env.sh`.
#
#     sh scripts/parity/gptqmodel_env.sh FOLDER
set -eu
folder=${1:?"give the folder of the new environment"}
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install torch==2.13.0
"$folder/bin/python" -m pip install \
  torch==2.13.0 transformers==5.23.0 gptqmodel==7.6.0 optimum accelerate
"$folder/bin/python" -m pip check
