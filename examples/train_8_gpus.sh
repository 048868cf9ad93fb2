#!/bin/sh
# Eight GPUs of one machine, data parallel. Start it again with --resume after a stop: it goes on from the last checkpoint.
#   sh examples/train_8_gpus.sh --data texts --out memory
#   sh examples/train_8_gpus.sh --out memory --resume
# A base model that does not fit on one GPU is sharded (FSDP2) with these lines in a file for --config:
#   arguments:
#     fsdp: true
#     fsdp_config: {transformer_layer_cls_to_wrap: Qwen2DecoderLayer}
set -e
GPUS=${GPUS:-8}
exec torchrun --standalone --nproc-per-node "$GPUS" --no-python \
    ahn train --config "$(dirname "$0")/train_8_gpus.yaml" "$@"
