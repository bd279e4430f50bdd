#!/usr/bin/env bash
# Measures merges, steps, saves and restarts on one GPU, in parts of at most six
# minutes each; needs jax, flax, optax, orbax-checkpoint, torch and transformers,
# but nothing that reads images:
#
#   experiments/benchmarks/gpu.sh PART [FOLDER]
#
# PART is merge, step_b32, step_l14, run or all. Tables and figures of each part
# are written to FOLDER (build/gpu). SIZE=tiny BATCH=4 tries it on a CPU.
set -euo pipefail
cd "$(dirname "$0")/../.."

part=${1:?is missing: merge, step_b32, step_l14, run or all}
out=${2:-build/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD
# Of a row, one process takes the time and another the memory: compile once.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/programs}

measure() { # NAME SCRIPT FLAGS...: a table, and figures as JSON
  echo "== $1"
  timeout 360 "${PYTHON:-python}" "experiments/benchmarks/$2" "${@:3}" \
    --json="$out/$1.json" | tee "$out/$1.md"
}

rows=(side_by_side in_turn two_singles one torch torch_compile)
case $part in
  merge)
    # shellcheck disable=SC2086 # several sizes
    measure merge merge.py --size ${SIZE:-B/32 B/16 L/14 1B} \
      --rows list stacked naive --repeats 20
    ;;
  step_b32)
    measure step_b32 step.py --size "${SIZE:-B/32}" --batch "${BATCH:-512}" \
      --dtype bfloat16 --rows "${rows[@]}" --steps 5 --repeats 7
    ;;
  step_l14)
    measure step_l14 step.py --size "${SIZE:-L/14}" --batch "${BATCH:-64}" \
      --dtype bfloat16 --rows "${rows[@]}" block --steps 5 --repeats 7
    ;;
  run)
    measure run overheads.py --size "${SIZE:-B/32}" --batch "${BATCH:-512}" \
      --repeats 10 --saves 3
    ;;
  all)
    for each in merge step_b32 step_l14 run; do
      "$0" "$each" "$out" || echo "$each: failed, status $?"
    done
    ;;
  *)
    echo "$part: is none of merge, step_b32, step_l14, run and all" >&2
    exit 2
    ;;
esac
