"""Weights from and to other projects; `python -m umae_jax.convert` besides."""

from collections.abc import Mapping
import os
import pathlib
from typing import Any

from umae_jax import UserError, models, storage
from umae_jax.convert import export, names, shapes, sources

__all__ = ["load_pretrained", "load_torch", "save"]


def load_torch(path: str | os.PathLike) -> dict[str, Any]:
  """Parameters of a pretraining checkpoint of Meta's MAE or of U-MAE.

  Args:
    path: a `.safetensors` file, or a `.pth` file as published
      ({"model": ...}); the latter needs PyTorch (`pip install
      'umae_jax[torch]'`) and is read with `weights_only=True`, so that no
      code in it can run.

  Returns:
    `variables["params"]` of `models.MaskedAutoencoder`, NumPy float32. Fixed
    position embeddings and the released code's online classifier are left
    out: the model computes the former and has no use for the latter.

  Raises:
    UserError: no such file, not a checkpoint, or of another model.
  """
  # The weights do not depend on the number of heads.
  loaded = sources.load(pathlib.Path(path), None, 1, 1)
  if "decoder/mask_token" not in loaded.params:
    raise UserError(
      f"{path} is not a whole pretraining checkpoint of MAE or U-MAE: it has "
      "no decoder; use load_pretrained."
    )
  return names.unflatten(loaded.params)


def load_pretrained(
  path: str | os.PathLike,
  *,
  image_size: tuple[int, int] | None = None,
  num_heads: int | None = None,
  decoder_num_heads: int | None = None,
) -> tuple[models.MaskedAutoencoder | models.Classifier, dict[str, Any]]:
  """A model and its parameters, of any source.

      model, params = convert.load_pretrained("mae_pretrain_vit_base.pth")
      tokens = model.apply({"params": params}, images, method=model.encode)

  Args:
    path: a `.pth`, `.pt` or `.safetensors` file with the names of MAE, U-MAE,
      timm's or Hugging Face's ViT; a directory saved by Hugging Face; one that
      `save` wrote; a run's work directory; `hf://owner/name[/file]`;
      `https://...` of such a file; or `gs://...` of any file or directory.
    image_size: (H, W). The position embeddings of the source are interpolated
      if they are of another size; None: as they are.
    num_heads: of the encoder, where the source does not tell; None: as the
      published model of this width and depth.
    decoder_num_heads: likewise.

  Returns:
    (model, params): a `models.Classifier` if the source has a head, else a
    `models.MaskedAutoencoder`, whose "decoder" is absent in the parameters if
    it is in the source (`method=model.encode` needs none). NumPy float32.

  Raises:
    UserError: no such source, not readable, not safe, or not exactly the
      weights of such a model; names what is wrong.
  """
  loaded = sources.load(path, image_size, num_heads, decoder_num_heads)
  return loaded.model, names.unflatten(loaded.params)


def save(
  path: str | os.PathLike,
  model: shapes.Model,
  params: Mapping[str, Any],
  *,
  to: str = "umae_jax",
  image_size: tuple[int, int] | None = None,
) -> list[str]:
  """Writes a model, whole or not at all; overwrites nothing.

  Args:
    path: a directory for "umae_jax" and "huggingface", a `.safetensors` file
      for the others.
    model: a `models.MaskedAutoencoder` or `models.Classifier`.
    params: its parameters; those of a decoder may be absent.
    to: "umae_jax", "mae", "timm" (no decoder), or "huggingface"
      (`from_pretrained` loads it).
    image_size: (H, W) of the position embeddings; other forms store a table
      of them, which `params` may not have.

  Returns:
    What the form cannot hold, in words.

  Raises:
    UserError: `path` exists or cannot be written, or the form cannot hold the
      model.
  """
  flat = names.flatten(params)
  target = storage.local_path(os.fspath(path))
  return export.write(target, model, flat, to, image_size, {})
