"""Run an existing, unmodified training script with TRL's trainer swapped for one of ours, in this process only.

```bash
accelerate launch -m trl_extras.run --trainer apo trl:dpo --num_rounds 3 --config recipe.yaml
torchrun --nproc_per_node 2 -m trl_extras.run --trainer my_package.my_module:MyTrainer dpo.py ...
```

A swap that silently does not happen trains the wrong method, so everything that could hide one is an error: the
class was never used, a flag or a YAML key was read by nobody, a flag is only the beginning of a name, or the script
starts another Python process, which would not be swapped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import mmap
import os
import re
import runpy
import shlex
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import ConfigurationError
from .registry import Method, MethodError, Swap, known_names, resolve


PROG = "trl-extras run"


class UserError(SystemExit):
    """A refusal, shown as one line without a traceback.

    It is a `SystemExit` so that `except Exception` in a script does not swallow it.
    """

    def __init__(self, message: str, status: int = 2, prog: str = PROG) -> None:
        self.message = " ".join(message.split())
        self.status = status
        # Where nobody catches it, the interpreter prints a SystemExit's text.
        super().__init__(f"{prog}: error: {self.message}")


# --- Names that nobody knows -----------------------------------------------------------------------------------------


def _is_flag(word: str) -> bool:
    """Whether argparse takes `word` for a flag: "-0.3" is a number."""
    return re.match(r"--?[A-Za-z]", word) is not None


def _flags(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(word.split("=", 1)[0] for word in words if _is_flag(word)))


def suggestion(name: str, known: Iterable[str]) -> str:
    """What to write instead of an unknown `name`, as the tail of an error message; empty if nothing comes near."""
    by_spelling: dict[str, str] = {}
    for option in sorted(known, reverse=True):  # "_" sorts after "-": the spelling with hyphens is written over
        by_spelling.setdefault(option.lstrip("-").replace("-", "_").lower(), option)
    wanted = name.lstrip("-").replace("-", "_").lower()
    longer = sorted(spelling for spelling in by_spelling if wanted and spelling.startswith(wanted))
    if name.startswith("--") and longer and wanted not in by_spelling:
        return f" (flags cannot be shortened); did you mean {' or '.join(by_spelling[key] for key in longer[:3])}?"
    close = difflib.get_close_matches(wanted, by_spelling, n=1)
    return f"; did you mean {by_spelling[close[0]]}?" if close and by_spelling[close[0]] != name else ""


def option_actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """A parser's options and those of its subparsers, by their spelling on the command line."""
    actions = dict(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                actions.update(option_actions(child))
    return actions


def _passes_on(parser: argparse.ArgumentParser) -> bool:
    """Whether a parser has subcommands or takes the rest of a line as it is: flags there are not its own."""
    return any(action.nargs in (argparse.REMAINDER, argparse.PARSER) for action in parser._actions)


class Ledger:
    """Who read which flag and which key.

    A script may parse in two steps, one parser passing on what it does not know to the next: a name is in error only
    once it was left over somewhere and read nowhere.

    Args:
        reader: what the messages call the program whose flags these are.
        prog: the first words of the error lines.
    """

    def __init__(self, reader: str, prog: str = PROG) -> None:
        self.reader = reader
        self.prog = prog
        self.known: set[str] = set()
        self.read: set[str] = set()
        self.left: dict[str, None] = {}  # in the order of appearance
        self.strict = False
        self.inside = False
        self.helped = False

    def note(self, read: Iterable[str], left: Iterable[str], known: Iterable[str]) -> None:
        """Take down what one parser read, what it left over and what it would have known."""
        self.read.update(read)
        self.left.update(dict.fromkeys(left))
        self.known.update(known)

    def error(self, message: str) -> UserError:
        """A refusal in this program's name."""
        return UserError(message, prog=self.prog)

    def unknown(self, names: Iterable[str]) -> UserError:
        """The refusal of names that nobody knows."""
        parts = []
        for name in names:
            hint = suggestion(
                name, (option for option in self.known if option.startswith("-") == name.startswith("-"))
            )
            if name in ("--plan", "--plan_json", "--plan_for"):
                hint = "; it belongs to `trl-extras METHOD`"
            if name == "--config":
                hint = "; where a config file is read, it is given as two words: --config FILE"
            parts.append(f"{name}{hint}")
        return self.error(f"{self.reader} does not know {', nor '.join(parts)}")

    def check(self) -> None:
        """Raise [`UserError`] if a flag or key was left over and nobody read it."""
        names = [name for name in self.left if name not in self.read]
        if names:
            raise self.unknown(names)

    @contextlib.contextmanager
    def mode(self, strict: bool) -> Iterator[None]:
        """Refuse left-overs at once (`strict`), or leave them to [`check`] because the caller asked for them."""
        before, self.strict = self.strict, strict
        try:
            yield
        finally:
            self.strict = before


def _replace(undo: contextlib.ExitStack, owner: type[Any], name: str, make: Callable[[Any], Any]) -> None:
    """Put `make(original)` in the place of a method until `undo` is closed."""
    original = vars(owner)[name]
    setattr(owner, name, functools.wraps(original)(make(original)))
    undo.callback(setattr, owner, name, original)


@contextlib.contextmanager
def strict_parsers(ledger: Ledger) -> Iterator[None]:
    """Make every argparse parser refuse unknown and shortened flags, and TRL's and transformers' unknown keys too.

    TRL's scripts ask for `fail_with_unknown_args=False`, so a misspelt YAML key would vanish. Errors, a config's
    `ValueError` included, become [`UserError`]s. Applies to this process, until the context is left.
    """
    from transformers import HfArgumentParser
    from trl import TrlParser

    # TRL's parser derives from a copy of transformers' that lives in TRL: two classes that share no code.
    families = {
        cls
        for parser in (HfArgumentParser, TrlParser)
        for cls in parser.__mro__
        if "parse_args_into_dataclasses" in vars(cls)
    }

    def init(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.allow_abbrev = False

        return __init__

    def error(original: Any) -> Any:
        def error(self: Any, message: str) -> NoReturn:
            # argparse would print its usage first: some 200 flags here.
            raise ledger.error(message)

        return error

    def exit_(original: Any) -> Any:
        def exit(self: Any, status: int = 0, message: str | None = None) -> None:
            ledger.helped = ledger.helped or not status
            original(self, status, message)

        return exit

    def parse_args(original: Any) -> Any:
        def parse_args(self: Any, *args: Any, **kwargs: Any) -> Any:
            with ledger.mode(strict=True):
                return original(self, *args, **kwargs)

        return parse_args

    def parse_known_args(original: Any) -> Any:
        def parse_known_args(self: Any, args: Any = None, namespace: Any = None, **kwargs: Any) -> Any:
            if ledger.inside:  # a subparser: what it leaves over comes back from its parent
                return original(self, args, namespace, **kwargs)
            words = list(sys.argv[1:] if args is None else args)
            known = option_actions(self)
            ledger.inside = True
            try:
                result, extras = original(self, words, namespace, **kwargs)
            except UserError:
                # "--output_dir is required" says little where "--output_dri" is on the line.
                strangers = [flag for flag in _flags(words) if flag not in known]
                if strangers and ledger.strict and not _passes_on(self):
                    ledger.note([], strangers, known)
                    raise ledger.unknown(strangers) from None
                raise
            finally:
                ledger.inside = False
            left = _flags(extras)
            ledger.note([flag for flag in _flags(words) if flag not in left], left, known)
            if left and ledger.strict:
                raise ledger.unknown(left)
            return result, extras

        return parse_known_args

    def into_dataclasses(original: Any) -> Any:
        def parse_args_into_dataclasses(self: Any, *args: Any, **kwargs: Any) -> Any:
            asked = inspect.signature(original).bind(self, *args, **kwargs).arguments
            try:
                with ledger.mode(strict=not asked.get("return_remaining_strings", False)):
                    return original(self, *args, **kwargs)
            except ValueError as problem:
                raise ledger.error(str(problem)) from problem

        return parse_args_into_dataclasses

    def parse_dict(original: Any) -> Any:
        def parse_dict(self: Any, args: dict[str, Any], allow_extra_keys: bool = False) -> Any:
            known = {field.name for cls in self.dataclass_types for field in dataclasses.fields(cls) if field.init}
            extras = [key for key in args if key not in known]
            ledger.note([key for key in args if key in known], extras, known)
            if extras and not allow_extra_keys:
                raise ledger.unknown(extras)
            try:
                return original(self, args, allow_extra_keys=allow_extra_keys)
            except ValueError as problem:
                raise ledger.error(str(problem)) from problem

        return parse_dict

    def args_and_config(original: Any) -> Any:
        def parse_args_and_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(original).bind(self, *args, **kwargs)
            wants_rest = bound.arguments.get("return_remaining_strings", False)
            words = list(sys.argv[1:] if bound.arguments.get("args") is None else bound.arguments["args"])
            if words and words[-1] == "--config":
                raise ledger.error("--config wants a file after it")
            try:
                with ledger.mode(strict=not wants_rest):
                    return original(*bound.args, **bound.kwargs)
            except (OSError, ValueError) as problem:
                raise ledger.error(str(problem)) from problem
            except Exception as problem:
                if type(problem).__module__.startswith("yaml"):
                    raise ledger.error(f"the config file is not valid YAML: {problem}") from problem
                raise

        return parse_args_and_config

    def defaults_with_config(original: Any) -> Any:
        def set_defaults_with_config(self: Any, **config: Any) -> Any:
            known = {action.dest for action in option_actions(self).values()}
            left = original(self, **config)
            keys = [key for key in config if f"--{key}" in left]
            if keys and ledger.strict:
                ledger.note([], keys, known)
                raise ledger.unknown(keys)
            # The caller gets them as flags, so another parser may read them as flags.
            ledger.note([], (f"--{key}" for key in keys), (f"--{name}" for name in known))
            return left

        return set_defaults_with_config

    with contextlib.ExitStack() as undo:
        _replace(undo, argparse.ArgumentParser, "__init__", init)
        _replace(undo, argparse.ArgumentParser, "error", error)
        _replace(undo, argparse.ArgumentParser, "exit", exit_)
        _replace(undo, argparse.ArgumentParser, "parse_args", parse_args)
        _replace(undo, argparse.ArgumentParser, "parse_known_args", parse_known_args)
        for family in families:
            _replace(undo, family, "parse_args_into_dataclasses", into_dataclasses)
            _replace(undo, family, "parse_dict", parse_dict)
        _replace(undo, TrlParser, "parse_args_and_config", args_and_config)
        _replace(undo, TrlParser, "set_defaults_with_config", defaults_with_config)
        yield


# --- Processes that would not be swapped -----------------------------------------------------------------------------

_LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "deepspeed",
    "ipython",
    "pypy",
    "pypy3",
    "torchrun",
    "trl",
    "trl-extras",
}
_SHELLS = {"bash", "dash", "ksh", "sh", "zsh"}
# Programs that run the command given to them as arguments.
_WRAPPERS = {
    *("conda", "env", "exec", "hatch", "ionice", "mamba", "micromamba", "mpiexec", "mpirun", "nice", "nohup"),
    *("numactl", "pdm", "poetry", "setsid", "srun", "stdbuf", "sudo", "taskset", "time", "timeout", "uv", "xargs"),
}
_SHELL_WORDS = {"!", "{", "then", "do", "else", "elif", "if", "while", "until", "builtin"}
# Workers of these libraries run code that is handed to them and train nothing; torch.distributed's launchers do.
_HELPERS = ("torch", "triton", "vllm", "wandb", "trackio")
_NOT_HELPERS = "torch.distributed"
_WORKER_CODE = ("from multiprocessing", "from multiprocess", "from joblib", "from torch._inductor")
_WORKER_MODULES = ("multiprocessing.", "multiprocess.", "joblib.", "torch._inductor.", "pip")
_EVENTS = {"subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.system"}


def _text(value: Any) -> str:
    return os.fsdecode(value) if isinstance(value, bytes | os.PathLike) else str(value)


def _runs_python(program: str) -> bool:
    name = os.path.basename(program).removesuffix(".exe")
    return re.fullmatch(r"python[w]?[\d.]*t?", name) is not None or program == sys.executable


def _is_worker(words: Sequence[str]) -> bool:
    """Whether a Python command line is a worker of multiprocessing and its like, of torch's compiler, or pip."""
    rest = list(words)
    while rest:
        word, following = rest[0], rest[1] if len(rest) > 1 else ""
        if word == "-c":
            return following.lstrip().startswith(_WORKER_CODE)
        if word == "-m":
            return following.startswith(_WORKER_MODULES)
        if word in ("-V", "--version"):
            return True
        if not word.startswith("-"):
            return "_inductor/compile_worker" in word.replace(os.sep, "/")
        del rest[: 2 if word in ("-X", "-W") else 1]  # these two take a value
    return False


def _shell_commands(line: str) -> Iterator[list[str]]:
    """The commands of a shell line, each as its words; substitutions count as commands of their own."""
    line = line.replace("`", " ; ").replace("$(", " ; ").replace("\n", " ; ")
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:  # an open quotation mark, often made by the replacements above
        words = re.split(r"[\s\"']+", re.sub(r"([;&|()<>]+)", r" \1 ", line))
    command: list[str] = []
    for word in [*words, ";"]:
        if word and set(word) <= set(";&|()"):
            if command:
                yield command
            command = []
        elif command or not (word in _SHELL_WORDS or re.match(r"\w+=", word)):
            command.append(word)


def _unswapped(program: str, words: Sequence[str]) -> bool:
    """Whether a command starts Python, TRL or a launcher of them; `words` is its argv."""
    name = os.path.basename(program)
    arguments = list(words[1:])
    if _runs_python(program):
        return not _is_worker(arguments)
    if name in _LAUNCHERS:
        return True
    if name in _SHELLS:
        for position, word in enumerate(arguments):
            if word.startswith("-") and not word.startswith("--") and word.endswith("c"):
                line = arguments[position + 1] if position + 1 < len(arguments) else ""
                return any(_unswapped(command[0], command) for command in _shell_commands(line))
            if not word.startswith(("-", "+")):
                return _script_is_unswapped(word)
        return False
    if name in _WRAPPERS:
        # Where the wrapped command begins is each wrapper's own matter: any word may be it.
        split = [part for word in arguments for part in (word.split() if name == "env" else [word])]
        starts = (_runs_python(word) or os.path.basename(word) in _LAUNCHERS | _SHELLS for word in split)
        return any(start and _unswapped(split[at], split[at:]) for at, start in enumerate(starts))
    # The environment's own programs (ninja, hf, ...) are often Python scripts: those are meant where they are named.
    if os.sep in program and os.path.dirname(os.path.abspath(program)) != sysconfig.get_path("scripts"):
        return _script_is_unswapped(program)
    return False


def _script_is_unswapped(path: str) -> bool:
    """Whether an executable text file is a Python script, or a shell script that starts one."""
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"#!" and not path.endswith(".sh"):
                return False
            file.seek(0)
            text = file.read(1 << 20).decode(errors="replace")
    except OSError:
        return False
    first, _, rest = text.partition("\n")
    if (
        first.startswith("#!")
        and (interpreter := first[2:].split())
        and not {*map(os.path.basename, interpreter)} & _SHELLS
    ):
        return _unswapped(interpreter[0], [*interpreter, path])
    return any(
        _unswapped(command[0], command)
        for line in rest.splitlines()
        if not line.lstrip().startswith("#")
        for command in _shell_commands(line)
    )


def _started_by_helper() -> bool:
    """Whether the process is being started by a library's own machinery rather than by the script."""
    frame = inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        package = module.split(".")[0]
        if module != __name__ and (package not in sys.stdlib_module_names or module == "__main__"):
            return package in _HELPERS and not module.startswith(_NOT_HELPERS)
        frame = frame.f_back
    return False


class _Watch:
    """What one run has seen: whether the trainer was used, and whether a process was refused.

    Both are kept in memory shared with forked processes: a script may train in one (`notebook_launcher`), or may be
    refused one there (`os.spawnv` forks before it starts a program).
    """

    def __init__(self, script: str, trainer: str, stock: str, ledger: Ledger) -> None:
        self.script, self.trainer, self.stock, self.ledger = script, trainer, stock, ledger
        self.pid = os.getpid()
        self._shared = mmap.mmap(-1, 1 + 2000)

    @property
    def used(self) -> bool:
        return self._shared[0] == 1

    @property
    def refused(self) -> str:
        return bytes(self._shared[1:]).rstrip(b"\0").decode(errors="ignore")

    def on_process(self, program: str, words: Sequence[str]) -> None:
        """Refuse a process that would run the stock class. The note outlives whatever the script catches."""
        if not _unswapped(program, words) or _started_by_helper():
            return
        command = shlex.join(words)
        command = command if len(command) <= 200 else command[:200] + " ..."
        message = (
            f"{self.script} would start another Python process, in which {self.stock} is not swapped: {command}; "
            f"start that program itself with: python -m trl_extras.run --trainer {self.trainer} ..."
        )
        if not self.refused:
            note = message.encode(errors="replace")[:2000]
            self._shared[1 : 1 + len(note)] = note
        if os.getpid() != self.pid:
            # In a worker of a pool an exit would leave its parent waiting; an error reaches it.
            raise RuntimeError(message)
        raise UserError(message, status=1)

    def check(self) -> None:
        """Raise [`UserError`] for what must not have happened until now."""
        if self.refused:
            raise UserError(self.refused, status=1)
        self.ledger.check()

    def check_end(self) -> None:
        """Raise [`UserError`] if a script that ended well did not do what it was started for."""
        self.check()
        if not self.used and not self.ledger.helped:
            raise UserError(
                f"{self.script} ended without using {self.stock}, so nothing was trained with {self.trainer}", status=1
            )

    @contextlib.contextmanager
    def construction(self, trainer: type[Any]) -> Iterator[None]:
        """Note each construction of the trainer, and check the flags before it loads any weights."""
        own = "__init__" in vars(trainer)
        original = trainer.__init__

        @functools.wraps(original)
        def __init__(this: Any, *args: Any, **kwargs: Any) -> None:
            self.check()
            original(this, *args, **kwargs)
            self._shared[0] = 1

        setattr(trainer, "__init__", __init__)  # noqa: B010 (an assignment would not pass the type checker)
        try:
            yield
        finally:
            if own:
                setattr(trainer, "__init__", original)  # noqa: B010
            else:
                delattr(trainer, "__init__")


_watch: _Watch | None = None
_hooked = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watch is None or event not in _EVENTS:
        return
    if event == "os.system":
        _watch.on_process("sh", ["sh", "-c", _text(args[0])])
        return
    program, words = args[1:3] if event == "os.spawn" else args[:2]
    # A string instead of a list: Popen on Windows.
    listed = shlex.split(_text(words)) if isinstance(words, str | bytes) else [_text(word) for word in words or ()]
    _watch.on_process(_text(program or (listed or [""])[0]), listed or [_text(program)])


@contextlib.contextmanager
def _watching(watch: _Watch) -> Iterator[None]:
    global _hooked, _watch
    if not _hooked:
        # An audit hook stays for the life of the process: without a watch it does nothing.
        sys.addaudithook(_audit)
        _hooked = True
    _watch = watch
    try:
        yield
    finally:
        _watch = None


# --- The swap --------------------------------------------------------------------------------------------------------


def _trl_modules() -> dict[str, Any]:
    return {name: module for name, module in list(sys.modules.items()) if name == "trl" or name.startswith("trl.")}


@contextlib.contextmanager
def swapped(swap: Swap) -> Iterator[None]:
    """Let every TRL module offer the swapped classes under the stock ones' names; undone on leaving.

    The classes must be imported before: their bases would otherwise be themselves.
    """
    import trl
    import trl.trainer

    pairs = [
        (stock.__name__, stock, new)
        for stock, new in ((swap.stock_trainer, swap.trainer), (swap.stock_config, swap.config))
        if stock is not new
    ]
    for name, _, _ in pairs:
        for package in (trl, trl.trainer):
            getattr(package, name, None)  # lazy: not in the module's dict before it is asked for
    before = _trl_modules()
    changed: list[tuple[Any, str, type[Any]]] = []
    for module in before.values():
        for name, stock, new in pairs:
            if vars(module).get(name) is stock:
                changed.append((module, name, stock))
                setattr(module, name, new)
    try:
        yield
    finally:
        # Modules that the script was the first to import have taken over the swapped names.
        for key, module in _trl_modules().items():
            for name, stock, new in pairs:
                if key not in before and vars(module).get(name) is new:
                    setattr(module, name, stock)
        for module, name, stock in changed:
            setattr(module, name, stock)


@contextlib.contextmanager
def _as_main(script: str, arguments: Sequence[str], replace_path: bool) -> Iterator[None]:
    """`sys.argv` and `sys.path` as `python SCRIPT` sets them."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:
        sys.path[: 1 if replace_path else 0] = [os.path.dirname(os.path.realpath(script))]
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = path


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, kind):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def script_path(script: str) -> str:
    """The file that a script's path, or `trl:NAME` for one of `trl.scripts`, stands for; nothing is imported."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "scripts"
    path = folder / f"{script.removeprefix('trl:')}.py" if script.startswith("trl:") else Path(script)
    if path.is_file():
        return str(path)
    known = sorted(f"trl:{file.stem}" for file in folder.glob("*.py") if "__main__" in file.read_text("utf-8"))
    hint = ""
    if script.startswith("trl:"):
        hint = f"; of TRL's own there are {', '.join(known)}"
    elif f"trl:{path.stem}" in known:
        hint = f"; TRL's own is trl:{path.stem}"
    raise UserError(f"there is no script {script!r}{hint}")


def run_script(name: str, script: str, arguments: Sequence[str] = (), *, replace_path: bool = False) -> None:
    """Run `script` as `__main__` with the classes of the method `name` in the place of TRL's.

    Args:
        name: a method's name, or `package.module:Class`.
        script: path of a Python file, or `trl:NAME` for one of TRL's own.
        arguments: its command line.
        replace_path: whether `sys.path[0]` belongs to this program (started with `-m`) and makes place for the
            script's folder.

    Raises:
        UserError: for everything that this module's first lines list; whatever the script raises comes out as it is.
    """
    script = script_path(script)
    try:
        method = resolve(name)
        swap = method.load()
    except MethodError as problem:
        raise UserError(str(problem)) from problem
    label = os.path.basename(script)
    ledger = Ledger(label)
    watch = _Watch(label, name, swap.stock_trainer.__name__, ledger)
    if os.environ.get("RANK", "0") in ("0", "-1"):
        print(f"trl-extras: {_describe(method, swap)} in {script}", file=sys.stderr, flush=True)
    path = os.path.abspath(script)
    with (
        _as_main(path, arguments, replace_path),
        strict_parsers(ledger),
        swapped(swap),
        watch.construction(swap.trainer),
        _watching(watch),
    ):
        try:
            runpy.run_path(path, run_name="__main__")
        except UserError:
            raise
        except ConfigurationError as problem:
            raise UserError(str(problem)) from problem
        except SystemExit as leaving:
            if not leaving.code:
                watch.check_end()
            elif watch.refused:
                raise UserError(watch.refused, status=1) from leaving
            raise
        except Exception as problem:
            if watch.refused and _caused_by(problem, UserError):
                raise UserError(watch.refused, status=1) from problem
            if watch.refused:
                report(UserError(watch.refused))
            raise
        watch.check_end()


def _describe(method: Method, swap: Swap) -> str:
    config = method.config or f"{swap.config.__module__}:{swap.config.__qualname__}"
    return (
        f"{swap.stock_trainer.__name__} -> {method.trainer.replace(':', '.')}, "
        f"{swap.stock_config.__name__} -> {config.replace(':', '.')}"
    )


# --- The command line ------------------------------------------------------------------------------------------------

_USAGE = """\
usage: accelerate launch [...] -m trl_extras.run --trainer NAME SCRIPT [script arguments]

Run an existing, unmodified script with TRL's trainer and config swapped, in this process only.

  SCRIPT           a Python file, or trl:dpo, trl:sft and so on for TRL's own
  --trainer NAME   the class to train with: {names}, or package.module:Class
  -h, --help       show this and leave; after SCRIPT it shows the script's own help

Also: torchrun [...] -m trl_extras.run ..., python -m trl_extras.run ...

It fails if the script never uses the swapped class, if a flag or YAML key is read by nobody, if a flag is shortened,
and if the script would start another Python process, which would not be swapped.
"""


def report(error: UserError, prog: str = PROG) -> int:
    """Print a refusal as one line; returns the exit status."""
    rank = os.environ.get("RANK", "0")
    where = "" if rank in ("0", "-1") else f"[rank {rank}] "
    print(f"{prog}: error: {where}{error.message}", file=sys.stderr, flush=True)
    return error.status


def _split(argv: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """Trainer, script and the script's arguments; `None` if help is asked for."""
    words = list(argv)
    trainer: str | None = None
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word in ("-h", "--help"):
            return None
        if word == "--trainer" and words:
            trainer = words.pop(0)
        elif word.startswith("--trainer="):
            trainer = word.partition("=")[2]
        elif word == "--trainer":
            raise UserError("--trainer wants a name after it")
        else:
            flag = word.split("=", 1)[0]
            raise UserError(f"unknown flag {flag} before the script{suggestion(flag, ['--trainer', '--help'])}")
    if not trainer:
        raise UserError(f"--trainer NAME is missing before the script; known are {', '.join(known_names())}")
    if not words:
        raise UserError("the script is missing: --trainer NAME SCRIPT [script arguments]")
    return trainer, words[0], words[1:]


def main(argv: Sequence[str] | None = None, *, replace_path: bool = False) -> int:
    """Run the launcher; returns the exit status. What the script raises comes out of it."""
    try:
        request = _split(sys.argv[1:] if argv is None else argv)
        if request is None:
            print(_USAGE.format(names=", ".join(known_names())), end="")
            return 0
        trainer, script, arguments = request
        run_script(trainer, script, arguments, replace_path=replace_path)
    except UserError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    # Under `-m` this file is __main__, a second copy with its own state, and the script takes that name over.
    from trl_extras.run import main as _main

    raise SystemExit(_main(replace_path=True))
