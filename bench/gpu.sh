#!/usr/bin/env bash
# Everything that a GPU can tell, in one call of under 8 minutes and with nothing from outside: the
# machine needs torch, triton, numpy, pytest, hypothesis, rich and matplotlib, and a CUDA toolkit for
# the sanitizer and ncu. Each part survives the failure of another; the summary comes last. What is
# timed runs alone, after the sanitizer, FSDP2 on one rank and accuracy, which run beside the tests.
# What 8 minutes do not suffice for is stopped, or not run, and counts as failed.
#
#   bash bench/gpu.sh out/gpu                                 # all parts
#   bash bench/gpu.sh out/gpu "sanitizer tests"               # some
#   bash bench/gpu.sh out/gpu "step train" "tiny tiny-mixed"  # some cases; runs without a GPU, too
#   bash bench/gpu.sh out/gpu "" "" 1a2b3c4                   # the commit, in a copy without .git
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
: "${1:?usage: bash bench/gpu.sh FOLDER [PARTS] [CASES] [COMMIT]}"
out=$(realpath -m "$1")
parts=${2:-"sanitizer fsdp accuracy tests step host train ncu"}
cases=${3:-}
commit=${4:-}
mkdir -p "$out" && logs=$(mktemp -d)
export PYTHONUNBUFFERED=1
python=$(command -v python3)
deadline=460 # seconds: what is killed, and the summary, come behind it

part() { # name, seconds at most, command ...
    local name=$1 limit=$2 start=$SECONDS code
    local left=$((deadline - SECONDS))
    shift 2
    if [ "$left" -lt 5 ]; then
        printf '%-20s exit %-3s not run: the time is over\n' "$name" 124 | tee -a "$out/summary.txt"
        return
    fi
    limit=$((limit < left ? limit : left))
    timeout -k 10 "$limit" "$@" >"$logs/$name.log" 2>&1
    code=$?
    printf '%-20s exit %-3s %4ss  %s\n' "$name" "$code" "$((SECONDS - start))" "$*" | tee -a "$out/summary.txt"
}

timed() { # as `part`, when nothing else runs; what is known by then survives a kill
    wait
    tar -C "$logs" -czf "$out/logs.tar.gz" .
    part "$@"
}

: >"$out/summary.txt"
# asked from elsewhere: here it is found without being installed, and by no script
imported=$(cd / && "$python" -c 'import fused_adamw; print(fused_adamw.__file__)' 2>/dev/null)
if [ -z "$imported" ]; then
    part install 60 "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e .
elif [ "$(realpath "$imported")" != "$(realpath fused_adamw/__init__.py)" ]; then
    echo "$python imports $imported, not what is here: pip install -e $PWD first" >&2
    exit 2
fi
for name in $parts; do
    case $name in
    tests)
        # Left out: what compiles for GPUs that need not be there, installs, runs this script, or has
        # CPU tensors alone. From the folder of the tests: `-m` would put the root, and with it
        # `kernels`, on the path. When its time is up pytest alone is told, by INT, and says how far
        # it came.
        together=$("$python" -c 'import xdist; print("-n 12 --dist worksteal")' 2>/dev/null)
        part tests 190 bash -c "cd tests && timeout --foreground -s INT 180 '$python' -m pytest -q \
            --maxfail=20 --durations=15 $together ${cases:+--collect-only} --ignore=test_generated_code.py \
            --ignore=test_packaging.py --ignore=test_bench.py --ignore=test_checkpoint.py \
            --ignore=test_distributed.py --ignore-glob='*_across_ranks.py' ."
        ;;
    sanitizer)
        for tool in memcheck racecheck; do
            # torch's caching allocator would hide what runs past the end of a tensor
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 120 \
                compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" bench/few_steps.py &
        done
        ;;
    fsdp)
        size=small
        [ -n "$cases" ] && size=tiny
        part fsdp 120 "$python" -m torch.distributed.run --nproc_per_node 1 bench/train_fsdp.py \
            --size $size --out "$logs/fsdp" &
        ;;
    # among the logs: the device machine gives 8 files back
    accuracy)
        part accuracy 190 "$python" bench/accuracy.py --out "$logs/accuracy" \
            ${commit:+--commit "$commit"} ${cases:+--steps 10} &
        ;;
    # shellcheck disable=SC2086  # the cases are words
    step)
        timed step 130 "$python" bench/step.py --out "$out" --max-seconds 3 \
            ${commit:+--commit "$commit"} ${cases:+--cases $cases --rounds 2}
        ;;
    host)
        tensors=(1 148 1000)
        [ -n "$cases" ] && tensors=(1 2)
        timed host 60 "$python" bench/host.py --tensors "${tensors[@]}" --rounds 15
        # shellcheck disable=SC2086
        timed phases 40 "$python" bench/phases.py ${commit:+--commit "$commit"} \
            ${cases:+--cases $cases --rounds 2}
        ;;
    train) timed train 70 "$python" bench/train.py --out "$out" ${cases:+--size tiny} ;;
    ncu)
        for format in fp32 bf16 bf16+int8 bf16+master+int8; do
            timed "ncu-$format" 30 ncu --clock-control none --kernel-name regex:_adamw --launch-skip 1 \
                --launch-count 1 --section SpeedOfLight --section Occupancy --section LaunchStats \
                --section MemoryWorkloadAnalysis --section WarpStateStats \
                "$python" bench/few_steps.py --format "$format"
        done
        ;;
    # not among the parts by default: it may take half of the time
    tune) timed tune 240 "$python" bench/tune.py --out "$logs/tune" ${commit:+--commit "$commit"} ;;
    *) echo "no part is called $name" | tee -a "$out/summary.txt" ;;
    esac
done
wait
tar -C "$logs" -czf "$out/logs.tar.gz" .
for log in "$logs"/*.log; do
    printf '\n== %s\n' "$(basename "$log" .log)"
    tail -n 25 "$log"
done
printf '\n' && cat "$out/summary.txt"
! grep -qv ' exit 0 ' "$out/summary.txt"
