"""A model from the shapes of its weights, and whether all of them fit."""

from collections.abc import Mapping
import functools
import math
import pathlib
import re
from typing import Any

import jax
import numpy as np

from umae_jax import UserError, config, models
from umae_jax.convert import names

Model = models.MaskedAutoencoder | models.Classifier
Shapes = Mapping[str, tuple[int, ...]]
_DECODER_HEADS = {512: 16, 192: 3}  # By width, of the published models.
_NO_DECODER = dict(decoder_width=512, decoder_depth=8, decoder_num_heads=16)


def make_model(fields: Mapping[str, Any], where: pathlib.Path) -> Model:
  """A `models.Classifier` if the fields have classes, else an autoencoder.

  Raises:
    UserError: fields that it has not, are missing, or do not divide.
  """
  make = models.MaskedAutoencoder
  if "num_classes" in fields:
    make = models.Classifier
  try:
    model = make(**fields)
    pairs = [(model.width, model.num_heads)]
    if make is models.MaskedAutoencoder:
      pairs.append((model.decoder_width, model.decoder_num_heads))
    bad = [x for x in pairs if x[0] % x[1]]
  except (TypeError, ZeroDivisionError) as error:
    raise UserError(f"{where} describes no model of ours ({error}).") from error
  if bad:
    raise UserError(
      f"{where}: a width of {bad[0][0]} does not divide into num_heads="
      f"{bad[0][1]}; give another num_heads (or decoder_num_heads)."
    )
  return model


def find_fields(
  shapes: Shapes, form: str, where: pathlib.Path
) -> dict[str, Any]:
  """Fields of the model whose tensors have these shapes, but for its heads.

  Raises:
    UserError: a tensor that tells is missing or of another rank, or the model
      is none of ours.
  """
  image = _shape(shapes, "encoder/patch_embed/kernel", 4, form, where)
  if image[2] != image[3]:
    raise UserError(
      f"{where} has patches of {image[2:]}; only square ones fit."
    )
  width, depth, ratio = _transformer(shapes, "encoder", form, where)
  fields = dict(patch_size=image[2], width=width, depth=depth, mlp_ratio=ratio)
  if has(shapes, "head/kernel", form):
    mean = form != "huggingface" and has(shapes, "fc_norm/scale", form)
    head = _shape(shapes, "head/kernel", 2, form, where)
    return fields | dict(num_classes=head[0], pool="mean" if mean else "cls")
  if not has_decoder(shapes):
    return fields | _NO_DECODER
  width, depth, other = _transformer(shapes, "decoder", form, where)
  if other != ratio:
    raise UserError(
      f"{where}: the perceptrons' widths are {ratio:g} times the encoder's and "
      f"{other:g} times the decoder's; our models have one mlp_ratio."
    )
  return fields | dict(decoder_width=width, decoder_depth=depth)


def find_heads(
  fields: Mapping[str, Any],
  num_heads: int | None,
  decoder_num_heads: int | None,
  where: pathlib.Path,
) -> dict[str, int]:
  """The numbers of heads, which weights do not tell: given, or as published.

  Raises:
    UserError: not given, and no published model has these sizes.
  """
  sizes = (fields["width"], fields["depth"])
  for known in config.MODELS.values():
    if (known["width"], known["depth"]) == sizes:
      num_heads = num_heads or known["num_heads"]
  heads = {"num_heads": num_heads}
  if "decoder_width" in fields:
    known = _DECODER_HEADS.get(fields["decoder_width"])
    heads["decoder_num_heads"] = decoder_num_heads or known
  for name, value in heads.items():
    if not value or value < 1:
      raise UserError(
        f"{where}: the weights do not tell how many attention heads there are, "
        f"and no published model is {sizes[0]} wide and {sizes[1]} deep with "
        f"such a decoder; give {name} (--{name}=...)."
      )
  return heads


def expected_shapes(
  model: Model,
  channels: int,
  decoder: bool,
  tables: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
  """{name: shape} of the parameters that a source must hold.

  Args:
    model: ours.
    channels: C.
    decoder: whether the source has one.
    tables: {"encoder/pos_embed": shape}, those of the source; a classifier's
      is expected in any case.
  """
  p = model.patch_size
  images = jax.ShapeDtypeStruct((1, p, 2 * p, channels), np.float32)
  init, arguments = model.init, [jax.random.key(0), images]
  if isinstance(model, models.MaskedAutoencoder):
    init = functools.partial(init, mask_ratio=0.5)
    arguments.append(jax.ShapeDtypeStruct((1, 2), np.float32))
  tree = jax.eval_shape(init, *arguments)["params"]
  sizes = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), tree)
  found = {k: x.shape for k, x in names.flatten(sizes).items()}
  if not decoder:
    found = {k: x for k, x in found.items() if not k.startswith("decoder/")}
  for name, shape in tables.items():
    width = model.width if name.startswith("enc") else model.decoder_width
    length = shape[1] if len(shape) == 3 and shape[1] > 1 else 2
    found[name] = (1, length, width)
  return found


def in_format(shapes: Shapes, form: str, patch_size: int) -> Shapes:
  """The same shapes under the names and layouts of another format."""
  zero = np.float32(0)
  empty = {k: np.broadcast_to(zero, x) for k, x in shapes.items()}
  return {k: x.shape for k, x in names.encode(empty, form, patch_size).items()}


def compare(found: Shapes, expected: Shapes, where: pathlib.Path) -> None:
  """Refuses weights that are not exactly those of the model.

  Raises:
    UserError: lists unknown and missing names, and wrong shapes.
  """
  problems = {
    "unknown names": sorted(found.keys() - expected.keys()),
    "missing names": sorted(expected.keys() - found.keys()),
    "wrong shapes": [
      f"{k}: {tuple(expected[k])} expected, {tuple(found[k])} found"
      for k in sorted(expected.keys() & found.keys())
      if tuple(expected[k]) != tuple(found[k])
    ],
  }
  told = [f"{len(x)} {kind} {x[:5]}" for kind, x in problems.items() if x]
  if told:
    raise UserError(
      f"{where} is not a whole checkpoint of a model known here: "
      f"{'; '.join(told)}."
    )


def has(shapes: Shapes, name: str, form: str) -> bool:
  """Whether our parameter `name` is there."""
  return names.theirs(name, form)[0] in shapes


def has_decoder(shapes: Shapes) -> bool:
  """Whether another project's file has any part of a decoder."""
  return any(x.startswith(("decoder", "mask_token")) for x in shapes)


def _transformer(shapes, part, form, where):
  """(width, depth, mlp_ratio) of the encoder or decoder."""
  block = names.theirs(f"{part}/block0/fc1/bias", form)[0].partition(".0.")[0]
  numbers = {
    match[1]
    for match in map(re.compile(re.escape(block) + r"\.(\d+)\.").match, shapes)
    if match
  }
  token = {"encoder": "cls_token", "decoder": "mask_token"}[part]
  width = _shape(shapes, f"{part}/{token}", 3, form, where)[2]
  hidden = _shape(shapes, f"{part}/block0/fc1/bias", 1, form, where)[0]
  ratio = hidden / max(width, 1)
  if int(ratio * width) != hidden:  # Rounded down by a hair.
    ratio = math.nextafter(ratio, math.inf)
  return width, len(numbers), ratio


def _shape(shapes, name, rank, form, where):
  """The shape of the tensor of our parameter `name`, of that rank."""
  theirs = names.theirs(name, form)[0]
  shape = shapes.get(theirs)
  if shape is None or len(shape) != rank or 0 in shape:
    state = "missing" if shape is None else f"of the wrong shape {tuple(shape)}"
    raise UserError(
      f"{where} is not a whole checkpoint of a model known here: {theirs} is "
      f"{state}; expected {rank} dimensions."
    )
  return tuple(shape)
