"""Downloads, from a server on this machine."""

import functools
import http.server
import pathlib
import threading

import pytest

from umae_jax import UserError, convert
from umae_jax.convert import fetch

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
WEIGHTS = (REFERENCE / "mae_p8_normpix.safetensors").read_bytes()


class Handler(http.server.BaseHTTPRequestHandler):
  """Serves the weights; /short breaks off; /hub/ is a hub's repository."""

  def do_GET(self):
    if "missing" in self.path:
      return self.send_error(404)
    self.server.asked.append(self.path)
    body = b"{}" if self.path.endswith("config.json") else WEIGHTS
    self.send_response(200)
    self.send_header("Content-Length", str(len(body)))
    self.send_header("ETag", '"0123456789012345678901234567890123456789"')
    self.send_header("X-Repo-Commit", "0" * 40)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(body[: 1000 if "short" in self.path else None])
    return None

  do_HEAD = do_GET

  def log_message(self, *_):
    pass


@pytest.fixture
def server(tmp_path, monkeypatch):
  """(address, paths asked for); the cache is tmp_path / "cache"."""
  for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("UMAE_JAX_CACHE", str(tmp_path / "cache"))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    server.asked = []
    thread = threading.Thread(
      target=functools.partial(server.serve_forever, poll_interval=0.01)
    )
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", server.asked
    server.shutdown()
    thread.join()


def test_a_file_is_downloaded_once(server, tmp_path, capsys):
  address, asked = server
  url = f"{address}/a/weights.safetensors?download=1"
  path = fetch.local(url)
  assert path.read_bytes() == WEIGHTS and path.parent == tmp_path / "cache"
  assert f"sha256 {fetch.files.sha256(path)}" in capsys.readouterr().err
  assert fetch.local(url) == path and len(asked) == 1
  model, _ = convert.load_pretrained(url, num_heads=4, decoder_num_heads=3)
  assert model.width == 32
  assert fetch.local(f"{address}/b.safetensors") != path
  assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
  "place, message",
  [
    ("/short.safetensors", "1000 of .* bytes arrived"),
    ("/missing.safetensors", "404"),
    ("/weights.bin", "expected the address of one of"),
    ("/../../etc/passwd", "expected the address of one of"),
  ],
)
def test_a_failed_download_leaves_nothing(server, tmp_path, place, message):
  with pytest.raises(UserError, match=message):
    fetch.local(server[0] + place)
  assert not list(tmp_path.glob("cache/*"))


def test_without_a_network_the_address_and_the_remedy_are_told(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("UMAE_JAX_CACHE", str(tmp_path))
  url = "http://127.0.0.1:9/x.pth"
  with pytest.raises(UserError, match=rf"{url} cannot.*give its path"):
    fetch.local(url)
  with pytest.raises(UserError, match=r"give a local path, hf://"):
    fetch.local("ftp://127.0.0.1/x.pth")
  with pytest.raises(UserError, match="expected hf://owner/name"):
    fetch.local("hf://name")


@pytest.mark.filterwarnings("ignore")
def test_the_hub(server, tmp_path, monkeypatch):
  hub = pytest.importorskip("huggingface_hub", reason="is not installed")
  download = functools.partial(
    hub.hf_hub_download, endpoint=server[0], cache_dir=tmp_path / "hub"
  )
  monkeypatch.setattr(hub, "hf_hub_download", download)
  path = fetch.local("hf://owner/name/sub/weights.safetensors")
  assert path.read_bytes() == WEIGHTS
  folder = fetch.local("hf://owner/name")
  assert (folder / "model.safetensors").read_bytes() == WEIGHTS
  assert (folder / "config.json").exists()
  with pytest.raises(UserError, match=r"hf://owner/name/missing\.pth cannot"):
    fetch.local("hf://owner/name/missing.pth")
