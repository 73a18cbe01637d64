#!/bin/bash
# All stages of the embedded base model on one GPU and sixteen processor cores, in twelve minutes: bash examples/stickers/gpu.sh
# Logs and results are in .furnace; export.py puts them together; then come names.py and custom_contrast.yaml, the encoder.
# On an H200 a step of the denoiser took 60 ms with 256 scenes and with 512, so what is shown here is 1,024.
here=examples/stickers
python=${PYTHON:-python3}
mkdir -p .furnace

stage() {  # a stage's script, its minutes, its workers, and its other settings
    $python $here/$1.py --device cuda --minutes $2 --workers $3 "${@:4}" > .furnace/$1.log 2>&1
}

# the denoiser's first minute, with a text tower that is still learning, compiles it
stage text_tower 1.1 6 --batch_size 1024 --lr 2e-3 & text=$!
stage autoencoder 1.7 4 --batch_size 64 --lr 2e-3 &
stage unet 1.2 4 --batch_size 1024 --lr 1.2e-3 --compile & first=$!
wait $text
wait $first && compile=--compile
mv .furnace/unet.log .furnace/unet-first.log
(stage image_tower 1.5 3 --batch_size 512 --lr 1e-3; stage judge 1.6 4 --batch_size 256 --lr 2e-3 --output .furnace/judge) & towers=$!
stage furnace 10 1 --watch & watch=$!
stage unet 10 9 --batch_size 1024 --lr 1.2e-3 $compile --decay_from 0.5 --widen_to 0.7
wait $towers
kill $watch
