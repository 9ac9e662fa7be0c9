#!/usr/bin/env bash
# Everything that is asked of a GPU, in at most eight minutes and without a network: agreement with `hf` and with the CPU in float32
# and bfloat16, scoring, generation, memory, and where a step's time goes. Every part ends its output in one JSON line.
#     benchmarks/gpu.sh FOLDER OUT                         # FOLDER is what gpu_prepare.sh filled
#     DEVICE=cpu SIZE=tiny benchmarks/gpu.sh FOLDER OUT    # a rehearsal; PARTS="models check" leaves out the rest
set -uo pipefail
cd "$(dirname "$0")/.."
given=$(cd "${1:?the folder that gpu_prepare.sh filled}" && pwd)
mkdir -p "${2:?the folder of the results}"
out=$(cd "$2" && pwd)
device=${DEVICE:-cuda} size=${SIZE:-1b}
deadline=$((SECONDS + ${LIMIT:-480}))
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE
dtypes=${DTYPES:-"float32 bfloat16"} parts=${PARTS:-models check cost profile}

python=${PYTHON:-python3}
if ! "$python" -c 'import lm_eval, lm_eval_deepen' 2>/dev/null; then
    # The machine's own torch, and everything else from the wheels.
    "$python" -m venv --system-site-packages "$out/venv" && python=$out/venv/bin/python
    "$python" -m pip install -q --no-index --find-links "$given/wheels" --no-deps "$given"/wheels/*.whl
    "$python" -m pip install -q --no-index --find-links "$given/wheels" --no-deps --no-build-isolation -e .
fi

failed=0
part() { # NAME SECONDS COMMAND...: runs it within what is left of the time, and keeps what it prints
    local name=$1 seconds=$2 left=$((deadline - SECONDS))
    shift 2
    [[ " $parts " == *" $name "* ]] || return
    if [ "$left" -lt 15 ]; then
        echo "== $name: no time left"
        failed=1
        return
    fi
    echo "== $name"
    timeout $((seconds < left ? seconds : left)) "$@" >"$out/$name.txt" 2>"$out/$name.err"
    local status=$?
    tail -n 40 "$out/$name.txt"
    if [ $status -ne 0 ]; then
        echo "== $name: exit status $status"
        tail -n 5 "$out/$name.err"
        failed=1
    fi
}

models=("$out/models/first-$size" "$out/models/second-$size")
part models 120 "$python" benchmarks/gpu_models.py "$given/tokenizers" "$out/models" --size "$size"
part check 150 "$python" benchmarks/gpu_check.py --models "${models[@]}" --device "$device" --dtypes $dtypes
part cost 240 "$python" benchmarks/cost.py --models "${models[@]}" --device "$device" --dtype "${dtypes##* }" --quick \
    --only arc_zero,piqa,generation,fusion,memory --matrix-dir "$out/matrices" --out "$out/cost"
part profile 90 "$python" benchmarks/profile_step.py --models "${models[@]}" --device "$device" --dtype "${dtypes##* }" --quick \
    --documents 4 --tokens 16 --matrix-dir "$out/matrices"
echo "== done in $SECONDS s"
exit $failed
