r"""What the benchmark measures; nothing here is worth training to its end.

  python -m umae_jax.benchmark --config=configs/benchmark.py:vit_ti4 \
      --against=torch
  python -m umae_jax.benchmark --config=configs/benchmark.py:vit_b16 \
      --against=torch
  bash launch/benchmark_gpu.sh DIR   (all of the variants gpu_*)

End-to-end on real images of the small size, held in memory:

  python -m umae_jax.benchmark --config=configs/benchmark.py:vit_ti4 \
      --config.data.name=cifar10

Cost:    on two CPU cores: vit_ti4 three minutes, vit_b16 more than ten.
Result:  docs/benchmarks.md.
Source:  ours; models of MAE (arXiv:2111.06377), and of the U-MAE authors'
         CIFAR-10 recipe.
"""

import ml_collections

from umae_jax import config

VARIANTS = (
  *("vit_ti4", "vit_b16"),
  *("gpu_b16", "gpu_l16", "gpu_h14", "gpu_cifar10"),
)


def get_config(variant: str = "vit_ti4") -> ml_collections.ConfigDict:
  """Returns the config of one variant of VARIANTS."""
  if variant not in VARIANTS:
    raise ValueError(f"variant={variant!r} is not one of {VARIANTS}.")
  c = config.defaults()
  c.num_epochs = 1.0
  c.optimizer.warmup_epochs = 0.5
  c.data.name = "made"
  c.data.feed = "memory"

  if variant in ("vit_ti4", "gpu_cifar10"):
    c.batch_size = 64
    c.data.image_size = (32, 32)
    c.data.update(crop_scale=(), flip=False)
    c.model.patch_size = 4
    c.model.update(config.MODELS["vit_ti"])
    c.model.update(decoder_width=192, decoder_depth=4, decoder_num_heads=3)
  if variant == "vit_b16":
    c.batch_size = 8
    c.data.feed = "host"
  if variant == "gpu_b16":
    c.batch_size = 256
  if variant == "gpu_l16":
    c.batch_size = 256
    c.model.update(config.MODELS["vit_l"])
  if variant == "gpu_h14":
    c.batch_size = 128
    c.model.patch_size = 14
    c.model.update(config.MODELS["vit_h"])
  if variant == "gpu_cifar10":  # The recipe's step, of configs/cifar10.py.
    c.batch_size = 4096
    c.num_epochs = 2000.0  # Of which the benchmark tells the time.
    c.model.patch_size = 2
    c.loss.normalize_pixels = False
    c.data.update(name="cifar10", eval_split="test")
    c.data.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
  return c
