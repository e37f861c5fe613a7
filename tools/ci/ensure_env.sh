#!/usr/bin/env bash
# Finds a Python that can build the environment and hands over to ensure_env.py, with the same arguments.
# A Python of your choice: PYTHON=/path/to/python3.12 make test
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
unset PYTHONPATH PYTHONHOME

# 3.13 is the newest Python for which the pinned Paddle has wheels. Debian ships venv apart from Python, and a
# version manager's stand-in may exist for a Python that is not there, so each candidate has to prove itself.
usable='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

candidates() {
    if [[ -n "${PYTHON:-}" ]]; then
        echo "$PYTHON"
    else
        # All of PATH, not just the first hit: a broken environment that is still activated comes first.
        type -ap python3.11 python3.12 python3.13 python3
    fi
}

while IFS= read -r python; do
    if "$python" -c "$usable" >/dev/null 2>&1; then
        exec "$python" "$here/ensure_env.py" "$@"
    fi
done < <(candidates)

echo "env: no usable Python: ${PYTHON:-PATH} has no Python 3.11, 3.12 or 3.13 with its venv module" \
     "(on Debian: python3 and python3-venv)" >&2
exit 1
