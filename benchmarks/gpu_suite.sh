#!/usr/bin/env bash
# Everything that needs a GPU, in one go of about eight minutes: benchmarks/gpu_suite.sh
#
#   1. builds the native modules with the nvcc of this machine, for this GPU only
#   2. runs the tests marked gpu
#   3. runs the self-test of every op under compute-sanitizer (memcheck, racecheck, synccheck)
#   4. runs every benchmarks/bench_*.py and appends to benchmarks/results/gpu_suite.csv one row per figure:
#      date, commit, gpu, driver, cuda, torch, triton, transformers, benchmark, case, metric, value
#
# Needs python with torch (CUDA), transformers, pytest, pybind11 and ninja, and nvcc; fetches nothing.
# Every section is bounded in time and the rest runs if one fails; the exit code is that of the worst.
# NOT YET RUN ON A GPU: written and shell-checked on a machine without one, where only its refusal was tried.
#
# Environment: PYTHON (python3), RESULTS (benchmarks/results), BUDGET_BUILD_S, BUDGET_TESTS_S, BUDGET_SANITIZER_S,
# BUDGET_BENCH_S (seconds per section; the last two per run).
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
failed=()

# section NAME SECONDS COMMAND...: runs it with a time limit, keeps what failed.
section() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  # On stderr: the output of a benchmark goes to a file.
  printf '\n=== %s (at most %d s)\n' "$name" "$limit" >&2
  timeout --kill-after=10 "$limit" "$@" || code=$?
  ((code == 0)) && { printf -- '--- %s: ok, %d s\n' "$name" $((SECONDS - start)) >&2; return 0; }
  ((code == 124 || code == 137)) && code="time limit"
  printf -- '--- %s: FAILED (%s), %d s\n' "$name" "$code" $((SECONDS - start)) >&2
  failed+=("$name ($code)")
  return 1
}

capability=$("$PYTHON" - <<'PY'
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_suite: torch does not import: {error}")
if not torch.cuda.is_available():
    sys.exit("gpu_suite: no CUDA device here; this suite runs on a GPU machine (see its first lines)")
print("%d%d" % torch.cuda.get_device_capability())
PY
) || exit 2
echo "GPU: $("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())'), sm_$capability"
command -v nvcc >/dev/null || [[ -n ${CUDA_HOME:-} ]] || { echo "gpu_suite: no nvcc (set CUDA_HOME)" >&2; exit 2; }

section "build" "${BUDGET_BUILD_S:-150}" env SPECFUSE_CUDA=1 SPECFUSE_CUDA_ARCHS="$capability" \
  "$PYTHON" setup.py -q build_ext --inplace || exit 1
section "doctor" 60 "$PYTHON" -m specfuse.cli.main doctor
section "tests marked gpu" "${BUDGET_TESTS_S:-150}" "$PYTHON" -m pytest -q -m gpu tests

self_test='import sys
from specfuse.ops import self_test
result = self_test()
print(result)
sys.exit(any(value != "ok" for value in result.values()))'
if sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null); then
  for tool in memcheck racecheck synccheck; do
    section "compute-sanitizer $tool" "${BUDGET_SANITIZER_S:-45}" \
      "$sanitizer" --tool "$tool" --error-exitcode 9 "$PYTHON" -c "$self_test"
  done
else
  echo "compute-sanitizer not found: section left out"
  failed+=("compute-sanitizer (not found)")
fi

mkdir -p "$RESULTS"
for script in benchmarks/bench_*.py; do
  name=$(basename "$script" .py)
  options=()
  help=$("$PYTHON" "$script" --help 2>&1)
  [[ $help == *--device* ]] && options+=(--device cuda)
  [[ $help == *--json* ]] && options+=(--json)
  section "$name" "${BUDGET_BENCH_S:-60}" "$PYTHON" "$script" "${options[@]}" >"$RESULTS/$name.log"
  code=$?
  tail -n 15 "$RESULTS/$name.log"
  ((code == 0)) || continue
  [[ $help == *--json* ]] && "$PYTHON" benchmarks/record_json.py "$name" "$RESULTS/$name.log" "$RESULTS/gpu_suite.csv"
done

printf '\n%d failed%s\n' "${#failed[@]}" "${failed[*]:+: ${failed[*]}}"
((${#failed[@]} == 0))
