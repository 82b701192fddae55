#!/usr/bin/env bash
# On a fresh machine with a GPU: builds, asks the doctor, runs the GPU tests and compute-sanitizer, and benchmarks, in
# under nine minutes. The doctor decides what is timed: no suite of an operation whose GPU kernels are wrong here. The most
# informative stages come first, and whatever was measured when time runs out is kept. Needs a torch with CUDA, nvcc, a C++
# compiler, and the package's `test` extra; PYTHON says which Python has them.
#
#   benchmarks/gpu.sh OUTDIR
#
# OUTDIR then holds stages.txt (a line for each stage: status and seconds), NAME.txt (what stage NAME printed) and
# results.jsonl (what was measured). Exits with 0 where every stage that ran did.
set -uo pipefail
out="${1:?usage: benchmarks/gpu.sh OUTDIR}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
cd "$(dirname "$0")/.." || exit 1
python="${PYTHON:-python3}"
begun=$SECONDS
budget=530
failures=0

left() { echo $((budget - (SECONDS - begun))); }

note() { echo "$*" | tee -a "$out/stages.txt"; }

# stage NAME LONGEST COMMAND...: runs COMMAND for at most LONGEST seconds and at most what is left. An interrupted
# benchmark saves what it has, so a stage is asked to stop before it is made to.
stage() {
  local name="$1" longest="$2"
  shift 2
  local limit=$(($(left) < longest ? $(left) : longest))
  if ((limit < 5)); then
    note "$name: no time left"
    return 1
  fi
  local start=$SECONDS
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1
  local status=$?
  note "$name: status $status, $((SECONDS - start)) s"
  ((status == 0)) || failures=$((failures + 1))
  return $status
}

bench() { # bench NAME LONGEST SUITE ARGUMENTS...
  local name="$1" longest="$2"
  shift 2
  if [[ " $fit " != *" $1 "* ]]; then
    note "bench-$name: not timed, the doctor found its kernels wrong"
    return 1
  fi
  stage "bench-$name" "$longest" "$python" -m benchmarks run "$@" --device cuda --output "$out/results.jsonl"
}

: >"$out/stages.txt"
command -v nvidia-smi >/dev/null && nvidia-smi >"$out/nvidia-smi.txt" 2>&1
capability="$("$python" -c 'import pytest, hypothesis, triton, torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major >= 9 else ""))' 2>"$out/python.txt")" || {
  note "gpu.sh: $(tail -n 1 "$out/python.txt")"
  exit 1
}

# Only for this GPU, and only the CUDA library: the CPU kernels have no part in what follows.
TORCH_CUDA_ARCH_LIST="$capability" stage build 150 "$python" csrc/cuda/build_cuda.py dalle_kernels/_cuda.so ||
  note "build: backend=\"cuda\" is not there, its tests fail"
stage native 30 "$python" -m dalle_kernels.backends.native
# In one process first, without the self-check's children. Where something is wrong or faults, which ends the CUDA context
# for all that follows in that process, once more with them; what they find is then heeded by the benchmarks too.
export DALLE_KERNELS_SELF_CHECK=off
stage doctor 120 "$python" -m dalle_kernels.doctor --no-speed --json "$out/doctor.json" || {
  export DALLE_KERNELS_SELF_CHECK=once
  stage doctor-apart 200 "$python" -m dalle_kernels.doctor --no-speed --json "$out/doctor.json"
}
fit="$("$python" -m benchmarks fit "$out/doctor.json" 2>>"$out/python.txt")"
note "to be timed: ${fit:-nothing}"
# CUDA tensors through every CUDA kernel, CUDA graphs; then Triton's forward and backward.
stage smoke-cuda 60 "$python" -m pytest -q -m gpu tests/cuda/test_gpu.py
stage smoke-triton 60 "$python" -m pytest -q -m gpu tests/attention tests/decode -k "triton and not property"
bench attention-quick 70 attention --quick --dtype bf16 --seconds 0.3
bench decode-quick 30 decode --quick --dtype bf16 --seconds 0.3
bench codebook-quick 40 codebook --quick --seconds 0.3
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    stage "sanitizer-$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -x -m gpu tests/cuda/test_gpu.py -k "not captured"
  done
else
  note "sanitizer: compute-sanitizer is not on the path"
fi
# The CUDA kernels' own tests first: on a GPU each runs there too, beside the emulation, which is left out.
stage tests-cuda 60 "$python" -m pytest -q -m gpu tests/cuda
stage tests 90 "$python" -m pytest -q -m gpu --ignore=tests/cuda
bench sampling 20 sampling --quick --seconds 0.3
bench generation 30 generation --quick --seconds 0.5
bench training 40 training --quick --seconds 0.5
bench scaling 120 attention --grid 64,128 --dtype bf16 --seconds 0.3
note "done in $((SECONDS - begun)) s, $failures stages failed"
((failures == 0))
