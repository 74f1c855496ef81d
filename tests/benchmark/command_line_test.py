"""`python -m umae_jax.benchmark` as people use it."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
SMALL = [
  "--config=configs/digits.py:smoke",
  "--config.model.depth=1",
  "--config.model.decoder_depth=1",
  *("--steps=1", "--rounds=2", "--warmup=1"),
]


def run(*flags, program=("-m", "umae_jax.benchmark"), **variables):
  return subprocess.run(
    [sys.executable, *program, *flags],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | variables,
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
  )


def numbers(tree):
  for value in tree.values():
    if isinstance(value, dict):
      yield from numbers(value)
    elif isinstance(value, float | int):
      yield value


@pytest.mark.slow
@pytest.mark.parametrize("feed", ["memory", "host"])
def test_all_figures_of_both_sides(tmp_path, feed):
  pytest.importorskip("torch", reason="needs the extra: umae_jax[torch]")
  pytest.importorskip("transformers")
  file = tmp_path / "figures.json"
  done = run(
    *SMALL,
    *("--against=torch", f"--output={file}", "--peak=1e12"),
    f"--config.data.feed={feed}",
    GLIBC_TUNABLES="glibc.malloc.hugetlb=1",
  )
  assert done.returncode == 0, done.stderr
  result = json.loads(file.read_text())
  assert ("input" in result) == (feed == "host")
  assert all(map(math.isfinite, numbers(result)))
  assert 0 < result["synthetic"]["mfu"] < 1
  rate = result["synthetic"]["images_per_second"]
  theirs = result["torch"]["images_per_second"]
  faster = result["torch"]["ours_is_faster"]["of_medians"]
  assert rate / theirs == pytest.approx(faster)
  assert result["synthetic"]["step_ms"]["median"] == pytest.approx(64e3 / rate)
  assert 0 <= result["end_to_end"]["share_waiting_for_input"] < 1
  origin = result["provenance"]
  assert origin["environment"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
  assert "--peak=1e12" in origin["command"]
  assert "torch.ours_is_faster.of_medians" in done.stdout


def test_wrong_usage_is_told_in_a_line():
  program = (
    "import sys\n"
    "sys.modules['torch'] = None\n"
    "import importlib.util as util\n"
    "find = util.find_spec\n"
    "util.find_spec = lambda x, *y: None if x == 'torch' else find(x, *y)\n"
    "from absl import app\n"
    "from umae_jax import command_line\n"
    "from umae_jax.benchmark import __main__ as benchmark\n"
    "app.run(benchmark.main, flags_parser=command_line.parse)\n"
  )
  for flags, message in [
    (["--against=torch"], "pip install 'umae_jax[torch]'"),
    (["--against=torch", "--config.data.image_size=(32,)"], "needs 2 numbers"),
    (["--config.mesh.fsdp=0"], "config.mesh.fsdp=0 must be greater than 0"),
    (["--config.task=finetune"], "the benchmark is of 'pretrain'"),
    (["--output=none/x.json"], "--output=none/x.json: there is no folder"),
  ]:
    done = run(*SMALL, *flags, program=("-c", program))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
