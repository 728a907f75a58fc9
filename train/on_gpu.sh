#!/usr/bin/env bash
# What a machine with a GPU is asked for, in parts that each end within the minutes they are given. Repeat to continue.
#
#     bash train/on_gpu.sh PART MINUTES [FOLDER]        FOLDER is runs/gpu by default
#
#     check    the tests that need a GPU, and every kind of encoding in a captured CUDA graph
#     record   a plain ViT on CIFAR-10, long, three seeds: configs/sweep/record.yaml
#     table    many encodings, three seeds each: configs/sweep/first_table.yaml
#     speed    layers and models beside timm's, kernels beside the roofline, training throughput
#
# It needs torch, timm, accelerate, tensorboard, matplotlib and safetensors, no network, and for all but `speed` the
# pictures: cifar10.tar.xz in DATA (by default data/). jsonargparse, docstring_parser and typeshed_client are installed
# into FOLDER from wheels/ where the interpreter lacks them. FOLDER gets PART.json, figures, and PART.tar.gz with
# configurations, results and answers of finished runs; checkpoints stay in FOLDER/runs. A part that is finished leaves
# PART.done and is not done again; one that was cut off goes on where it was. Without a GPU everything runs at toy size.
# PYTHON, DATA, WHEELS, WORKERS (processes that train on the one GPU at a time) and SWEEP choose other ones.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-} minutes=${2:-9} out=${3:-runs/gpu}
python=${PYTHON:-python3} data=${DATA:-data} wheels=${WHEELS:-wheels} workers=${WORKERS:-6}
case $part in check | record | table | speed) ;; *) sed -n '2,19s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
end=$((SECONDS + minutes * 60 - 45)) # the last seconds are for stopping, saving and packing
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
export PYTHONPATH=.:$out/packages${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$out/inductor}
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4} # of each worker
[ -e "$out/$part.done" ] && { echo "$part: done before"; exit 0; }

if ! "$python" -c "import jsonargparse, docstring_parser, typeshed_client" 2>/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --target "$out/packages" "$wheels"/*.whl || exit 1
fi
"$python" - <<'X' || exit 1
import importlib.util, sys
names = "torch torchvision timm einops jaxtyping jsonargparse accelerate safetensors tqdm tensorboard matplotlib yaml"
missing = [name for name in names.split() if importlib.util.find_spec(name) is None]
sys.exit(f"error: missing in {sys.executable}: {', '.join(missing)}" if missing else 0)
X
gpu=1
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || gpu=0
[ $gpu = 1 ] || echo "no GPU here: the same at toy size, on the CPU"
if [ $gpu = 1 ] && [ "$part" != speed ] && [ ! -e "$data/cifar10.tar.xz" ]; then
  echo "error: no pictures: put cifar10.tar.xz into $data/, or say where it is with DATA"
  exit 1
fi

left() { echo $((end - SECONDS > 1 ? end - SECONDS : 1)); }
limited() { timeout --signal=TERM --kill-after=20 "$(left)" "$@"; }

sweep() { # sweep file on a GPU, sweep file without, name of the folder below runs/
  local file=${SWEEP:-$1} flags=(--data.root "$data") count=$workers
  [ $gpu = 1 ] || { file=${SWEEP:-$2} flags=() count=1; }
  if [ $gpu = 1 ]; then # decode once, before anybody needs it
    limited "$python" -c "import sys; from visionpos.training.data.datasets import load_pictures as f
for split in ('train', 'test'): f('cifar10', split, sys.argv[1])" "$data" || return 1
  fi
  local status=0 pids=()
  for ((i = 0; i < count; i++)); do
    limited "$python" -m train.sweep "$file" "${flags[@]}" --output "$out/runs/$3" >>"$out/$3-worker$i.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  "$python" -m train.report "$out/runs/$3" >"$out/$3.txt" 2>&1 && cp "$out/runs/$3/report/report.json" "$out/$3.json"
  cp "$out/runs/$3"/report/*.png "$out/" 2>/dev/null
  (cd "$out/runs" && find "$3" -type f \( -name 'result.json' -o -name 'config.yaml' -o -name 'log.jsonl' -o -name 'evaluate*' \
    -o -name 'predictions*' -o -name 'sweep.json' -o -name 'error.json' \) -print0 | tar -czf "../$3.tar.gz" --null -T -)
  grep -h "^error\|^failed" "$out/$3"-worker*.log | sort -u | head -n 5
  return $status
}

case $part in
  check)
    cores=$(env -u OMP_NUM_THREADS nproc) status=0
    limited "$python" -m pytest -q -n "$((cores < 8 ? cores : 8))" -m gpu tests/test_on_gpu.py \
      tests/training/data tests/training/run/test_training_on_gpu.py tests/kernels/interpreted_*.py \
      >"$out/check.txt" 2>&1 || { status=$?; [ $status = 5 ] && status=0; }
    tail -n 3 "$out/check.txt"
    limited "$python" -m benchmarks.capture --output "$out/check.json" || status=1
    ;;
  record) sweep configs/sweep/record.yaml configs/sweep/direction_small.yaml record; status=$? ;;
  table) sweep configs/sweep/first_table.yaml configs/sweep/direction_small.yaml table; status=$? ;;
  speed)
    status=0 flags=(--device cuda --dtype bf16 --rounds 7) sizes=()
    rows=(kernel "layer S/16" "window 56 x 56, shifted" "window 14 x 14, shifted" Swin-T "model S/16" "model Ti/4" "long 64 x 64")
    compiled=(Swin-T "model Ti/4")
    [ $gpu = 1 ] || { flags=(--quick --rounds 3) rows=(rotation gather) compiled=() sizes=(--batch 16 --steps 2 --rounds 1); }
    for mode in eager compiled; do
      [ $mode = compiled ] && { rows=("${compiled[@]}"); [ $gpu = 1 ] || continue; }
      [ -e "$out/speed-$mode.done" ] && continue
      limited "$python" -m benchmarks.speed "${flags[@]}" --mode $mode --rows "${rows[@]}" --output "$out/speed-$mode"
      case $? in 0 | 1) touch "$out/speed-$mode.done" ;; *) status=1 ;; esac
      cp "$out/speed-$mode/speed.json" "$out/speed-$mode.json" 2>/dev/null
      [ $mode = eager ] && [ ! -e "$out/throughput.json" ] && { limited "$python" -m benchmarks.throughput \
        "${sizes[@]}" --models vit_192x9 --output "$out/throughput.json" || status=1; }
    done
    ;;
esac
[ $status = 0 ] && touch "$out/$part.done"
echo "$part: exit status $status after $((SECONDS / 60)) minutes; $out"
exit $status
