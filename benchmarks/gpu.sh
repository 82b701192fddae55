#!/usr/bin/env bash
# On a fresh machine with a GPU: builds, runs the GPU tests and compute-sanitizer, and benchmarks, in under nine minutes.
# The most informative cells come first, and whatever was measured when time runs out is kept.
#
#   benchmarks/gpu.sh OUTDIR
set -uo pipefail
out="${1:?usage: benchmarks/gpu.sh OUTDIR}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
begun=$SECONDS
budget=530

left() { echo $((budget - (SECONDS - begun))); }

# stage NAME LONGEST COMMAND...: runs COMMAND for at most LONGEST seconds and at most what is left. An interrupted
# benchmark saves what it has, so a stage is asked to stop before it is made to.
stage() {
  local name="$1" longest="$2"
  shift 2
  local limit=$(($(left) < longest ? $(left) : longest))
  if ((limit < 5)); then
    echo "$name: no time left" | tee -a "$out/stages.txt"
    return
  fi
  local start=$SECONDS
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1
  local status=$?
  echo "$name: status $status, $((SECONDS - start)) s" | tee -a "$out/stages.txt"
}

: >"$out/stages.txt"
command -v nvidia-smi >/dev/null && nvidia-smi >"$out/nvidia-smi.txt" 2>&1
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
  echo "gpu.sh: this torch sees no CUDA device" | tee -a "$out/stages.txt"
  exit 1
}

bench() { # bench NAME LONGEST ARGUMENTS...
  local name="$1" longest="$2"
  shift 2
  stage "bench-$name" "$longest" "$python" -m benchmarks "$@" --device cuda --output "$out/results.jsonl"
}

stage build 180 "$python" setup.py -q build_ext --inplace
stage smoke 60 "$python" -m pytest -q -m gpu -x tests/attention
bench attention-quick 70 attention --quick --dtype bf16 --seconds 0.3
bench decode-quick 30 decode --quick --dtype bf16 --seconds 0.3
bench codebook-quick 40 codebook --quick --seconds 0.3
stage tests 90 "$python" -m pytest -q -m gpu
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    stage "sanitizer-$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -m gpu -k "sanitizer or smallest" tests
  done
else
  echo "sanitizer: compute-sanitizer is not on the path" | tee -a "$out/stages.txt"
fi
bench sampling 20 sampling --quick --seconds 0.3
bench generation 30 generation --quick --seconds 0.5
bench training 40 training --quick --seconds 0.5
bench scaling 120 attention --grid 64,128 --dtype bf16 --seconds 0.3
echo "done in $((SECONDS - begun)) s" | tee -a "$out/stages.txt"
