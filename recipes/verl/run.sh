#!/usr/bin/env bash
# recipes/verl/run.sh SETTING METHOD [verl's overrides]: the two files and verl's own trainer, through hydra.
# With --cfg job --resolve it prints the composed configuration and starts nothing.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
names() { basename -s .yaml "$here/$1"/*.yaml | paste -sd, | sed 's/,/, /g'; }
refuse() { echo "run.sh: $1" >&2; exit 2; }
[ $# -ge 2 ] || refuse "expected SETTING METHOD [overrides]; settings: $(names setting); methods: $(names method)"
among() { [[ $2 != */* && -f $here/$1/$2.yaml ]]; }
among setting "$1" || refuse "SETTING=$1: expected one of $(names setting)"
among method "$2" || refuse "METHOD=$2: expected one of $(names method)"
exec python -m verl.trainer.main_ppo "hydra.searchpath=[file://$here]" "+setting=$1" "+method=$2" "${@:3}"
