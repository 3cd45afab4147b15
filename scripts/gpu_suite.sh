#!/usr/bin/env bash
# What needs an NVIDIA GPU, in order of worth: exactness of the Triton kernels, their time, HSA's, decoding, the models'
# attention functions, and the paper's experiments (hkt reproduce --protocol paper). Writes into OUT (default results/gpu), the
# experiments into results/reproduce and runs/reproduce. A step that is done leaves a file OUT/<step>.done and is skipped by
# the next run; no step begins after the time limit, and none outlasts it; experiments go on where they were broken off.
# Usage: scripts/gpu_suite.sh [--limit SECONDS]   (default 570)
# The package need not be installed, but torch, Triton and transformers must be. Where datasets and evaluate are not, WHEELS
# names a folder with their wheels (pip download --only-binary=:all: -d WHEELS datasets evaluate sentencex). DATA (default
# ../shared/data) holds the folders imdb and cifar10 with the parquet files of their splits; JOBS (default 8) runs train
# side by side.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

limit=570
if [ "${1:-}" = --limit ] && [ $# -eq 2 ]; then
    limit=$2
elif [ $# -gt 0 ]; then
    echo "usage: scripts/gpu_suite.sh [--limit SECONDS]" >&2
    exit 2
fi
python=${PYTHON:-python3}
out=${OUT:-results/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)

# hkt_hf.modeling lies in modeling/: a tree of links stands for an installed package.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
mkdir "$links/hkt_hf"
ln -s "$PWD"/hkt_hf/* "$links/hkt_hf/"
ln -s "$PWD/modeling" "$links/hkt_hf/modeling"
ln -s "$PWD/configs" "$links/hkt_hf/configs"
export PYTHONPATH="$links:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
data=${DATA:-../shared/data}
jobs=${JOBS:-8}

"$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu_suite.sh needs an NVIDIA GPU: torch.cuda.is_available() is False")'

failed=0
# step NAME COMMAND...: run once, within what is left of the limit; its output in OUT/NAME.log.
step() {
    local name=$1 left=$((limit - SECONDS)) status=0
    shift
    [ ! -e "$out/$name.done" ] || { echo "$name: done before"; return; }
    [ "$left" -ge 30 ] || { echo "$name: no time left"; return; }
    timeout "$left" "$@" > "$out/$name.log" 2>&1 || status=$?
    echo "$name: exit status $status after $((left - limit + SECONDS)) s"
    tail -n 5 "$out/$name.log"
    if [ "$status" -eq 0 ]; then touch "$out/$name.done"; else failed=1; fi
}

check="tests/programs/check_triton.py"
benchmark="scripts/benchmark.py operators --device cuda --dtype bfloat16 --widths 64 --batch-heads 32"
step check_bfloat16 "$python" $check "$out/check_bfloat16.json" --levels 3 --widths 64 --dtypes bfloat16
step time "$python" $benchmark --lengths 2048 4096 16384 --operators flat lifted triton --output "$out/operators.json"
step time_causal "$python" $benchmark --causal --lengths 2048 4096 16384 --operators flat lifted triton --output "$out/operators_causal.json"
step check_float32 "$python" $check "$out/check_float32.json" --levels 3 --widths 64 --dtypes float32
step check_others "$python" $check "$out/check_others.json" --levels 1 2 4 --widths 64 --dtypes bfloat16 float16 --lengths 1999
step check_wide "$python" $check "$out/check_wide.json" --levels 3 --widths 32 128 --lengths 1999
step hsa_speed "$python" scripts/hsa_speed.py --device cuda --dtype bfloat16 --lengths 512 2048 4096 8192 32768 131072 --flat-limit 131072 --output "$out/hsa_speed.json"
step decoding "$python" scripts/benchmark_decoding.py --device cuda --dtype bfloat16 --output "$out/decoding.json"
step attention_functions "$python" tests/programs/check_attention_functions.py

if ! "$python" -c "import datasets, evaluate" 2> /dev/null; then
    packages=${TMPDIR:-/tmp}/hkt-packages
    [ -d "$packages" ] || "$python" -m pip install --quiet --no-index --no-deps --find-links "${WHEELS:?}" \
        --target "$packages" datasets evaluate pyarrow pandas dill xxhash multiprocess sentencex
    export PYTHONPATH="$PYTHONPATH:$packages"
fi
reproduce="-m hkt_hf.cli reproduce --protocol paper --jobs $jobs --threads 2"
for arms in "flat hkt" "flat-rope hkt-rope flat-convolution-rope" "flat-convolution flat-wide-parameters flat-wide-flops bert"; do
    name=${arms// /+}
    step "listops_$name" "$python" $reproduce listops --arms $arms
    step "imdb_$name" "$python" $reproduce imdb --arms $arms --data.path "$data/imdb"
    step "cifar10_$name" "$python" $reproduce cifar10 --arms $arms --data.path "$data/cifar10"
done
step listops_all "$python" $reproduce listops
step imdb_all "$python" $reproduce imdb --data.path "$data/imdb"
step cifar10_all "$python" $reproduce cifar10 --data.path "$data/cifar10"
step report "$python" -m hkt_hf.cli report
exit $failed
