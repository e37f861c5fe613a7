#!/usr/bin/env bash
# Sets up .venv where needed and runs the test suite in phases.
#
#   run_core_tests.sh                 everything
#   run_core_tests.sh --fast          lint and the tests that take seconds (the pre-commit hook)
#   run_core_tests.sh --phase NAME    one phase: lint, unit, contract, torch, dist, training or demo
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

with_torch=(--torch)
case "${1:-}:${2:-}" in
    : | --phase:torch) ;;
    --fast: | --phase:?*) with_torch=() ;;
    *)
        sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0
        exit 2
        ;;
esac

# The suite must not depend on whose shell it is: paths that could bring in other packages, flags of sonicmoe, and
# what git sets for its hooks.
unset PYTHONPATH PYTHONHOME USE_QUACK_GEMM ${!SONIC_MOE_@} ${!GIT_@}
unset SONICMOE_TEST_TORCH_SITE SONICMOE_TEST_TRITON_SITE SONICMOE_TEST_GEMM_SITE

bash tools/ci/ensure_env.sh ${with_torch[@]+"${with_torch[@]}"}
if ((${#with_torch[@]})); then
    export SONICMOE_TEST_TORCH_SITE="$PWD/.venv/torch-site"
    export SONICMOE_TEST_TRITON_SITE="$PWD/.venv/triton-site"
    export SONICMOE_TEST_GEMM_SITE="$PWD/.venv/gemm-site"
fi
exec .venv/bin/python tools/ci/phases.py "$@" </dev/null
