"""Any source of weights, to a model of ours and its parameters."""

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from umae_jax import UserError, checkpoint, models
from umae_jax.convert import fetch, files, names, shapes
from umae_jax.models import layers, patches

_TABLES = ("encoder/pos_embed", "decoder/pos_embed")
_FIELDS = ("patch_size", "width", "depth", "num_heads", "mlp_ratio")
_DECODER = ("decoder_width", "decoder_depth", "decoder_num_heads")
_BATCH_NORM_EPSILON = 1e-6  # Of the linear probe's.


class Loaded(NamedTuple):
  """What a source holds.

  Attributes:
    model: a `models.MaskedAutoencoder` or `models.Classifier`.
    params: its parameters, NumPy float32, {"encoder/norm/bias": array}; those
      of a decoder only if the source has one.
    image_size: (H, W) of its positions; None if unknown.
    form: "mae", "timm", "huggingface" or "umae_jax".
    left_out: names in the source that the model has no use for.
    origin: what exporting to the same form must know; values of JSON's.
  """

  model: shapes.Model
  params: dict[str, np.ndarray]
  image_size: tuple[int, int] | None
  form: str
  left_out: list[str]
  origin: dict[str, Any]


def load(
  source: str | os.PathLike,
  image_size: tuple[int, int] | None = None,
  num_heads: int | None = None,
  decoder_num_heads: int | None = None,
) -> Loaded:
  """Reads any source; see `umae_jax.convert.load_pretrained`."""
  path = fetch.local(source)
  if not path.is_dir():
    loaded = load_file(path, num_heads, decoder_num_heads)
  elif (path / "model.safetensors").is_file():
    file = path / "model.safetensors"
    loaded = load_file(file, num_heads, decoder_num_heads)
  elif (path / "config.json").is_file():
    loaded = _load_run(path)
  else:
    loaded = _load_exported(path)
  return _place(loaded, image_size, path)


def load_file(
  path: pathlib.Path, num_heads: int | None, decoder_num_heads: int | None
) -> Loaded:
  """A `.pth`, `.pt` or `.safetensors` file, of another project's form."""
  tensors = files.read(path)
  form = names.recognise(tensors)
  if form is None:
    raise UserError(
      f"{path} is of no model known here (MAE, or timm's or Hugging Face's "
      f"ViT); its {len(tensors)} names begin with {sorted(tensors)[:5]}."
    )
  facts, origin = {}, {}
  if form == "huggingface":
    facts, origin = _read_hugging_face(path, tensors)
  try:
    tensors, left_out = names.canonical(tensors, form)
  except KeyError as error:
    raise UserError(f"{path} has two spellings of {error}.") from error
  found = {k: x.shape for k, x in tensors.items()}
  fields = shapes.find_fields(found, form, path)
  heads = (
    facts.get("num_heads") or num_heads,
    facts.get("decoder_num_heads") or decoder_num_heads,
  )
  fields |= shapes.find_heads(fields, *heads, path)
  kept = ("norm_epsilon", "depth", "decoder_depth")
  fields = {"norm_epsilon": layers.NORM_EPSILON} | fields
  fields |= {k: facts[k] for k in kept if k in facts and k in fields}
  model = shapes.make_model(fields, path)
  tables = {
    name: found[theirs]
    for name in _TABLES
    if (theirs := names.theirs(name, form)[0]) in found
  }
  channels = found[names.theirs("encoder/patch_embed/kernel", form)[0]][1]
  decoder = shapes.has_decoder(found)
  expected = shapes.expected_shapes(model, channels, decoder, tables)
  theirs = shapes.in_format(expected, form, model.patch_size)
  shapes.compare(found, theirs, path)
  params = names.decode(tensors, expected, form)
  return Loaded(model, params, facts.get("image_size"), form, left_out, origin)


def _read_hugging_face(path, tensors):
  """(facts, origin): what the weights do not tell, from config.json."""
  origin = {"spelling_5": any(names.SPELLING_5[1] in x for x in tensors)}
  file = path.with_name("config.json")
  if not file.is_file():
    return {"norm_epsilon": 1e-12}, origin  # Their models' default.
  found = files.read_json(file)
  kind, activation = found.get("model_type"), found.get("hidden_act", "gelu")
  if kind not in ("vit", "vit_mae") or activation != "gelu":
    raise UserError(
      f"{file} describes a model of model_type={kind!r} with hidden_act="
      f"{activation!r}; only 'vit' and 'vit_mae' with 'gelu' are known here."
    )
  facts = {
    "num_heads": found.get("num_attention_heads", 12),
    "decoder_num_heads": found.get("decoder_num_attention_heads", 16),
    "norm_epsilon": found.get("layer_norm_eps", 1e-12),
    "depth": found.get("num_hidden_layers", 12),
    "decoder_depth": found.get("decoder_num_hidden_layers", 8),
    "image_size": _pair(found.get("image_size", 224)),
  }
  wrong = {k: x for k, x in facts.items() if not _is_number(x)}
  if wrong:
    raise UserError(f"{file} has values that are no numbers: {wrong}.")
  return facts, origin | {"architectures": found.get("architectures")}


def _load_exported(path):
  """What `save` wrote with to="umae_jax"."""
  params, model = checkpoint.load_params(path)
  fields = dict(model or {})
  size, origin = fields.pop("image_size", None), fields.pop("origin", {})
  return _ours(fields, params, size, origin, path)


def _load_run(path):
  """A run's work directory: the newest good checkpoint of any task."""
  settings = files.read_json(path / "config.json")
  try:
    task, size = settings["task"], settings["data.image_size"]
    fields = {k: settings[f"model.{k}"] for k in _FIELDS}
    if "found.norm_epsilon" in settings:  # Of weights from elsewhere.
      fields["norm_epsilon"] = settings["found.norm_epsilon"]
    params, _ = checkpoint.load_params(path)
    if task == "pretrain":
      fields |= {k: settings[f"model.{k}"] for k in _DECODER}
      return _ours(fields, params, size, {}, path)
    if task == "finetune":
      params = params.get("ema") or params
      fields |= {k: settings[f"classifier.{k}"] for k in ("pool", "drop_path")}
    elif settings["probe.feature"] == "cls":
      params = _fold(params, grid_shape(size, fields["patch_size"], path))
      fields["pool"] = "cls"
    else:
      raise UserError(
        f"{path} is a linear probe of {settings['probe.feature']!r}; only that "
        "of 'cls' is a classifier of ours. Load the encoder from the "
        "pretraining instead."
      )
    fields["num_classes"] = params["head"]["kernel"].shape[1]
  except KeyError as error:
    raise UserError(
      f"{path} is neither a run's work directory nor an exported model: "
      f"{error} is not in its config.json or its parameters."
    ) from error
  return _ours(fields, params, size, {}, path)


def _ours(fields, params, size, origin, path):
  """What is stored as ours, if the parameters are exactly the model's."""
  model, flat = shapes.make_model(fields, path), names.flatten(params)
  found = {k: x.shape for k, x in flat.items()}
  tables = {k: found[k] for k in _TABLES if k in found}
  values = found.get("encoder/patch_embed/kernel", (0,))[0]
  channels = max(values // model.patch_size**2, 1)
  decoder = any(k.startswith("decoder/") for k in found)
  expected = shapes.expected_shapes(model, channels, decoder, tables)
  shapes.compare(found, expected, path)
  return Loaded(model, flat, size and tuple(size), "umae_jax", [], origin)


def _fold(params, grid):
  """A linear probe's parameters as a classifier's: BatchNorm into the head."""
  encoder, head, norm = params["encoder"], params["head"], params["batch_norm"]
  scale = 1 / np.sqrt(np.float64(norm["var"]) + _BATCH_NORM_EPSILON)
  kernel = scale[:, None] * head["kernel"]
  bias = head["bias"] - norm["mean"] @ kernel
  head = {"kernel": np.float32(kernel), "bias": np.float32(bias)}
  table = encoder.get("pos_embed")
  if table is None:
    table = fixed_table(grid, len(norm["mean"]))
  return {"encoder": encoder | {"pos_embed": table}, "head": head}


def fixed_table(grid: tuple[int, int], width: int) -> np.ndarray:
  """(1, 1 + L, width): the fixed positions, and zeros for the class token."""
  table = patches.sincos_positions(grid, width)
  return np.pad(table, ((0, 0), (1, 0), (0, 0)))


def _place(loaded, image_size, path):
  """Interpolates the tables to `image_size`; drops those that are computed."""
  p, params = loaded.model.patch_size, dict(loaded.params)
  old, table = loaded.image_size, params.get(_TABLES[0])
  if old is None and table is not None:
    side = round((table.shape[1] - 1) ** 0.5)
    old = (p * side, p * side) if side**2 == table.shape[1] - 1 else None
  size = old if image_size is None else tuple(image_size)
  old_grid, grid = (x and grid_shape(x, p, path) for x in (old, size))
  plain = isinstance(loaded.model, models.MaskedAutoencoder)
  if plain and old_grid and grid != old_grid:  # Ours, which are computed.
    widths = {"encoder": loaded.model.width}
    if "decoder/mask_token" in params:
      widths["decoder"] = loaded.model.decoder_width
    for part, width in widths.items():
      table = fixed_table(old_grid, width)
      params.setdefault(f"{part}/pos_embed", table)
  for name in [x for x in _TABLES if x in params]:
    table = params[name]
    try:
      if grid != old_grid:
        table = patches.resize_positions(table, grid, old_grid)
      if grid and grid[0] * grid[1] != table.shape[1] - 1:
        raise ValueError(f"{name} has {table.shape[1] - 1} rows for patches.")
    except ValueError as error:
      raise UserError(f"{path}, images of {size}: {error}") from error
    params[name] = table
    if plain and grid and table.shape[2] % 4 == 0:
      fixed = fixed_table(grid, table.shape[2])
      if table.tobytes() == fixed.tobytes():
        del params[name]
  return loaded._replace(params=params, image_size=size)


def grid_shape(size, patch_size, where):
  """`patches.grid_shape`, whose error names the source."""
  try:
    return patches.grid_shape(size, patch_size)
  except (TypeError, ValueError) as error:
    raise UserError(f"{where}, images of {size}: {error}") from error


def _pair(size):
  return tuple(size) if isinstance(size, list) else (size, size)


def _is_number(value):
  values = value if isinstance(value, tuple) else (value,)
  return all(isinstance(x, int | float) and x > 0 for x in values)
