#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under nine minutes: benchmarks/gpu_suite.sh OUTDIR
#
#   build            the native modules, with the nvcc of this machine, for this GPU only; then `doctor`
#   test OP          the tests marked gpu, op by op; `test rest` is what belongs to no op
#   sanitize TOOL    the self-test of every op under compute-sanitizer: memcheck, racecheck, synccheck
#   tune OP          the fastest configurations for this GPU, into kernels/configs and OUTDIR/configs
#   bench OP         the micro-benchmark of each op, rows into OUTDIR/OP.csv
#   run NAME         the vision cache and the loop's own cost, rows into OUTDIR/end_to_end.csv
#   generate INPUT   whole answers against model.generate and others: the miniature, and recorded answers replayed
#                    on models of 1B and 7B parameters, rows into OUTDIR/generate.csv and OUTDIR/pass_times.csv
#   acceptance 7b    speed-up by simulated acceptance, rows into OUTDIR/acceptance_curve.csv
#   batch            batches and streams of many requests, rows into OUTDIR/batch.csv
#   plot             PNG and SVG of all of it, where matplotlib is there
#
# The recording is SPECFUSE_TRACE, else video_llava_dsec_1s_tokens.json in SPECFUSE_SHARED_DATA, shared/data or
# ../shared/data, else the synthetic example of the package.
#
# A section that went well leaves OUTDIR/done/SECTION and is left out when the suite is called again with the same
# OUTDIR; logs are OUTDIR/log/SECTION.txt. Options: --only TEXT (sections whose name holds it, and the build),
# --again (forget what was done), --budget SECONDS (default 530: no section starts after that,
# nor one that could end more than a minute later).
# Needs python with torch (CUDA), transformers, pytest, pybind11 and ninja, and nvcc; fetches nothing.
# Exit code: 0 all well, 1 a section failed or was left for the next call, 2 nothing could run.
# NOT YET RUN ON A GPU: written and shell-checked on a machine without one, where its refusal and its handling of
# sections were tried.
set -uo pipefail

usage() { sed -n '2,24s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

out="" only="" again=0 budget=530
while (($#)); do
  case $1 in
    --only) only=${2:?--only needs a text}; shift ;;
    --budget) budget=${2:?--budget needs seconds}; shift ;;
    --again) again=1 ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "gpu_suite: unknown option $1" >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
[[ -n $out ]] || { echo "gpu_suite: name a folder for the results: benchmarks/gpu_suite.sh OUTDIR" >&2; exit 2; }
PYTHON=${PYTHON:-python3}
case $out in /*) ;; *) out=$PWD/$out ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

# SPECFUSE_SUITE_DRY=1 takes any machine for a GPU: for the suite's own test.
capability=$("$PYTHON" - <<'PY'
import os
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_suite: torch does not import: {error}")
if os.environ.get("SPECFUSE_SUITE_DRY") == "1":
    print("90")
elif not torch.cuda.is_available():
    sys.exit("gpu_suite: no CUDA device here; this suite runs on a GPU machine (see its first lines)")
else:
    print("%d%d" % torch.cuda.get_device_capability())
PY
) || exit 2
command -v nvcc >/dev/null || [[ -n ${CUDA_HOME:-} ]] || { echo "gpu_suite: no nvcc (set CUDA_HOME)" >&2; exit 2; }
((again)) && rm -rf "$out/done"
mkdir -p "$out/done" "$out/log" || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
failed=()

# section NAME SECONDS COMMAND...: runs it with a time limit unless it is done, not asked for, or the time is up.
section() {
  local name=$1 limit=$2 start=$SECONDS code=0
  local mark=$out/done/${name// /_} log=$out/log/${name// /_}.txt
  shift 2
  [[ -e $mark ]] && { echo "=== $name: done before"; return 0; }
  [[ -z $only || $name == build || $name == *"$only"* ]] || return 0
  ((SECONDS < budget && SECONDS + limit <= budget + 60)) || { echo "=== $name: left for the next call"; failed+=("$name (not started)"); return 1; }
  printf '=== %s (at most %d s)\n' "$name" "$limit"
  if [[ ${SPECFUSE_SUITE_DRY:-0} == 1 ]]; then
    printf '%s\n' "$*" >"$log"
    [[ $name != "${SPECFUSE_SUITE_FAIL:-}" ]] || code=1
  else
    timeout --kill-after=10 "$limit" "$@" >"$log" 2>&1 || code=$?
    tail -n 25 "$log"
  fi
  if ((code == 0)); then
    touch "$mark"
    printf -- '--- %s: ok, %d s\n' "$name" $((SECONDS - start))
    return 0
  fi
  ((code == 124 || code == 137)) && code="time limit"
  printf -- '--- %s: FAILED (%s), %d s, see %s\n' "$name" "$code" $((SECONDS - start)) "$log"
  failed+=("$name ($code)")
  return 1
}

build() {
  SPECFUSE_CUDA=1 SPECFUSE_CUDA_ARCHS=$capability "$PYTHON" setup.py -q build_ext --inplace &&
    "$PYTHON" -m specfuse.cli.main doctor
}
export -f build
export capability PYTHON

# pytest exits with 5 where an op has no test for a GPU.
pytest_gpu() { "$PYTHON" -m pytest -q -m gpu "$@" || [[ $? == 5 ]]; }
export -f pytest_gpu

self_test='import sys
from specfuse.ops import self_test
result = self_test()
print(result)
sys.exit(any(value != "ok" for value in result.values()))'

tune() {
  "$PYTHON" benchmarks/tune.py "$1" --seconds "$2" && mkdir -p "$3/configs" && cp kernels/configs/"$1".*.json "$3/configs/"
}
export -f tune

end_to_end() {
  local options=(--json) name=$1 out=$2
  [[ $("$PYTHON" "benchmarks/$name.py" --help 2>&1) == *--device* ]] && options+=(--device cuda)
  "$PYTHON" "benchmarks/$name.py" "${options[@]}" >"$out/log/$name.json" &&
    "$PYTHON" benchmarks/record_json.py "$name" "$out/log/$name.json" "$out/end_to_end.csv"
}
export -f end_to_end

ops=()
for script in benchmarks/bench_*.py; do
  name=$(basename "$script" .py)
  [[ -e specfuse/ops/${name#bench_}.py ]] && ops+=("${name#bench_}")
done

section build 150 bash -c build || exit 1

taken=()
for op in "${ops[@]}"; do
  # The tests of verify_tree_rejection are not those of verify_tree.
  mapfile -t files < <(compgen -G "tests/test_${op}*.py" | while read -r file; do
    longest=""
    for other in "${ops[@]}"; do
      [[ $file == tests/test_${other}* && ${#other} -gt ${#longest} ]] && longest=$other
    done
    [[ $longest == "$op" ]] && echo "$file"
  done)
  taken+=("${files[@]/#/--ignore=}")
  section "test $op" 60 bash -c 'pytest_gpu "$@"' _ "${files[@]}"
done
section "test rest" 90 bash -c 'pytest_gpu "$@"' _ tests "${taken[@]}"

if sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null); then
  for tool in memcheck racecheck synccheck; do
    section "sanitize $tool" 45 "$sanitizer" --tool "$tool" --error-exitcode 9 "$PYTHON" -c "$self_test"
  done
else
  echo "compute-sanitizer not found: section left out"
fi

for op in "${ops[@]}"; do
  grep -q '^def tunings' "benchmarks/bench_$op.py" && section "tune $op" 60 bash -c 'tune "$@"' _ "$op" 25 "$out"
done
for op in "${ops[@]}"; do
  section "bench $op" 60 "$PYTHON" "benchmarks/bench_$op.py" --device cuda --csv "$out/$op.csv"
done
for name in bench_vision_cache bench_step; do
  [[ -e benchmarks/$name.py ]] && section "run $name" 60 bash -c 'end_to_end "$@"' _ "$name" "$out"
done

recording=example
for candidate in "${SPECFUSE_TRACE:-}" {"${SPECFUSE_SHARED_DATA:-}",shared/data,../shared/data}/video_llava_dsec_1s_tokens.json; do
  [[ -f $candidate ]] && { recording=$candidate; break; }
done
generate=("$PYTHON" benchmarks/bench_generate.py --device cuda --csv "$out")
section "generate miniature" 120 "${generate[@]}" --clips 2 --rounds 2 --nodes 16,auto
replay=(--trace "$recording" --rounds 1 --nodes "16,auto,32")
section "generate 1b 2091" 240 "${generate[@]}" "${replay[@]}" --questions 12 --size 1b --prompt 2091
section "generate 7b 2091" 300 "${generate[@]}" "${replay[@]}" --questions 6 --size 7b --prompt 2091
section "generate 7b 4643" 300 "${generate[@]}" "${replay[@]}" --questions 4 --size 7b --prompt 4643
section "generate 7b unpredictable" 150 "${generate[@]}" --input unpredictable --size 7b --prompt 2091 --rounds 1 \
  --questions 4 --nodes auto --only specfuse --no-pass-times
section "acceptance 7b" 240 "$PYTHON" benchmarks/bench_acceptance_curve.py --device cuda --csv "$out" --size 7b \
  --prompt 2091 --answers 2 --rounds 1
section batch 120 "$PYTHON" benchmarks/bench_batch.py --device cuda --requests 32 --rounds 1 --csv "$out/batch.csv"
if "$PYTHON" -c 'import matplotlib' 2>/dev/null; then
  mapfile -t tables < <(for op in "${ops[@]}"; do [[ -e $out/$op.csv ]] && echo "$out/$op.csv"; done)
  ((${#tables[@]})) && section plot 30 "$PYTHON" benchmarks/plot.py "${tables[@]}" --out "$out"
  section "plot end to end" 30 "$PYTHON" benchmarks/plot_end_to_end.py "$out" --device gpu
fi

printf '\n%d s; %d failed or left%s\n' "$SECONDS" "${#failed[@]}" "${failed[*]:+: ${failed[*]}}"
((${#failed[@]} == 0))
