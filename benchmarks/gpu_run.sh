#!/usr/bin/env bash
# Everything that needs a GPU, in one call on a bare machine, in under nine minutes.
#
#   benchmarks/gpu_run.sh [--dry-run] RESULTS_DIR
#
# The machine needs Python with torch, triton and pytest; no network. Peers that it lacks are installed from wheels/*.whl in
# the repository's root, if there are any, into a temporary folder. Where there is a network:
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels trl==1.16.0 datasets==5.2.0 dill==0.4.1 \
#     multiprocess==0.70.19 liger-kernel==0.8.5 flash-linear-attention==0.6.0 fla-core==0.6.0
#
# A stage that fails or takes too long is recorded, and the next one runs.
#
# RESULTS_DIR receives at most eight files: summary.txt, env.json, gpu_tests.txt, check.txt, sanitizer.txt,
# loss_CARD.csv, numerics_CARD.csv and log.txt. The summary is also the end of what is printed.
#
# --dry-run: the same stages on the CPU, without limits of time (two minutes where nothing else runs): tiny shapes, fewer variants, tests
#            that need a GPU skipped, the native parts built from a copy.
# PYTHON (default python3) · WHEELS (default wheels/) · SDFT_COMMIT: the commit, for the tables, where .git is absent
#
# Exit status: 0 every stage passed or was skipped · 1 a stage failed · 2 wrong usage
set -uo pipefail

usage() {
  sed -n '4p' "$0" | cut -c 5- >&2
  exit 2
}

dry_run=false
if [[ ${1:-} == --dry-run ]]; then
  dry_run=true
  shift
fi
[[ $# -eq 1 && $1 != -* ]] || usage

mkdir -p "$1" || exit 2
results=$(cd "$1" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
root=$PWD
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

python=${PYTHON:-python3}
wheels=${WHEELS:-$root/wheels}
# Seconds: the whole run; stages that start late get what is left. A dry run costs nothing and has no limits.
deadline=525

export PYTHONUNBUFFERED=1 TQDM_DISABLE=1 NO_COLOR=1 HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
# What would change the numbers or hide the device.
unset TRITON_INTERPRET NVIDIA_TF32_OVERRIDE TORCH_ALLOW_TF32_CUBLAS_OVERRIDE CUDA_LAUNCH_BLOCKING SDFT_KERNELS_DEBUG

record() { # NAME STATUS SECONDS COMMAND-OR-REASON
  printf '%s\t%s\t%s\t%s\n' "$@" >>"$work/stages.tsv"
  printf '%4ss  %-12s %s\n' "$SECONDS" "$1" "$2" >&2
}

stage() { # NAME LIMIT_S COMMAND...
  local name=$1 limit=$2 started=$SECONDS status
  shift 2
  if $dry_run; then
    limit=0 # to timeout, none
  else
    if ((limit > deadline - SECONDS)); then limit=$((deadline - SECONDS)); fi
    if ((limit < 5)); then
      record "$name" skipped 0 "no time left"
      return
    fi
  fi
  # A background job of a script starts with SIGINT ignored, and Python needs it to stop in order.
  env --default-signal=INT timeout --signal=INT --kill-after=10 "$limit" "$@" \
    >"$work/$name.out" 2>"$work/$name.err" </dev/null
  status=$?
  record "$name" "$status" $((SECONDS - started)) "$*"
}

summarize() {
  "$python" -m benchmarks.gpu_summary "$work" "$results"
}

has_module() {
  "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"
}

install_peers() {
  local found=()
  shopt -s nullglob
  found=("$wheels"/*.whl)
  shopt -u nullglob
  if ((${#found[@]})); then
    # One at a time: a wheel for another Python must not keep the others out.
    printf '%s\0' "${found[@]}" >"$work/wheels.list"
    stage wheels 60 xargs --null --max-args=1 --arg-file="$work/wheels.list" \
      "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site"
  else
    record wheels skipped 0 "no wheels in $wheels"
  fi
}

build_native() {
  local source=$root name
  if $dry_run; then # a library that another process has loaded is not overwritten
    source=$work/source
    mkdir "$source"
    for name in csrc python sdft_kernels CMakeLists.txt setup.py pyproject.toml README.md LICENSE; do
      cp -R "$root/$name" "$source/"
    done
    rm -f "$source"/sdft_kernels/*.so
  fi
  stage build 60 env --chdir="$source" SDFT_BUILD_EXT=1 SDFT_CUDA_ARCHS=90a "$python" setup.py -q build_ext --inplace
}

run_tests() {
  local files=(tests/test_gpu.py tests/test_divergence_rows.py tests/test_divergence_triton.py tests/test_vocab_parallel.py
    tests/test_prefix_attention_gpu.py tests/test_prefix_attention_triton.py)
  local options=(-q -p no:cacheprovider --durations=10)
  if $dry_run; then # without a GPU the kernels are interpreted, which takes minutes: one shape
    options+=(-k "test_gpu or (test_ragged_vocabularies and triton-17)")
  else
    local rows="(test_divergence_rows and (triton or gpu)) or test_divergence_triton or both_row_kernels"
    options+=(-k "test_gpu or $rows or prefix_attention_gpu or prefix_attention_triton")
    # Each process has a device context of its own; peaks of memory are counted per process.
    if has_module xdist; then options+=(-n 6); fi
  fi
  stage tests 170 "$python" -m pytest "${options[@]}" "${files[@]}"
}

run_sanitizer() {
  local target=("$python" -m benchmarks.gpu_kernels --device "$device" --impl "${impls[@]}") tool sanitizer
  stage kernels 70 "${target[@]}" # also compiles what the next two run
  sanitizer=$(command -v compute-sanitizer) || sanitizer=/usr/local/cuda/bin/compute-sanitizer
  for tool in memcheck racecheck; do
    if [[ -x $sanitizer ]]; then
      # Without PyTorch's cache every tensor is an allocation of its own, whose bounds are checked.
      stage "$tool" 55 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 "${target[@]}"
    else
      record "$tool" skipped 0 "compute-sanitizer is not installed"
    fi
  done
}

run_numerics() {
  if ! has_module benchmarks.numerics; then
    record numerics skipped 0 "no module benchmarks.numerics"
  elif $dry_run; then
    stage numerics 30 "$python" -m benchmarks.numerics --device cpu --markdown
  else
    stage numerics 150 "$python" -m benchmarks.numerics --device cuda --output "$work/numerics.csv"
  fi
}

bench() { # NAME LIMIT_S REPEATS SHAPES VARIANTS OPTIONS...
  local name=$1 limit=$2 repeats=$3 shape_list variant_list
  read -ra shape_list <<<"$4"
  read -ra variant_list <<<"$5"
  shift 5
  stage "$name" "$limit" "$python" -m sdft_kernels bench loss --device "$device" --dtype bf16 \
    --shape "${shape_list[@]}" --variants "${variant_list[@]}" --repeats "$repeats" --threads "$threads" \
    --output "$work/$name.csv" "$@"
}

if $dry_run; then
  device=cpu impls=(torch)
  large=64,32,512 shapes=$large threads=1
  ours="sdft benchmarks.variants:sdft_jsd"
  peers="plain liger_triton"
else
  device=cuda impls=(triton native)
  large=8192,4096,151936 shapes="$large 4096,2048,128256" threads=4
  ours="sdft benchmarks.variants:sdft_callable benchmarks.variants:sdft_jsd sdft_tokens"
  peers="trl_kernel liger_triton liger_chunked plain"
fi

stage env 40 "$python" -m sdft_kernels env --json
install_peers
build_native
summarize >"$work/summary.log" 2>&1

# Correctness side by side: most of it compiles kernels on the CPU.
run_tests &
stage check 120 "$python" -m sdft_kernels check --device "$device" &
run_sanitizer &
run_numerics &
wait
summarize >"$work/summary.log" 2>&1

# Timings one after the other, with the machine to themselves.
if $dry_run; then repeats=1; else repeats=7; fi
bench bench_ours 190 "$repeats" "$shapes" "$ours"
summarize >"$work/summary.log" 2>&1
if ! $dry_run; then repeats=3; fi
bench bench_peers 170 "$repeats" "$shapes" "$peers"
bench bench_native 60 "$repeats" "$shapes" sdft --impl native
bench bench_torch 60 "$repeats" "$large" sdft --impl torch

summarize
status=$?
if [[ ! -s $results/summary.txt ]]; then # not even the summary ran: say what is known
  cat "$work/stages.tsv" "$work/summary.log"
fi
exit "$status"
