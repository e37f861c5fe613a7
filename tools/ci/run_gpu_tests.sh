#!/usr/bin/env bash
# Runs the tests that need a GPU, in an environment that has torch with CUDA and pytest already; fails if none ran.
#
#   run_gpu_tests.sh                              with python3
#   PYTHON=/path/to/python run_gpu_tests.sh       with another one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# As run_core_tests.sh does; but PYTHONPATH stays, because here it may well be what brings the packages in.
unset USE_QUACK_GEMM ${!SONIC_MOE_@} ${!GIT_@}
unset SONICMOE_TEST_TORCH_SITE SONICMOE_TEST_TRITON_SITE SONICMOE_TEST_GEMM_SITE

exec "${PYTHON:-python3}" tools/ci/phases.py --phase gpu </dev/null
