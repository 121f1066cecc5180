#!/bin/bash
# A quarter of an hour on one GPU, the most telling first: is it right, does a run stop and go on,
# how long does a layer take, how many images per second, how much memory.
#
#     bash tests/gpu_check.sh [FOLDER]
#
# Each step has a time limit, and a log in FOLDER (default: runs/gpu_check). One that fails stops no
# other.
cd "$(dirname "$0")/.." || exit
logs=$(realpath -m "${1:-runs/gpu_check}")
mkdir -p "$logs"
export OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1
torchrun="python -m torch.distributed.run --standalone --nproc-per-node=1"

step() {  # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  timeout --kill-after 5 "$limit" "${@:3}" >"$logs/$name.txt" 2>&1
  echo "== $name: status $?, $((SECONDS - start)) s"
  grep -v "^  File\|^    " "$logs/$name.txt" | tail -n 12 | cut -c1-150  # no traceback
}

nvidia-smi -L
python -c 'import torch; print(torch.__version__, torch.cuda.get_device_capability())'
step right 120 python -m pytest -q -m gpu
step train 60 python train.py --out "$logs/a" --epochs 2
step nccl 60 $torchrun train.py --model vit_nano --data flags --epochs 2 --ema .99 \
  --capacity-factor 1.05 --mixup .2 --out "$logs/b"
step stop 60 timeout --signal TERM 30 $torchrun train.py --data flags --epochs 9 --out "$logs/c"
step continue 60 $torchrun train.py --data flags --epochs 9 --out "$logs/c" --compile
step layer 100 python tests/benchmark.py --layer
step speed 200 python tests/benchmark.py --gpu
step eval 40 python eval.py "$logs/a/best.pt" --data shapes --json "$logs/e.json"
step inspect 40 python inspect_experts.py "$logs/a/best.pt" --data shapes --out "$logs/i"
step tests 200 python -m pytest -q
