"""The door of every program: flags, config overrides, errors as one sentence, the result as the last line of output."""

import inspect
import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config: a file of configs/ (or FILE:ARGUMENT).", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run folder to write (default: runs/<path of the config>).")


def launch(main: Callable[[Any, Path], dict[str, Any]], doc: str) -> None:
    """Run `main(config, workdir)`, with --config, --workdir and overrides of any field; `doc` is the --help text."""

    def program() -> dict[str, Any]:
        # An unreadable config is stored as an error that any access raises; look at the file first.
        name = config_flags.get_config_filename(flags.FLAGS["config"]) if flags.FLAGS["config"].present else ""
        if not name:
            raise ValueError("--config=FILE is missing; --help shows an example")
        if not Path(name.split(":")[0]).is_file():
            raise FileNotFoundError(f"config {name} does not exist; see configs/")
        workdir = _WORKDIR.value or default_workdir(name)
        return main(_CONFIG.value, Path(workdir))

    _run(program, doc, "--config=FILE.py  --workdir=FOLDER  --config.section.field=value (any field of the config)")


def tool(main: Callable[[], dict[str, Any]], doc: str) -> None:
    """Run `main()` of a tool that defined flags of its own."""
    names = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
    _run(main, doc, "  ".join(f"--{name}" for name in names))


def _run(program: Callable[[], dict[str, Any]], doc: str, usage: str) -> None:
    """What a user can mend (ValueError, a missing file, a full disk) ends as one sentence and exit code 1.

    Anything else is our mistake and keeps its traceback; SWALLOW_TRACEBACK=1 shows it for the others too.
    """
    if any(arg in ("--help", "-h", "-help") for arg in sys.argv[1:]):
        print(f"{doc.strip()}\n\nflags: {usage}")
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

    def body(argv: list[str]) -> None:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; flags look like --name=value")
        logging.set_verbosity(logging.FATAL)  # Orbax narrates every file it writes, and prints the traceback of a full disk
        _compilation_cache()
        print(json.dumps(program(), ensure_ascii=False), flush=True)

    try:
        app.run(body, flags_parser=lambda argv: flags.FLAGS(argv))
    except KeyboardInterrupt:
        if os.environ.get("SWALLOW_TRACEBACK"):
            raise
        _stop("interrupted; the same command goes on from what is saved", code=130)
    except flags.Error as error:
        if os.environ.get("SWALLOW_TRACEBACK"):
            raise
        first, *rest = str(error).strip().splitlines()  # an error inside a config comes with its traceback; its last line tells
        _stop(f"{first} {rest[-1]}; correct it, or set SWALLOW_TRACEBACK=1 to see where" if rest else first)
    except SyntaxError as error:
        if os.environ.get("SWALLOW_TRACEBACK"):
            raise
        _stop(f"{error.filename}:{error.lineno}: no Python ({error.msg}); a config is a .py file with get_config()")
    except (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        if os.environ.get("SWALLOW_TRACEBACK"):
            raise
        system = isinstance(error, OSError) and error.errno and error.filename
        _stop(f"{error.filename}: {error.strerror}; correct the path or choose another" if system else str(error))
    except (KeyError, AttributeError, TypeError) as error:
        # ml_collections reports a misspelt or mistyped override with these; elsewhere they are bugs of ours.
        if os.environ.get("SWALLOW_TRACEBACK") or not _from_config(error):
            raise
        words = str(error.args[0] if error.args else error)
        field, guess = re.match(r"[\\\"']*(\w+)[\\\"']*(?:\n|\\n|$)", words), re.search(r'Did you mean "(\w+)"', words)
        if field is None or isinstance(error, TypeError):
            _stop(f"config: {words}")
        hint = f"did you mean {guess[1]!r}?" if guess else "the config's file lists its fields, --help names one for this program"
        _stop(f"the config has no field {field[1]!r}; {hint}")
    except OSError as error:
        if error.errno is None:
            raise
        _stop(f"{error.strerror}: {error.filename or 'while writing'}; free some space or choose another --workdir")


def _from_config(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if "ml_collections" in trace.tb_frame.f_code.co_filename:
            return True
        trace = trace.tb_next
    return False


def default_workdir(config_file: str) -> Path:
    """runs/cpt/tiny for configs/cpt/tiny.py."""
    path = Path(config_file.split(":")[0]).with_suffix("")
    parts = path.parts[path.parts.index("configs") + 1 :] if "configs" in path.parts else (path.name,)
    return Path("runs", *parts)


def load_config(config_file: str, *, runs: str = "") -> Any:
    """The locked config of FILE or FILE:ARGUMENT, as --config would give it; `runs` goes to a get_config that takes it."""
    name, _, argument = config_file.partition(":")
    if not Path(name).is_file():
        raise FileNotFoundError(f"config {name} does not exist; see configs/")
    get_config = runpy.run_path(name)["get_config"]
    given = [argument] if argument else []
    left = list(inspect.signature(get_config).parameters)[len(given) :]
    return get_config(*given, **({"runs": runs} if runs and "runs" in left else {})).lock()


def _compilation_cache() -> None:
    """Compiled programs are kept between runs (JAX_COMPILATION_CACHE_DIR overrides the place)."""
    place = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "swallow_jax" / "xla"
    settings = {"JAX_COMPILATION_CACHE_DIR": str(place), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)  # read when jax is imported
        if "jax" in sys.modules:
            kind = float if name.endswith("SECS") else str
            sys.modules["jax"].config.update(name.lower(), kind(os.environ[name]))


def _stop(sentence: str, *, code: int = 1) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(code)
