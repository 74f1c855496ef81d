"""The same pretraining step with PyTorch and Hugging Face's ViT-MAE."""

import contextlib
import importlib.util
import time
from typing import Any

import ml_collections

from umae_jax import UserError
from umae_jax.benchmark import worker


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses what this side lacks or cannot do; imports nothing.

  Raises:
    UserError: says what to install, or which key to set.
  """
  missing = [
    name
    for name in ("torch", "transformers")
    if importlib.util.find_spec(name) is None
  ]
  if missing:
    raise UserError(
      f"--against=torch needs {' and '.join(missing)}: pip install "
      "'umae_jax[torch]', or leave the flag out."
    )
  height, width = config.data.image_size
  if height != width:
    raise UserError(
      f"config.data.image_size={config.data.image_size}: Hugging Face's "
      "ViT-MAE takes square images; set a square size, or leave out "
      "--against=torch."
    )
  for key, value in (
    ("config.micro_batches", config.micro_batches),
    ("config.mesh.fsdp", config.mesh.fsdp),
  ):
    if value != 1:
      raise UserError(
        f"{key}={value}: the side of PyTorch takes whole batches on one "
        "device; set it to 1, or leave out --against=torch."
      )


class TorchSide:
  """The same model, batch, objective and optimiser.

  As its users would have it: scaled_dot_product_attention, fused AdamW; on
  CUDA bfloat16 autocast and torch.compile, and TensorFloat-32 for what stays
  float32, as is JAX's default.

  Args:
    config: of a pretraining that `check` accepts.
    learning_rate: constant.
  """

  def __init__(
    self, config: ml_collections.ConfigDict, learning_rate: float = 1e-4
  ):
    import torch

    self._torch, self._config = torch, config
    cuda = torch.cuda.is_available()
    self._device = torch.device("cuda" if cuda else "cpu")
    name = config.model.dtype
    self.dtype = ("bfloat16" if cuda else "float32") if name == "auto" else name
    if cuda:
      torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    self.model = make_model(config).to(self._device).train()
    # The feature of the uniformity loss, where `forward` does not return it.
    self._tokens = None
    self.model.vit.register_forward_hook(self._keep_tokens)
    self._optimizer = make_optimizer(self.model, config, learning_rate)
    size = (config.batch_size, config.data.channels, *config.data.image_size)
    self._images = torch.randint(
      0, 256, size, dtype=torch.uint8, device=self._device
    )
    self._loss = torch.compile(self.loss) if cuda else self.loss

  def _keep_tokens(self, module, arguments, output):
    self._tokens = output.last_hidden_state

  def facts(self) -> dict[str, Any]:
    """The device, and the type of the matrix products."""
    cuda = self._device.type == "cuda"
    kind = self._torch.cuda.get_device_name() if cuda else "cpu"
    return {"device_kind": kind, "dtype": self.dtype}

  def loss(self, images, noise=None):
    """L_MAE + lambda * L_unif.

    Args:
      images: (B, C, H, W) uint8.
      noise: (B, L), or None: the model draws it.
    """
    torch, data = self._torch, self._config.data
    shape = (1, data.channels, 1, 1)
    mean, std = (
      torch.tensor(x, device=images.device).reshape(shape)
      for x in (data.mean, data.std)
    )
    pixels = (images.float() / 255 - mean) / std
    autocast = contextlib.nullcontext()
    if self.dtype == "bfloat16":
      autocast = torch.autocast(images.device.type, torch.bfloat16)
    with autocast:
      reconstruction = self.model(pixels, noise=noise).loss
    z = torch.nn.functional.normalize(self._tokens[:, 0].float(), dim=-1)
    moment = z.T @ z / len(z)
    uniformity = moment.square().sum()
    weight = self._config.loss.uniformity_weight
    return reconstruction + weight * uniformity

  def steps(self, kind: str, number: int) -> dict[str, float]:
    """Takes `number` steps and waits for them; as `JaxSide.steps`.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    del kind  # There is one.
    self._wait()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(number):
      loss = self._loss(self._images)
      self._optimizer.zero_grad(set_to_none=True)
      loss.backward()
      self._optimizer.step()
    self._wait()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if not self._torch.isfinite(loss):
      raise FloatingPointError(f"the loss of PyTorch is {float(loss)}.")
    return {"seconds": seconds / number, "cpu_seconds": cpu / number}

  def memory(self) -> dict[str, int | str]:
    """Peak bytes: of the device where it counts them, and of the process."""
    if self._device.type != "cuda":
      return worker.peak_memory()
    peak = self._torch.cuda.max_memory_allocated()
    return {"peak_bytes": peak, "of": "device"} | worker.peak_memory()

  def close(self) -> None:
    """Nothing is open."""

  def _wait(self):
    if self._device.type == "cuda":
      self._torch.cuda.synchronize()


def make_model(config: ml_collections.ConfigDict):
  """A ViTMAEForPreTraining of random weights."""
  import transformers

  model, data = config.model, config.data
  settings = transformers.ViTMAEConfig(
    hidden_size=model.width,
    num_hidden_layers=model.depth,
    num_attention_heads=model.num_heads,
    intermediate_size=int(model.mlp_ratio * model.width),
    image_size=int(data.image_size[0]),
    patch_size=model.patch_size,
    num_channels=data.channels,
    decoder_hidden_size=model.decoder_width,
    decoder_num_hidden_layers=model.decoder_depth,
    decoder_num_attention_heads=model.decoder_num_heads,
    decoder_intermediate_size=int(model.mlp_ratio * model.decoder_width),
    mask_ratio=config.loss.mask_ratio,
    norm_pix_loss=config.loss.normalize_pixels,
    layer_norm_eps=1e-6,
    attn_implementation="sdpa",
  )
  return transformers.ViTMAEForPreTraining(settings)


def make_optimizer(model, config: ml_collections.ConfigDict, rate: float):
  """Fused AdamW that decays all but 1-D parameters."""
  import torch

  trained = [x for x in model.parameters() if x.requires_grad]
  groups = [
    {
      "params": [x for x in trained if x.ndim > 1],
      "weight_decay": config.optimizer.weight_decay,
    },
    {"params": [x for x in trained if x.ndim <= 1], "weight_decay": 0.0},
  ]
  betas = (config.optimizer.b1, config.optimizer.b2)
  return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
