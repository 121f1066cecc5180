# The study: about 300 runs of 1 to 8 minutes on one core. Start it again, and it goes on where it
# stopped: what stands in .github/study.jsonl is done. (Move that file away to repeat it all.)
#
#     OMP_NUM_THREADS=1 bash tests/study.sh             or only some parts: ... study.sh a h
#     python tests/study.py                             draw the picture, write the tables
#
# Two at a time, with different parts, use two cores best; g after a, whose runs it takes.

train() {  # FLAGS...: the run of $name and $seed. One that is finished says so and ends at once
  python train.py --workers 0 --k 1 --seed $seed --out $out "$@"
}

once() {  # KIND NAME COMMAND...: for each of the seeds, unless the results have such a line
  for seed in $seeds; do
    name=$2 out=study/$2-$seed
    grep -qs "\"$1\": \"$name\", \"seed\": $seed," .github/study.jsonl && continue
    "${@:3}" && python tests/study.py --add $1 $out
  done
}

run() {  # NAME FLAGS...: train, and append a line to the results
  once run $1 train "${@:2}"
}

shifts() {  # NAME FLAGS...: accuracy on pictures that training never shows
  shifted() {
    train "$@" && python eval.py $out/last.pt --workers 0 --json $out/shifts.json \
      --data flags-noise --data flags-blur
  }
  once shifts $1 shifted "${@:2}"
}

follows() {  # NAME DATA FLAGS...: what the experts follow
  inspected() {
    train "${@:2}" && python inspect_experts.py $out/last.pt --data $1 --out $out/inspect
  }
  once follows $1 inspected "${@:2}"
}

sizes() {  # NAME FLAGS...: without experts, and with 4, 8, 16
  run $1-dense --moe-layers none "${@:2}"
  for E in 4 8 16; do run $1-E$E --experts $E "${@:2}"; done
}

# All runs but those of l, p and q take 2,000 steps of 64 pictures, 250 of them to warm up. On flags
# vit_nano is best at half its recipe's learning rate, with and without experts: see r. The other
# widths have rates in proportion: not tuned, but for q.
flags="--data flags:64000 --epochs 2 --warmup-epochs 0.25"
pico="$flags --model vit_pico --lr 3e-3"
nano="$flags --model vit_nano --lr 1.5e-3"
micro="$flags --model vit_micro --lr 7.5e-4"
large="--data flags:64000 --batch-size 512 --warmup-epochs 0.4"
nano_512="$large --model vit_nano --epochs 3 --lr 4.5e-3"
micro_512="$large --model vit_micro --epochs 2 --lr 3e-3"
for part in ${@:-p q a r b c d e f g h l s w}; do
  seeds="0 1 2 3 4"
  case $part in
    p)  # 512 pictures a step, where the fixed cost of a layer weighs little: the picture
      run 512-dense $nano_512 --moe-layers none
      run 512-E8 $nano_512 --experts 8
      run 512-dense-6e-3 $nano_512 --moe-layers none --lr 6e-3  # with seed 0 as good as 4.5e-3
      seeds=0
      for lr in 3e-3 8e-3; do run 512-dense-$lr $nano_512 --moe-layers none --lr $lr; done
      for lr in 3e-3 6e-3; do run 512-E8-$lr $nano_512 --experts 8 --lr $lr; done
      once speed 512-E8 train $nano_512 --experts 8
      ;;
    q)  # the same at twice the width
      run 512-micro-dense $micro_512 --moe-layers none
      run 512-micro-E8 $micro_512 --experts 8
      for lr in 2.25e-3 1.5e-3 4e-3; do
        run 512-micro-dense-$lr $micro_512 --moe-layers none --lr $lr
        run 512-micro-E8-$lr $micro_512 --experts 8 --lr $lr
        seeds=0  # for the other two
      done
      once speed 512-micro-E8 train $micro_512 --experts 8
      ;;
    a)  # how many experts? The main effect has ten seeds
      seeds="0 1 2 3 4 5 6 7 8 9"
      run dense $nano --moe-layers none
      run E8 $nano --experts 8
      seeds="0 1 2 3 4"
      for E in 4 16 2 32 1; do run E$E $nano --experts $E; done
      ;;
    r)  # is the learning rate right for both?
      for lr in 7.5e-4 3e-3; do
        run dense-$lr $nano --moe-layers none --lr $lr
        run E8-$lr $nano --experts 8 --lr $lr
      done
      ;;
    w)  # dense MLPs as wide as eight experts, by the learning rate
      run wide-1.5e-3 $nano --experts 1 --expert-ratio 32 --lr 1.5e-3
      seeds="0 1"
      for lr in 3e-3 7.5e-4 3e-4; do
        run wide-$lr $nano --experts 1 --expert-ratio 32 --lr $lr
      done
      ;;
    b)  # in which of the four blocks? E8 has them in 1 and 3
      for blocks in 1 3 0,1,2,3; do run blocks-$blocks $nano --experts 8 --moe-layers $blocks; done
      ;;
    c)  # how many per token, of which width?
      run k2 $nano --k 2
      run k2-half $nano --k 2 --expert-ratio 2
      run k4-quarter $nano --k 4 --expert-ratio 1
      ;;
    d)  # which router?
      for router in cosine l2 expert_choice soft; do run $router $nano --router $router; done
      ;;
    e)  # fewer pictures, in as many steps
      sizes 16000 $nano --data flags:16000 --epochs 8 --warmup-epochs 1
      sizes 4000 $nano --data flags:4000 --epochs 32 --warmup-epochs 4
      ;;
    f)  # half and twice the width, at twice and half the learning rate
      sizes pico $pico
      sizes micro $micro
      ;;
    g)  # other pictures. The runs are those of a
      shifts dense $nano --moe-layers none
      shifts E8 $nano --experts 8
      ;;
    h)  # how strong a balance?
      for weight in 0 0.05; do
        for E in 8 16; do run E$E-balance-$weight $nano --experts $E --balance-weight $weight; done
      done
      ;;
    l)  # more steps: as long as with eight experts takes, and 6,000
      run longer-dense $nano --moe-layers none --data flags:85120
      run equal-dense $nano --moe-layers none --data flags:81280
      run pico-longer-dense $pico --moe-layers none --data flags:88320
      run micro-longer-dense $micro --moe-layers none --data flags:78080
      run long-dense $nano --moe-layers none --epochs 6
      run long-E8 $nano --experts 8 --epochs 6
      seeds=0
      once speed pico-E8 train $pico --experts 8
      once speed E8 train $nano --experts 8
      once speed micro-E8 train $micro --experts 8
      ;;
    s)  # what do experts follow?
      seeds="0 1 2"
      follows flags-vit flags $nano --experts 8
      follows shapes-vit shapes --data shapes --epochs 8 --model vit_nano --experts 8
      ;;
  esac
done
