"""A model of ours and its parameters, to a form that others read."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from umae_jax import UserError, checkpoint, models
from umae_jax.convert import files, names, shapes, sources
from umae_jax.models import layers

FORMS = ("umae_jax", "mae", "timm", "huggingface")


def write(
  path: pathlib.Path,
  model: shapes.Model,
  flat: dict[str, np.ndarray],
  form: str,
  image_size: tuple[int, int] | None,
  origin: dict[str, Any],
) -> list[str]:
  """Writes what `umae_jax.convert.save` is given, its parameters flat.

  Returns:
    What the form cannot hold, in words.

  Raises:
    UserError: see there.
  """
  if form not in FORMS:
    raise UserError(f"there is no form {form!r} to write; choose of {FORMS}.")
  if form == "umae_jax":
    fields = _fields(model) | {"image_size": image_size, "origin": origin}
    with files.new(path) as temporary:
      checkpoint.save_params(temporary, names.unflatten(flat), fields)
    return []
  lost = []
  decoder = [name for name in flat if name.startswith("decoder/")]
  if form == "timm" and decoder:
    lost.append(f"the decoder, {len(decoder)} parameters")
    flat = {k: x for k, x in flat.items() if k not in decoder}
  if form != "huggingface" and model.norm_epsilon != layers.NORM_EPSILON:
    lost.append(f"norm_epsilon={model.norm_epsilon} (theirs is 1e-6)")
  flat, image_size = _with_tables(flat, model, image_size)
  if form == "huggingface":
    _write_hugging_face(path, model, flat, image_size, origin)
  else:
    if path.suffix != ".safetensors":
      raise UserError(
        f"{path}: this form is written as a .safetensors file; name it so. "
        "PyTorch reads it with safetensors.torch.load_file, and torch.save of "
        "{'model': what that gives} makes a .pth."
      )
    tensors = names.encode(flat, form, model.patch_size)
    with files.new(path) as temporary:
      files.write_tensors(temporary, tensors)
  return lost


def _fields(model):
  """What a model of ours is: its own fields, but for how it is computed."""
  skipped = ("parent", "name", "dtype", "execution", "decoder_execution")
  fields = (x.name for x in dataclasses.fields(model))
  return {x: getattr(model, x) for x in fields if x not in skipped}


def _with_tables(flat, model, image_size):
  """The parameters with tables of positions, which other forms store."""
  flat = dict(flat)
  widths = {"encoder": model.width}
  if "decoder/mask_token" in flat:
    widths["decoder"] = model.decoder_width
  for part, width in widths.items():
    if f"{part}/pos_embed" not in flat:
      if image_size is None:
        raise UserError(
          "the form stores a table of positions, and the parameters have none: "
          "give the image_size=(H, W) that it shall be of (--image_size)."
        )
      grid = sources.grid_shape(image_size, model.patch_size, "the export")
      flat[f"{part}/pos_embed"] = sources.fixed_table(grid, width)
  length = flat["encoder/pos_embed"].shape[1] - 1
  if image_size is None:
    side = round(length**0.5)
    image_size = (side * model.patch_size,) * 2
  grid = sources.grid_shape(image_size, model.patch_size, "the export")
  if grid[0] * grid[1] != length:
    raise UserError(
      f"pos_embed has {length} patches, and image_size={image_size} "
      f"{grid[0] * grid[1]}; give the size that it is of."
    )
  return flat, image_size


def _write_hugging_face(path, model, flat, image_size, origin):
  """A directory that `from_pretrained` loads."""
  if isinstance(model, models.Classifier) and model.pool != "cls":
    raise UserError(
      "Hugging Face's ViTForImageClassification reads the class token after "
      f"the final LayerNorm; a classifier of pool={model.pool!r} has no place "
      "there. Write it with --to=timm."
    )
  tensors = names.encode(flat, "huggingface", model.patch_size)
  kind = _architecture(model, flat, origin)
  if kind in ("ViTMAEModel", "ViTModel"):  # Which is not inside another one.
    tensors = {k.removeprefix("vit."): x for k, x in tensors.items()}
  if origin.get("spelling_5"):
    tensors = {k.replace(*names.SPELLING_5): x for k, x in tensors.items()}
  settings = _settings(kind, model, flat, image_size)
  with files.new(path) as temporary:
    temporary.mkdir()
    files.write_tensors(temporary / "model.safetensors", tensors)
    text = json.dumps(settings, indent=2) + "\n"
    (temporary / "config.json").write_text(text)


def _architecture(model, flat, origin):
  if isinstance(model, models.Classifier):
    return "ViTForImageClassification"
  if "decoder/mask_token" in flat:
    return "ViTMAEForPreTraining"
  same = "ViTModel" in (origin.get("architectures") or ())
  return "ViTModel" if same else "ViTMAEModel"


def _settings(kind, model, flat, image_size):
  """The config.json of the architecture `kind`."""
  values = len(flat["encoder/patch_embed/kernel"])
  square = image_size[0] == image_size[1]
  settings = {
    "architectures": [kind],
    "model_type": "vit_mae" if kind.startswith("ViTMAE") else "vit",
    "hidden_size": model.width,
    "num_hidden_layers": model.depth,
    "num_attention_heads": model.num_heads,
    "intermediate_size": int(model.mlp_ratio * model.width),
    "hidden_act": "gelu",
    "qkv_bias": True,
    "layer_norm_eps": model.norm_epsilon,
    "image_size": image_size[0] if square else list(image_size),
    "patch_size": model.patch_size,
    "num_channels": values // model.patch_size**2,
    "dtype": "float32",
  }
  if kind == "ViTForImageClassification":
    labels = {str(i): f"LABEL_{i}" for i in range(model.num_classes)}
    settings["id2label"] = labels
    settings["label2id"] = {x: int(i) for i, x in labels.items()}
  elif kind != "ViTModel":
    settings |= {
      "decoder_hidden_size": model.decoder_width,
      "decoder_num_hidden_layers": model.decoder_depth,
      "decoder_num_attention_heads": model.decoder_num_heads,
      "decoder_intermediate_size": int(model.mlp_ratio * model.decoder_width),
    }
  return settings
