#!/usr/bin/env bash
#
# The adversarial speed record, on whatever device there is, in pieces of at most ten minutes.
#
#     benchmarks/speedrun.sh FOLDER [RECIPE [RUNS [SECONDS [flags of saltflat train ...]]]]
#     benchmarks/speedrun.sh runs/speedrun speedrun-cifar10 3 570 --data.path data
#     until benchmarks/speedrun.sh runs/speedrun speedrun-cifar10 3 570 --data.path data; do [ $? -eq 75 ] || break; done
#
# RUNS trainings of RECIPE (3 of speedrun-cifar10), seeds 0, 1, ...; then each one's last weights, their moving average,
# under PGD-20 and AutoAttack's standard version; then speedrun.py, which prints a table and writes FOLDER/record.json.
#
# It works for SECONDS (570), interrupts what it is at, and ends with code 75. The same call goes on from there: a
# training from its last whole epoch, an evaluation from its last batch. So an epoch with what is measured after it has
# to fit into SECONDS. Code 0: all is done, and stays as it is when called once more. Any other: what failed says why.
#
# EVALUATE has flags of saltflat evaluate, as in EVALUATE='--batch-size 1000 --precision bf16'; PYTHON another Python.
# Takes bash, and `timeout` of GNU coreutils.

set -euo pipefail
export PYTHONUNBUFFERED=1
SECONDS=0 # bash counts them; whoever called might have had a variable of that name

fail() {
  echo "speedrun: $1" >&2
  exit 2
}

(($# > 0)) || fail 'expected FOLDER [RECIPE [RUNS [SECONDS [flags of saltflat train ...]]]], got nothing'
folder=$1 recipe=${2:-speedrun-cifar10} runs=${3:-3} piece=${4:-570}
shift $(($# < 4 ? $# : 4))
[[ $runs =~ ^[1-9][0-9]*$ ]] || fail "RUNS: expected a whole number >= 1, got '$runs'"
[[ $piece =~ ^[1-9][0-9]*$ ]] || fail "SECONDS: expected a whole number >= 1, got '$piece'"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
read -ra evaluate <<<"${EVALUATE:-} "

# Runs that are there know their configs, so that other flags would be taken for new ones alone.
asked=$(printf '%q ' saltflat train "$recipe" "$@")
mkdir -p "$folder"
if [[ -e $folder/seed-0 && $(<"$folder/command") != "$asked" ]]; then
  fail "$folder was begun with '$(<"$folder/command")', got '$asked'; choose another folder"
fi
echo "$asked" >"$folder/command"

again() {
  echo "speedrun: not done after ${SECONDS} s; the same call goes on"
  exit 75
}

# saltflat with these words, within what is left of the piece.
saltflat() {
  local left=$((piece - SECONDS)) code=0
  ((left > 0)) || again
  timeout --foreground --signal=INT --kill-after=20 "$left" "$python" -m saltflat "$@" || code=$?
  if ((code == 124 || (code == 137 && SECONDS >= piece))); then again; fi # 137: it did not listen, and was killed
  if ((code != 0)); then exit "$code"; fi
}

for ((seed = 0; seed < runs; seed++)); do
  run=$folder/seed-$seed
  if [[ -e $run ]]; then
    saltflat train --resume "$run"
  else
    saltflat train "$recipe" --seed "$seed" --out "$run" "$@"
  fi
done

for ((seed = 0; seed < runs; seed++)); do
  saltflat evaluate "$folder/seed-$seed" --checkpoint last --attacks clean pgd-20 standard "${evaluate[@]}"
done

"$python" "$here/speedrun.py" "$folder"
