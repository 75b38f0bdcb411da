#!/usr/bin/env bash
# The vLLM command line of this recipe: the OpenAI server on loopback, CPU only, no model hub, no usage report.
#
#   serve.sh MODEL_DIR PORT [extra vLLM arguments...]
#
# Stays in the foreground as one process (exec), so its pid is the server's. server.py starts it, waits
# for it and stops it; use this script on its own only when you want to do those yourself.
#
# environment (name, default, meaning):
#   VENV            .vllm/venv of this checkout   the environment install.sh made
#   MODEL_NAME      tiny                          the name clients send
#   MAX_NUM_SEQS    256                           sequences per step; small values make calls queue
#   MAX_MODEL_LEN   4096                          tokens of prompt and answer together
#   STEP_PAD        (unset)                       1: GPU-like step times, emulated (step_pad.py)
#   VLLM_CPU_KVCACHE_SPACE        1               GiB of KV cache
#   VLLM_CPU_NUM_OF_RESERVED_CPU  1               cores left to the API server and the client
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: serve.sh MODEL_DIR PORT [extra vLLM arguments...]" >&2; exit 2; }
MODEL=$1
PORT=$2
shift 2
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VENV=${VENV:-$HERE/../../.vllm/venv}
CACHE=$HERE/../../.vllm/cache

export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# Compiled kernels live beside the environment: the first warm-up fills the folder, later ones read it. A shared
# precompiled header would be 150 MB in the temporary folder, for one kernel.
export TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS=0
export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$CACHE/vllm} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$CACHE/inductor}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
export VLLM_CPU_NUM_OF_RESERVED_CPU=${VLLM_CPU_NUM_OF_RESERVED_CPU:-1}

pad=()
case ${STEP_PAD:-0} in
  0 | no | off) ;;
  *) pad=(--scheduler-cls step_pad.PaddedScheduler); export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}" ;;
esac

# The module and not the `vllm` program: that one looks up a distribution named "vllm" and this one is "vllm-cpu".
exec "$VENV/bin/python" -W ignore::DeprecationWarning -m vllm.entrypoints.openai.api_server \
  --host 127.0.0.1 --port "$PORT" --model "$MODEL" --served-model-name "${MODEL_NAME:-tiny}" \
  --dtype bfloat16 --seed 0 --generation-config vllm --enforce-eager \
  --max-model-len "${MAX_MODEL_LEN:-4096}" --max-num-seqs "${MAX_NUM_SEQS:-256}" \
  --enable-prefix-caching --enable-prompt-tokens-details --scheduling-policy priority \
  --enable-server-load-tracking --disable-uvicorn-access-log ${pad[@]+"${pad[@]}"} "$@"
