#!/usr/bin/env bash
# Fills the GPU table of docs/benchmarks.md: a JSON file for each model.
#
#   bash launch/benchmark_gpu.sh [DIR] [--config.data.directory=TFDS ...]
#
# Needs one GPU and `pip install 'umae_jax[gpu,torch]'`; takes minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-benchmarks}
shift || true
mkdir -p "$output"
# The MFU is of what an H100 or H200 really gives in a large bfloat16 product,
# under its power limit; its data sheet says 989e12. Elsewhere, give --peak.
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
for variant in gpu_b16 gpu_l16 gpu_h14 gpu_cifar10; do
  python -m umae_jax.benchmark --config="configs/benchmark.py:$variant" \
    --against=torch --peak=790e12 --output="$output/$variant.json" "$@"
done
