#!/usr/bin/env bash
# Everything a machine with a GPU should run, in under nine minutes and without network:
#   scripts/gpu_pass.sh OUT_DIR
# build, tests on CUDA, compute-sanitizer over every kernel, the benchmark. Each stage is reported in
# OUT_DIR/summary.txt with its time and exit status, also when an earlier one failed; logs, CSV and plots
# lie beside it. The exit status is the number of stages that failed. See docs/gpu.md.
set -u
[ $# -eq 1 ] || { echo "usage: scripts/gpu_pass.sh OUT_DIR" >&2; exit 64; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=0
: > "$out/summary.txt"

stage() { # seconds name command...: runs it under a time limit, logs it, notes how it ended
  local limit=$1 name=$2 start=$SECONDS status
  shift 2
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=$((failed + 1))
  printf '%-22s exit %-4s %4s s\n' "$name" "$status" "$((SECONDS - start))" | tee -a "$out/summary.txt"
  [ $status -eq 0 ] || tail -n 25 "$out/$name.log"
}

stage 20 machine sh -c "nvidia-smi; nvcc --version; '$python' -m torch.utils.collect_env"
NORMFACE_CUDA=1 stage 150 build "$python" -m pip install --no-build-isolation --no-deps --force-reinstall .
# From here on the installed package is what runs: scripts and benchmarks never put the root on sys.path.
stage 20 build_info "$python" -P -c "import normface_ext as nf; print(nf.build_info())"
stage 110 tests "$python" -P -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_normalize.py \
  tests/test_norm_linear.py tests/test_normface_loss.py tests/test_head_kernels.py tests/test_modules.py -k "cuda or gpu"
stage 60 distributed "$python" -P -m pytest -q -p no:cacheprovider tests/test_train_distributed.py -k gpu
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
for tool in memcheck racecheck initcheck synccheck; do
  stage 40 "$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 --kernel-name-exclude kernel_substring=gemm \
    "$python" -P scripts/every_kernel.py
done
stage 150 benchmark "$python" -P benchmarks/bench_kernels.py --out "$out/benchmark"

echo "failed stages: $failed" | tee -a "$out/summary.txt"
exit $failed
