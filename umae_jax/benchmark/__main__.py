r"""Measures the pretraining step of a configuration.

  python -m umae_jax.benchmark --config=configs/benchmark.py:vit_ti4
  python -m umae_jax.benchmark --config=configs/benchmark.py:vit_b16 \
      --against=torch --output=vit_b16.json

Each side has a process of its own. Kinds of steps that are compared take their
rounds in turn, A B A B; figures are medians of rounds.

Exit codes: 0 measured, 1 stopped with an error, 2 wrong usage.
"""

from collections.abc import Callable, Mapping
import contextlib
import functools
import os
import pathlib
import time
from typing import Any

from absl import app, flags, logging
import ml_collections

from umae_jax import UserError, command_line, metrics, validation, workdir
from umae_jax import config as config_lib
from umae_jax.benchmark import figures, flops, torch_side
from umae_jax.benchmark.worker import Worker

PACKAGE = "umae_jax.benchmark"
QUIET = 0.25  # Seconds before a round: threads of the other side still spin.
WARMUP = 3  # Steps of each kind before the first round.
INPUT_IMAGES = 1_024  # To measure the input with, at least.
FILLED = 4  # Steps not timed: those that the input has ready.

_AGAINST = flags.DEFINE_enum(
  "against", "", ["", "torch"], "Also measure this side, in turn with ours."
)
_ROUNDS = flags.DEFINE_integer(
  "rounds", 10, "Rounds of each kind of step.", lower_bound=1
)
_PEAK = flags.DEFINE_float(
  "peak", None, "FLOP/s of a device, for the MFU; default: a known one's."
)
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")


def main(argv: list[str]) -> int:
  """Measures, prints the table, and writes the file."""
  del argv
  logging.set_verbosity(logging.WARNING)
  config = command_line.CONFIG.value
  try:
    check(config)
    result = measure(config)
    shown = {k: x for k, x in result.items() if k != "provenance"}
    print(metrics.format_table(figures.rows(shown), ("figure", "value")))
    if _OUTPUT.value:
      result["config"] = config_lib.flatten(config)
      workdir.write_json(pathlib.Path(_OUTPUT.value), result)
  except UserError as error:
    return command_line.fail(error)
  except (FloatingPointError, RuntimeError, OSError) as error:
    return command_line.fail(error, command_line.EXIT_ERROR)
  return 0


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses what cannot be measured or written, before anything starts."""
  # JAX, started elsewhere, knows how many devices there are.
  validation.validate(config, num_devices=config.mesh.fsdp)
  if config.task != "pretrain":
    raise UserError(
      f"config.task={config.task!r}: the benchmark is of 'pretrain'; use a "
      "configuration of that."
    )
  if _OUTPUT.value:
    folder = pathlib.Path(_OUTPUT.value).absolute().parent
    if not folder.is_dir():
      raise UserError(f"--output={_OUTPUT.value}: there is no folder {folder}.")
  if _AGAINST.value:
    torch_side.check(config)
    # Both are on the device at the same time.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def measure(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """All figures of a configuration."""
  with contextlib.ExitStack() as stack:

    def start(factory):
      worker = Worker(f"{PACKAGE}.{factory}", config)
      return stack.enter_context(contextlib.closing(worker))

    jax = start("jax_side:JaxSide")
    facts = jax.call("facts")
    if _AGAINST.value and facts["devices"] > 1:
      raise UserError(
        f"--against=torch is of one device, and JAX sees {facts['devices']}: "
        "set CUDA_VISIBLE_DEVICES=0."
      )
    result = {"provenance": figures.provenance(), "hardware": facts}
    result["compile_seconds"] = jax.call("compile")
    synthetic = functools.partial(jax.call, "steps", "synthetic")
    sides = {"ours": synthetic}
    if _AGAINST.value:
      torch = start("torch_side:TorchSide")
      sides["torch"] = functools.partial(torch.call, "steps", "synthetic")
    times = in_turn(sides)
    amount = amounts(config, facts)
    result["synthetic"] = figures.throughput(times["ours"]["seconds"], **amount)
    result["memory"] = jax.call("memory")
    if _AGAINST.value:
      result["torch"] = torch.call("facts")
      result["torch"] |= against(times, amount)
      result["torch"]["memory"] = torch.call("memory")
      torch.close()
    result["uniformity"] = uniformity(jax, synthetic)
    result["end_to_end"] = end_to_end(jax, synthetic, config)
    jax.close()
    if config.data.feed != "memory" and "missing" not in result["end_to_end"]:
      source = start("input_side:InputSide")
      enough = max(2 * FILLED, INPUT_IMAGES // config.batch_size)
      result["input"] = source.call("measure", enough)
  return result


def amounts(config, facts) -> dict[str, Any]:
  """Arguments of `figures.throughput`, but for the times."""
  peak = _PEAK.value or flops.known_peak(facts["device_kind"], facts["dtype"])
  return {
    "batch_size": config.batch_size,
    "flops": flops.per_image(config),
    "peak": peak and peak * facts["devices"],
  }


def in_turn(
  kinds: Mapping[str, Callable[[int], dict[str, float]]],
) -> dict[str, dict[str, list[float]]]:
  """Takes the rounds of several kinds of steps, A B A B, a second's or more.

  Args:
    kinds: name -> function that takes a number of steps.

  Returns:
    {name: {what is measured: the mean of each round}}.
  """
  number = 1  # The same of all.
  for steps in kinds.values():
    steps(WARMUP)
    number = max(number, round(1 / max(steps(1)["seconds"], 1e-3)))
  rounds = {name: [] for name in kinds}
  for _ in range(_ROUNDS.value):
    for name, steps in kinds.items():
      time.sleep(QUIET)
      rounds[name].append(steps(number))
  return {
    name: {key: [x[key] for x in all_of_it] for key in all_of_it[0]}
    for name, all_of_it in rounds.items()
  }


def against(times, amount) -> dict[str, Any]:
  """The other side's figures, and how many times as fast ours is."""
  ours, theirs = times["ours"], times["torch"]
  cpu = figures.ratio(theirs["cpu_seconds"], ours["cpu_seconds"])
  return figures.throughput(theirs["seconds"], **amount) | {
    "ours_is_faster": figures.ratio(theirs["seconds"], ours["seconds"]),
    "and_in_cpu_seconds": cpu,
  }


def uniformity(jax, synthetic) -> dict[str, float]:
  """The time of the step with over that without the uniformity loss."""
  jax.call("compile_without_uniformity")
  without = functools.partial(jax.call, "steps", "without_uniformity")
  times = in_turn({"with": synthetic, "without": without})
  seconds = [times[name]["seconds"] for name in ("with", "without")]
  found = figures.ratio(*seconds)
  return {"share_of_step": 1 - 1 / found["of_medians"], "with/without": found}


def end_to_end(jax, synthetic, config) -> dict[str, Any]:
  """Steps on the data of the configuration, in turn with synthetic ones."""
  found = jax.call("open_feed")
  if "missing" in found:
    print(f"No end-to-end figures: {found['missing']}", flush=True)
    return found

  def fed(number):
    if config.data.feed != "memory":
      jax.call("steps", "end_to_end", FILLED)  # Not timed.
    return jax.call("steps", "end_to_end", number)

  times = in_turn({"synthetic": synthetic, "fed": fed})
  seconds = {name: x["seconds"] for name, x in times.items()}
  waited = figures.spread(times["fed"]["waited"])["median"]
  step = figures.spread(seconds["fed"])["median"]
  return {
    "images_per_second": config.batch_size / step,
    "over_synthetic": figures.ratio(seconds["synthetic"], seconds["fed"]),
    "share_waiting_for_input": waited / step,
    "hours_of_num_epochs": found["steps"] * step / 3600,
  }


if __name__ == "__main__":
  app.run(main, flags_parser=command_line.parse)
