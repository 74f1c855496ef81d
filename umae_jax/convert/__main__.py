r"""Converts weights: python -m umae_jax.convert SRC DST [--to=FORM].

  python -m umae_jax.convert mae_pretrain_vit_base.pth vit_base
  python -m umae_jax.convert runs/umae umae.safetensors --to=timm
  python -m umae_jax.convert hf://facebook/vit-mae-base copy --to=huggingface

SRC is whatever `umae_jax.convert.load_pretrained` reads. DST is a new
directory (umae_jax, huggingface) or .safetensors file (mae, timm).
Exit codes: 0 written, 2 wrong usage or weights.
"""

import argparse
import re
import sys

from umae_jax import UserError, config, models, storage
from umae_jax.convert import export, fetch, files, sources


def main(arguments: list[str] | None = None) -> int:
  """Converts, and prints what it did as a table."""
  given = _parser().parse_args(arguments)
  try:
    target = storage.local_path(given.target, "DST=")
    source = fetch.local(given.source)
    loaded = sources.load(
      source, given.image_size, given.num_heads, given.decoder_num_heads
    )
    lost = export.write(
      target,
      loaded.model,
      loaded.params,
      given.to,
      loaded.image_size,
      loaded.origin,
    )
  except (UserError, OSError) as error:
    print(f"umae_jax: {error}", file=sys.stderr, flush=True)
    return 2
  rows = {
    "source": f"{given.source}, {loaded.form}",
    "": _digest(source),
    "model": describe(loaded),
    "parameters": f"{sum(x.size for x in loaded.params.values()):,}",
    "left out": ", ".join(loaded.left_out + lost) or "nothing",
    "written": f"{target}, {given.to}",
    " ": _digest(target),
  }
  for name, value in rows.items():
    print(f"{name:<12}{value}")
  return 0


def describe(loaded: sources.Loaded) -> str:
  """For people: ViT-B/16, 12 heads, decoder 512 x 8."""
  model, name = loaded.model, "ViT "
  for known, sizes in config.MODELS.items():
    if (model.width, model.depth) == (sizes["width"], sizes["depth"]):
      name = f"ViT-{known.removeprefix('vit_').title()}"
  if name == "ViT ":
    name = f"ViT {model.width} x {model.depth}, "
  text = f"{name}/{model.patch_size}, {model.num_heads} heads"
  if isinstance(model, models.Classifier):
    text += f", {model.num_classes} classes, pool {model.pool}"
  elif "decoder/mask_token" in loaded.params:
    text += f", decoder {model.decoder_width} x {model.decoder_depth}"
  if loaded.image_size:
    text += f", images of {loaded.image_size[0]} x {loaded.image_size[1]}"
  return text


def _digest(path):
  """The SHA-256 of a file, or of a directory's weights."""
  file = path / "model.safetensors" if path.is_dir() else path
  if not file.is_file():
    return "checksum of every parameter, verified on reading"
  return f"sha256 {files.sha256(file)}"


def _parser():
  parser = argparse.ArgumentParser(
    prog="python -m umae_jax.convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("source", metavar="SRC")
  parser.add_argument("target", metavar="DST")
  parser.add_argument("--to", choices=export.FORMS, default="umae_jax")
  parser.add_argument(
    "--image_size", type=_size, help="N or HxW: interpolates the positions"
  )
  parser.add_argument("--num_heads", type=int, help="if nothing else tells")
  parser.add_argument("--decoder_num_heads", type=int)
  return parser


def _size(text):
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
    raise argparse.ArgumentTypeError(f"{text!r} is no N or HxW, in pixels")
  numbers = [int(x) for x in text.split("x")]
  return (numbers[0], numbers[-1])


if __name__ == "__main__":
  sys.exit(main())
