#!/usr/bin/env bash
# Make .venv with the packages of a requirements file; does nothing when it has them already.
#   ./make_env.sh requirements.txt
set -euo pipefail
cd "$(dirname "$0")"

requirements=${1:-requirements.txt}
stamp=.venv/.installed-$requirements

find_python() {
  local name
  for name in ${PYTHON:-} python3 python3.11 python3.12 python3.13; do
    if "$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: Python: 3.11, 3.12 or 3.13 with its venv module is needed; install one, or name it as PYTHON=/path/to/python" >&2
  exit 66
}

if cmp -s <(cat requirements*.txt) "$stamp"; then
  exit 0
fi
if [ ! -x .venv/bin/python ]; then
  python=$(find_python)
  echo "\$ $python -m venv .venv"
  "$python" -m venv .venv
fi
echo "\$ .venv/bin/pip install -r $requirements"
# Some GB: on a terminal one sees how far it is.
quiet=()
[ -t 1 ] || quiet=(--quiet)
.venv/bin/pip install "${quiet[@]}" -r "$requirements"
cat requirements*.txt > "$stamp"
