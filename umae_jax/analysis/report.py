r"""A page that compares pretrainings: python -m umae_jax.analysis.report RUN...

  python -m umae_jax.analysis.report runs/mae runs/umae --output=report

RUN is the work directory of a pretraining, finished or running; several must
be of the same images and patches. Writes index.html, which holds everything,
and its pictures as PNGs. Exit codes: 0 written, 2 wrong usage or data.
"""

import argparse
import base64
import datetime
import html
import os
import pathlib
import string
import sys
import time

from umae_jax import command_line  # Before TensorFlow loads.

# isort: split
import numpy as np
import threadpoolctl

from umae_jax import UserError
from umae_jax import run as run_lib
from umae_jax.analysis import findings, pictures, runs, similarity, views
from umae_jax.analysis import spectrum as spectra
from umae_jax.benchmark import figures
from umae_jax.tasks import inputs

SHOWN, NEIGHBOURS = 6, 5  # Images in pictures, and neighbours of each.
BOUNDED = 16  # Images of the table of bounds.
RATIOS = (0.25, 0.5, 0.75, 0.9)
MOST_HEADS, MOST_POINTS = 4, 2_000  # Shown of attention, and of t-SNE.
PAGE = "index.html"
TEMPLATE = pathlib.Path(__file__).with_name("report.html")


def main(arguments: list[str] | None = None) -> int:
  """Makes the page, saying what is being done."""
  given, begin = _parser().parse_args(arguments), time.monotonic()

  def say(text):
    print(f"{time.monotonic() - begin:5.0f} s  {text}", flush=True)

  try:
    say("reading runs and images")
    found = runs.read(given.runs)
    output = given.output or found[0].directory / "report"
    _check_output(output)
    images, labels, names = read_images(found[0], given.images, given.data_dir)
    output.mkdir(parents=True, exist_ok=True)
    texts = {"count": len(images), "points": min(len(images), MOST_POINTS)}
    texts |= _words(found) | {"bounded": BOUNDED, "masks": findings.MASKS}
    # All of it first: stopped halfway, it leaves nothing behind.
    for name, image in list(draw(found, images, labels, names, say)):
      if isinstance(image, np.ndarray):
        pictures.write(image, output / f"{name}.png")
        data = base64.b64encode((output / f"{name}.png").read_bytes()).decode()
        image = f"data:image/png;base64,{data}"
      texts[name] = image
    page = string.Template(TEMPLATE.read_text("utf-8")).substitute(texts)
    (output / PAGE).write_text(page, "utf-8")
  except (UserError, OSError) as error:
    return command_line.fail(error)
  say(f"wrote {output / PAGE}, and its pictures beside it")
  return 0


def read_images(run: runs.Run, limit: int, data_dir: str | None):
  """(images (N, H, W, C) uint8, labels (N,), class names) for evaluation."""
  config = run.config.copy_and_resolve_references()
  config.batch_size, config.micro_batches = findings.BATCH, 1
  config.data.directory = data_dir or config.data.directory
  try:
    source = run_lib.open_source(config, training=False)
  except UserError as error:
    raise UserError(f"{error} (--data_dir says where they are now.)") from error
  batches = inputs.make_batches(config)(source, limit=limit)
  parts = [[x[k][x["mask"]] for k in ("image", "label")] for x in batches]
  images, labels = (np.concatenate(x) for x in zip(*parts))
  if len(images) < min(limit, 2 * SHOWN):
    raise UserError(
      f"config.data.eval_split={config.data.eval_split!r} has {len(images)} "
      "readable images; a report needs more."
    )
  return images, labels, source.class_names


def draw(found, images, labels, names, say):
  """Yields (placeholder of the page, picture or HTML)."""
  yield "accuracy_table", _accuracies(found)
  yield "curves", views.curves({run.label: run.records for run in found})
  measured = {}
  for run in found:
    say(f"encoding {len(images)} images: {run.label}")
    measured[run.label] = findings.find(run, images, labels)
  tokens = {label: x.whole[-1] for label, x in measured.items()}
  say("ranks, pairs and similarities")
  values = {
    label: {
      kind: [spectra.singular_values(tokens) for tokens in getattr(x, kind)]
      for kind in ("whole", "masked")
    }
    for label, x in measured.items()
  }
  last = {label: x["whole"][-1] for label, x in values.items()}
  yield "spectrum", pictures.spectrum(last)
  yield "layers", views.ranks_by_layer(values)
  cosines = {label: x.cosines for label, x in measured.items()}
  yield "pairs", views.pair_cosines(cosines)
  yield "pairs_table", _pairs(found, measured)
  yield "bounds_table", _bounds(found, images[:BOUNDED])
  layers = [list(x.whole) for x in measured.values()]
  matrix = similarity.cka_matrix([y for x in layers for y in x], debiased=True)
  sizes = dict(zip(_short(found), map(len, layers)))
  yield "cka", views.similarity_map(matrix, sizes)
  say("images: reconstructions, neighbours, attention")
  first = np.unique(labels, return_index=True)[1]  # An image of each class.
  shown = [*np.sort(first), *np.setdiff1d(np.arange(len(labels)), first)]
  shown = np.array(shown[:SHOWN])
  yield "reconstructions", _reconstructions(found, images[shown])
  yield "neighbours", _neighbours(tokens, images, labels, names, shown)
  yield "attention", _attention(found, images[shown])
  say("t-SNE")
  yield "tsne", _scatters(tokens, labels, names)


def _accuracies(found):
  keys = runs.differences(found)
  logs = [[x for x in run.records if x["split"] == "eval"] for run in found]
  last = [log[-1] if log else {} for log in logs]
  shown = {k: x for k, x in views.LOGGED.items() if any(k in y for y in last)}
  rows = [["run", *keys, "step", *shown.values()]]
  for run, record in zip(found, last):
    scaled = [
      record.get(key, np.nan) * (100 if "accuracy" in key else 1)
      for key in shown
    ]
    settings = [str(run.flat.get(key, "–")) for key in keys]
    step = str(record.get("step", "–"))
    rows.append([run.label, *settings, step, *(f"{x:#.4g}" for x in scaled)])
  return _table(rows)


def _pairs(found, measured):
  head = [f"{x}: {y}" for x in findings.PAIRS for y in ("distance²", "label")]
  rows = [["run", "mask ratio", *head, "uniformity loss"]]
  for run in found:
    x = measured[run.label]
    cells = [run.label, f"{run.config.loss.mask_ratio:g}"]
    for kind in findings.PAIRS:
      cells += [f"{x.alignment[kind]:.3f}", f"{100 * x.same_label[kind]:.0f} %"]
    rows.append([*cells, f"{x.uniformity:.4f}"])
  return _table(rows)


def _bounds(found, images):
  measured = [findings.bounds(run, images) for run in found]
  rows = [["run", "loss", *(f"{x} (slack)" for x in measured[0])]]
  for run, bounds in zip(found, measured):
    loss = next(iter(bounds.values())).loss
    cells = [f"{x.bound:.3f} ({x.slack:.3f})" for x in bounds.values()]
    rows.append([run.label, f"{loss:.3f}", *cells])
  return _table(rows)


def _reconstructions(found, images):
  patches = findings.noise_of(found[0].model, images, findings.SEED).shape[1]
  ratios = [x for x in RATIOS if int(patches * (1 - x)) >= 1]
  columns, groups, heads = [images / 255], {"": 1}, ["image"]
  for ratio in ratios:
    results = [findings.reconstruct(run, images, ratio) for run in found]
    columns += [results[0][0], *(filled for _, filled in results)]
    groups[f"{100 * ratio:.0f} % removed"] = 1 + len(found)
    heads += ["visible", *_short(found)]
  return views.mosaic(columns, heads, groups)


def _neighbours(tokens, images, labels, names, shown):
  words = [names[label][:12] for label in labels]
  columns, notes = [images[shown] / 255], [[words[i] for i in shown]]
  right = [[None] * len(shown)]
  for x in tokens.values():
    for nearest in similarity.nearest(x, shown, NEIGHBOURS).T:
      columns.append(images[nearest] / 255)
      right.append(labels[nearest] == labels[shown])
      signs = np.where(right[-1], "✓", "✗")
      notes.append([f"{x} {words[i]}" for x, i in zip(signs, nearest)])
  heads = ["query", *[str(i + 1) for i in range(NEIGHBOURS)] * len(tokens)]
  groups = {"": 1} | dict.fromkeys(tokens, NEIGHBOURS)
  return views.mosaic(columns, heads, groups, notes, right)


def _attention(found, images):
  columns, heads, groups = [images / 255], ["image"], {"": 1}
  for run, name in zip(found, _short(found)):
    weights = findings.attention(run, images)
    maps = [weights.mean(0), *(weights if len(weights) <= MOST_HEADS else [])]
    columns += [[views.heat(*x) for x in zip(y, columns[0])] for y in maps]
    heads += ["mean", *(f"head {i}" for i in range(1, len(maps)))]
    groups[name] = len(maps)
  return views.mosaic(columns, heads, groups)


def _scatters(tokens, labels, names):
  from sklearn import manifold  # Takes a second to import.

  labels = labels[:MOST_POINTS]
  tsne = manifold.TSNE(perplexity=min(30, len(labels) / 4), random_state=0)
  # Of several threads, each of thousands of steps waits for the slowest: on a
  # machine with other work ten times as long.
  with threadpoolctl.threadpool_limits(1):
    points = {
      label: tsne.fit_transform(similarity.unit(x[:MOST_POINTS]))
      for label, x in tokens.items()
    }
  return views.scatters(points, labels, names)


def _short(found) -> list[str]:
  """Names that fit over a picture of an inch; the page explains them."""
  labels = [run.label for run in found]
  if max(map(len, labels)) <= 16:
    return labels
  return [f"run {i}" for i in range(1, 1 + len(found))]


def _words(found) -> dict[str, str]:
  """The texts of the page."""
  data, commit = found[0].config.data, figures.commit()
  steps = [
    f"{x.label}: {'finished' if x.finished else 'not finished'}, checkpoint of "
    f"step {x.step}, trained at mask ratio {x.config.loss.mask_ratio:g}"
    for x in found
  ]
  names = [f"{x} = {y.label}" for x, y in zip(_short(found), found)]
  places = [os.path.relpath(x.directory) for x in found]
  now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
  texts = {
    "title": "Report of " + ", ".join(x.label for x in found),
    "summary": f"{'; '.join(steps)}. Images: {data.name}, {data.eval_split}, "
    f"{' × '.join(map(str, data.image_size))} pixels.",
    "key": "; ".join(names) + "." if names[0].startswith("run 1 = ") else "",
    "footer": f"Made {now} by umae_jax, commit {commit or 'unknown'}, of "
    f"{', '.join(places)}.",
  }
  return {name: html.escape(x) for name, x in texts.items()}


def _table(rows: list[list[str]]) -> str:
  """HTML; the first row and column are headings."""
  lines = [
    "".join(
      f"<{tag}>{html.escape(cell)}</{tag}>"
      for tag, cell in zip(["th"] + ["td" if i else "th"] * len(row), row)
    )
    for i, row in enumerate(rows)
  ]
  return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def _check_output(output: pathlib.Path) -> None:
  """Refuses to overwrite what is not a report."""
  if not output.exists() or (output.is_dir() and not any(output.iterdir())):
    return
  mark, page = 'content="umae_jax.analysis.report"', output / PAGE
  if not (page.is_file() and mark in page.read_text("utf-8", "replace")):
    raise UserError(
      f"--output={output} exists and is no report; name another directory."
    )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m umae_jax.analysis.report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("runs", metavar="RUN", nargs="+")
  add("--output", type=pathlib.Path, help="directory; default: RUN/report")
  add("--images", type=_images, default=1000, help="to encode; default 1000")
  add("--data_dir", help="where the data are now, if they have moved")
  return parser


def _images(text: str) -> int:
  if not text.isdecimal() or int(text) < 2 * SHOWN:
    raise argparse.ArgumentTypeError(f"{text!r}: at least {2 * SHOWN} images")
  return int(text)


if __name__ == "__main__":
  sys.exit(main())
