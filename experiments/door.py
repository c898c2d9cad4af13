"""The door of every program: flags, config overrides, errors as one sentence, the result as the last line of output."""

import difflib
import inspect
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import supervise

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config: a file of configs/ (or FILE:ARGUMENT).", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run folder to write (default: runs/<path of the config>).")
_RESTARTS = flags.DEFINE_integer("restarts", 0, "Start again from what is saved, at most so often, when killed or left alone.")
_RESTART_S = flags.DEFINE_float("restart_s", 5.0, "Seconds between a loss and the next start.")


def launch(main: Callable[[Any, Path], dict[str, Any]], doc: str) -> None:
    """Run `main(config, workdir)`, with --config, --workdir and overrides of any field; `doc` is the --help text."""

    def program() -> dict[str, Any]:
        # An unreadable config is stored as an error that any access raises; look at the file first.
        name = config_flags.get_config_filename(flags.FLAGS["config"]) if flags.FLAGS["config"].present else ""
        if not name:
            raise ValueError("--config=FILE is missing; --help shows an example")
        if not Path(name.split(":")[0]).is_file():
            raise FileNotFoundError(f"config {name} does not exist; see configs/")
        workdir = Path(_WORKDIR.value or default_workdir(name))
        if _RESTARTS.value:
            program = sys.modules["__main__"].__spec__.name
            command = [sys.executable, "-m", program, *sys.argv[1:], "--restarts=0"]  # the last one counts
            log = workdir / "metrics.jsonl"
            sys.exit(supervise.keep_running(command, restarts=_RESTARTS.value, wait_s=_RESTART_S.value, log=log))
        return main(_CONFIG.value, workdir)

    _run(program, doc, "--config=FILE.py  --workdir=FOLDER  --restarts=N  --config.section.field=value (any field of the config)")


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


def override(config: Any, changes: Mapping[str, Any]) -> Any:
    """The config with fields ({"optim.learning_rate": 1e-3}) changed in place; ValueError for unknown ones and wrong types."""
    for field, value in changes.items():
        *sections, last = field.split(".")
        place = config
        for section in sections:
            place = place.get(section) if isinstance(place, ConfigDict) else None
        if not isinstance(place, ConfigDict) or last not in place:
            near = difflib.get_close_matches(field, [name for name, _ in _fields(config)], n=1)
            raise ValueError(f"the config has no field {field!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        try:
            place[last] = value
        except TypeError:
            kind = type(place[last]).__name__
            raise ValueError(f"{field}={value!r} is {type(value).__name__}, {kind} is wanted") from None
    return config


def _fields(section: ConfigDict, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        yield f"{above}{name}", value
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{above}{name}.")


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
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        os._exit(code)  # Python's own way out would wait for the other processes, which wait for this one
    sys.exit(code)
