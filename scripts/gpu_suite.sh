#!/usr/bin/env bash
# What needs an NVIDIA GPU, in order of worth: exactness of the Triton kernels, their time, HSA's, decoding, the models'
# attention functions, and the paper's experiments (hkt reproduce --protocol paper), those with the fewest steps first. All
# goes to the folder GPU_RESULTS (default runs/gpu), the experiments' records to its folder reproduce, their checkpoints to
# runs/reproduce. A step that has ended, well or not, leaves a file STEP.done with its exit status, and is not run again until
# that is removed; no step begins after the time limit, and none outlasts it; experiments go on where they were broken off. The
# exit status is 0 when every step has ended well.
# Usage: scripts/gpu_suite.sh [--limit SECONDS]   (default 570)
# The package need not be installed, but torch, Triton and transformers must be, and Python 3.11 or newer. For the experiments
# WHEELS names a folder with wheels of what is missing of datasets, evaluate and their needs (pip download --no-deps
# --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d WHEELS datasets evaluate dill multiprocess
# sentencex, for Python 3.12). DATA (default ../shared/data) holds the folders imdb and cifar10 with the parquet files of their
# splits; JOBS (default 8) runs train side by side.
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
out=${GPU_RESULTS:-runs/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)

# hkt_hf.modeling lies in modeling/: a tree of links stands for an installed package, before the folder hkt_hf here, which
# PYTHONSAFEPATH keeps off the path.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
mkdir "$links/hkt_hf"
ln -s "$PWD"/hkt_hf/* "$links/hkt_hf/"
ln -s "$PWD/modeling" "$links/hkt_hf/modeling"
ln -s "$PWD/configs" "$links/hkt_hf/configs"
export PYTHONPATH="$links:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
data=${DATA:-../shared/data}
jobs=${JOBS:-8}

"$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu_suite.sh needs an NVIDIA GPU: torch.cuda.is_available() is False")'

failed=0
# step NAME COMMAND...: run once, within what is left of the limit; its output in NAME.log.
step() {
    local name=$1 left=$((limit - SECONDS)) status=0
    shift
    if [ -e "$out/$name.done" ]; then
        status=$(cat "$out/$name.done")
        echo "$name: done before, exit status $status"
    elif [ "$left" -lt 30 ]; then
        status=1
        echo "$name: no time left"
    else
        timeout "$left" "$@" > "$out/$name.log" 2>&1 || status=$?
        echo "$name: exit status $status after $((left - limit + SECONDS)) s"
        tail -n 5 "$out/$name.log"
        # 124, 130, 137: it ran out of time, or was broken off.
        case $status in 124 | 130 | 137) ;; *) echo "$status" > "$out/$name.done" ;; esac
    fi
    [ "$status" -eq 0 ] || failed=1
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

packages=${TMPDIR:-/tmp}/hkt-packages
export PYTHONPATH="$PYTHONPATH:$packages"
missing=()
for package in pyarrow pandas xxhash dill multiprocess sentencex datasets evaluate; do
    "$python" -c "import $package" 2> /dev/null || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    if ! "$python" -m pip install --quiet --no-index --no-deps --find-links "${WHEELS:-.}" --target "$packages" "${missing[@]}"; then
        echo "the experiments need ${missing[*]}: name a folder with their wheels as WHEELS" >&2
        exit 1
    fi
fi
reproduce() {
    local task=$1
    shift
    "$python" -m hkt_hf.cli reproduce "$task" --protocol paper --jobs "$jobs" --threads 2 --results "$out/reproduce" "$@"
}
export -f reproduce
export python jobs out
# experiments ARMS NAME: on all tasks.
experiments() {
    local arms=${1:+--arms $1} name=$2
    step "imdb_$name" bash -c "reproduce imdb $arms --data.path '$data/imdb'"
    step "cifar10_$name" bash -c "reproduce cifar10 $arms --data.path '$data/cifar10'"
    step "listops_$name" bash -c "reproduce listops $arms"
}
experiments "flat hkt" absolute
experiments "flat-rope hkt-rope flat-convolution-rope hkt-kernel-4-rope" rope
experiments "flat-convolution flat-wide-parameters flat-wide-flops bert" controls
experiments "" all
exit $failed
