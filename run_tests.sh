#!/usr/bin/env bash
# Make the environment if it is not there, then ruff and the tests. Words after it go to pytest.
#   ./run_tests.sh              the default suite, no network
#   ./run_tests.sh -m slow      the long ones
set -euo pipefail
cd "$(dirname "$0")"

./make_env.sh requirements-dev.txt
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest "$@"
