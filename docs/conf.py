"""The site of documents and API: sphinx-build -W -c docs . build/docs."""

import contextlib
import functools
import importlib
import inspect
import pkgutil
import re

from absl import flags
from sphinx.util import logging

import umae_jax
from umae_jax import config as config_lib

LOGGER = logging.getLogger(__name__)

project = "umae_jax"
version = release = umae_jax.__version__
extensions = ["myst_parser", "sphinx.ext.napoleon"]
extensions += ["sphinx.ext.autodoc", "sphinx.ext.apidoc"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "launch/*.md"]
exclude_patterns = ["build", "runs", ".*", "docs/api/modules.rst"]
html_theme = "furo"
html_title = project
html_copy_source = False
html_show_copyright = False
smartquotes_action = "D"  # Not the quotes: "image" is a key.
highlight_language = "none"
myst_heading_anchors = 3
nitpicky = True  # A name that leads nowhere is an error.
# There is no network in CI to look up others' types.
nitpick_ignore_regex = [("py:.*", r"(?!umae_jax\b).*")]

apidoc_modules = [
  {
    "path": "../umae_jax",
    "destination": "docs/api",
    "separate_modules": True,
    "module_first": True,
    "exclude_patterns": ["../umae_jax/**/__main__.py"],
    "automodule_options": ["members", "show-inheritance", "ignore-module-all"],
  }
]
apidoc_max_depth = 1
autodoc_default_options = {"special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

# Every module, imported. Two programs may have a flag of the same name, which
# absl refuses in one process: it forgets them after each.
MODULES, FLAGS = {"umae_jax": umae_jax}, set(flags.FLAGS)
for _, name, _ in pkgutil.walk_packages(umae_jax.__path__, "umae_jax."):
  if not name.endswith(".__main__"):
    MODULES[name] = importlib.import_module(name)
    for flag in set(flags.FLAGS) - FLAGS:
      delattr(flags.FLAGS, flag)
HEADS = {part for name in MODULES for part in name.split(".")}
KEYS = config_lib.flatten(config_lib.defaults())
FILE = re.compile(r"[\w.]+\.(csv|jsonl?|npz|png|py|safetensors)")
SPECIAL = re.compile(r"[\\*|]|_\b|(?<=\b\w)\.")  # To RST, and no more.
NAME = re.compile(r"(\w+(?:\.\w+)*)(?:\(.*\))?", re.DOTALL)


def find(name, scope):
  """What `name` is in a docstring of `scope`, a full dotted name, or None."""
  parts, name = scope.split("."), name.removeprefix("umae_jax.")
  for n in range(len(parts), 0, -1):  # From the inside out.
    full = ".".join([*parts[:n], name])
    *_, module = (m for m in MODULES if f"{full}.".startswith(f"{m}."))
    rest = full.removeprefix(module).split(".")[1:]
    with contextlib.suppress(AttributeError):
      return functools.reduce(getattr, rest, MODULES[module])
  return None


def target(found):
  """The full name under which the site documents an object, or None."""
  if inspect.ismodule(found):
    return found.__name__ if found.__name__ in MODULES else None
  name = (
    f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
  )
  private = re.search(r"\._(?!_call__)|<", name)
  public = name.startswith("umae_jax.") and not private
  return name if public and inspect.getdoc(found) else None


def code(text, scope, obj):
  """RST of what the docstring of an object has between backticks."""
  text = " ".join(text.split())
  name = NAME.fullmatch(text)
  if (
    not name
    or FILE.fullmatch(text)
    or text in getattr(obj, "__annotations__", ())
  ):
    return f"``{text}``"
  holds = inspect.isclass(obj) or inspect.ismodule(obj)
  found = find(name[1], scope if holds else scope.rpartition(".")[0])
  head, _, rest = name[1].partition(".")
  if found is None and rest and head in HEADS:
    key = head == "config" and any(f"{k}.".startswith(f"{rest}.") for k in KEYS)
    if not key:
      LOGGER.warning("%s: there is no `%s`", scope, text)
  # One word may mean much; a module's docstring means its neighbours.
  vague = not rest and inspect.ismodule(found) and not inspect.ismodule(obj)
  link = None if vague else target(found)
  return f":py:obj:`{text} <{link}>`" if link else f"``{text}``"


def to_rst(app, what, scope, obj, options, lines):
  """Docstrings of plain text with code in backticks, to what Sphinx reads."""
  del app, what, options
  paragraphs, last = re.split(r"\n\s*\n", "\n".join(lines)), 0
  for i, text in enumerate(paragraphs):
    indent = len(text) - len(text.lstrip())
    if i and indent > last:  # More than what is above it: as it stands.
      paragraphs[i] = f"{' ' * last}::\n\n{text}"
      continue
    pieces = re.split(r"`([^`]+)`", text)
    pieces[::2] = (SPECIAL.sub(r"\\\g<0>", x) for x in pieces[::2])
    pieces[1::2] = (code(x, scope, obj) for x in pieces[1::2])
    text = "\\ ".join(pieces)  # What RST needs before and after such code.
    # Napoleon would take what precedes a colon for a type.
    paragraphs[i] = re.sub(r"^( *)Returns:\n", r"\1:returns:\n", text)
    if match := re.match(r" *Returns:\n( *)\w+: ", text):  # Several, named.
      each = re.compile(rf"^{match[1]}(\w+): ", re.M)
      paragraphs[i] = each.sub(rf"{match[1]}* **\1** -- ", paragraphs[i])
    end = text.rpartition("\n")[2]
    last = len(end) - len(end.lstrip())
  lines[:] = "\n\n".join(paragraphs).split("\n")


def signature(app, what, name, obj, options, arguments, result):
  """Without the two fields that Flax adds to every module."""
  del app, what, name, obj, options
  if arguments:
    arguments = re.sub(r", parent: .*, name: .*?(?=\))", "", arguments)
    arguments = arguments.replace("<factory>", "...")
  return arguments, result


def skip(app, what, name, obj, skipped, options):
  """Fields are told by the signature and `Attributes:`, and not once more."""
  del app, name, options
  methods = (property, functools.cached_property)
  told = what == "class" and not (callable(obj) or isinstance(obj, methods))
  return skipped or told


def heading(app, docname, source):
  """`models.mae` is title enough."""
  del app
  if docname.startswith("docs/api/"):
    source[0] = re.sub(r"^umae\\_jax\.(\S+) \w+$", r"\1", source[0], flags=re.M)


def setup(app):
  """Connects the above; docstrings before napoleon reads them."""
  app.connect("autodoc-process-docstring", to_rst, priority=400)
  app.connect("autodoc-process-signature", signature)
  app.connect("autodoc-skip-member", skip)
  app.connect("source-read", heading)
