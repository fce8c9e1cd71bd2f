"""The console script `trl-extras`.

Nothing heavy is imported before a command is known: `trl-extras --help` loads neither torch nor trl.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .registry import BUILT_IN, registered
from .run import Ledger, UserError, option_actions, report, suggestion
from .run import main as run_main


_SCRIPTS = Path(__file__).parent / "scripts"
# They would have accelerate start something else than the method's script.
_NOT_FOR_US = {"-h", "--help", "-m", "--module", "--no_python", "--no-python"}
# Say what a run would take, instead of running it; and on what kind of machine.
_PLAN = ("--plan", "--plan_json")
_MACHINES = ("gpu", "cpu")
# transformers' words for bf16 without a GPU.
_NO_GPU = "support bf16/gpu"

_HELP = """\
usage: trl-extras COMMAND ...

  METHOD --config recipe.yaml [flags]
                  train; also takes the flags of `accelerate launch`, and --accelerate_config, on the command line or
                  in the YAML file. With --plan it says what the run would take, and trains nothing. The methods:
{methods}

  run --trainer NAME SCRIPT [script arguments]
                  run an existing, unmodified TRL script (trl:dpo, trl:sft and so on for TRL's own) with the class
                  swapped, in this process; with several processes:
                  accelerate launch -m trl_extras.run --trainer NAME SCRIPT ...
  extrapolate NEW OLD --alpha A -o OUT
                  extrapolate between two checkpoints on disk

  -h, --help      show this, or after a command its own help
  --version       show the version

trainers for `run --trainer`: {trainers}, or package.module:Class
"""


def methods() -> list[str]:
    """The registered methods that have a script of their own, and so a subcommand."""
    return [name for name in BUILT_IN if (_SCRIPTS / f"{name}.py").is_file()]


def help_text() -> str:
    """The text of `trl-extras --help`."""
    # The scripts import neither torch nor trl before they are run.
    summaries = {name: import_module(f"trl_extras.scripts.{name}").script.summary for name in methods()}
    indent = " " * 18
    lines = [
        textwrap.fill(text, 115, initial_indent=f"    {name}".ljust(18), subsequent_indent=indent)
        for name, text in summaries.items()
    ]
    trainers = [*BUILT_IN, *(f"{name} ({method.trainer})" for name, method in sorted(registered().items()))]
    return _HELP.format(methods="\n".join(lines), trainers=", ".join(trainers))


def _launcher_options(error: Ledger) -> tuple[Any, dict[str, argparse.Action]]:
    """`accelerate launch`'s parser and its options, `--accelerate_config` and those of the plan included."""
    from accelerate.commands.launch import launch_command_parser

    parser: Any = launch_command_parser()

    def refuse(message: str) -> NoReturn:
        raise error.error(message)

    parser.error = refuse  # argparse's own prints the usage first
    options = {flag: action for flag, action in option_actions(parser).items() if flag not in _NOT_FOR_US}
    ours = argparse.ArgumentParser(add_help=False)
    ours.add_argument("--accelerate_config")
    for flag in _PLAN:
        ours.add_argument(flag, action="store_true")
    ours.add_argument("--plan_for", choices=_MACHINES)
    return parser, options | option_actions(ours)


def _split_words(
    words: Sequence[str], script: dict[str, argparse.Action], launcher: dict[str, argparse.Action], error: Ledger
) -> tuple[list[str], dict[str, list[str]]]:
    """Part a command line into the script's words and the launcher's options by destination.

    Raises [`UserError`] for a flag that neither knows, a shortened one included.
    """
    ours: list[str] = []
    theirs: dict[str, list[str]] = {}
    unknown: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("-") or word[1:2].isdigit() or word[1:2] in (".", ""):
            ours.append(word)
        elif flag == "--config":
            ours += [flag, value] if equals else [flag, *rest[:1]]
            del rest[: 0 if equals else 1]
        elif flag in script:
            ours.append(word)
        elif flag not in launcher:
            unknown.append(flag)
        elif launcher[flag].nargs == 0:
            if equals:
                raise error.error(f"{flag} takes no value")
            theirs[launcher[flag].dest] = [flag]
        else:
            if not equals:
                if not rest:
                    raise error.error(f"{flag} wants a value after it")
                value = rest.pop(0)
            # Options that may be repeated collect; of the others the last one counts, as in argparse.
            before = theirs.get(launcher[flag].dest, []) if isinstance(launcher[flag], argparse._AppendAction) else []
            theirs[launcher[flag].dest] = [*before, flag, value]
    if unknown:
        raise error.unknown(unknown)
    return ours, theirs


def _from_yaml(flag: str, action: argparse.Action, value: Any, error: Ledger) -> list[str]:
    """A launcher key of a YAML file as words of a command line."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise error.error(f"{flag.lstrip('-')} is a switch: in YAML it is true or false, not {value!r}")
        return [flag] if value else []
    if value is None:
        return []
    return [word for item in (value if isinstance(value, list) else [value]) for word in (flag, str(item))]


def _read_yaml(path: str, error: Ledger) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as problem:
        raise error.error(f"cannot read the config file {path}: {problem}") from problem
    if not isinstance(content, dict):
        raise error.error(f"the config file {path} must be a YAML mapping, not {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


@contextlib.contextmanager
def _without_launcher_keys(
    ours: list[str],
    theirs: dict[str, list[str]],
    script: dict[str, argparse.Action],
    launcher: dict[str, argparse.Action],
    error: Ledger,
) -> Iterator[list[str]]:
    """Move the launcher's keys of the YAML file into `theirs`; gives the script's words, naming a file without them.

    The command line wins over the file. The new file lives until the context is left, because the launched processes
    read it.
    """
    if "--config" not in ours:
        yield ours
        return
    at = ours.index("--config") + 1
    if at == len(ours):
        raise error.error("--config wants a file after it")
    content = _read_yaml(ours[at], error)
    fields = {"env", *(action.dest for action in script.values())}
    kept = {key: value for key, value in content.items() if key in fields}
    moved = {key: value for key, value in content.items() if key not in fields}
    unknown = [key for key in moved if f"--{key}" not in launcher]
    if unknown:
        names = [name.lstrip("-") for name in launcher if name.startswith("--")]
        error.note([], unknown, [*fields, *names])
        raise error.unknown(unknown)
    if not moved:
        yield ours
        return
    import yaml

    for key, value in moved.items():
        action = launcher[f"--{key}"]
        theirs.setdefault(action.dest, _from_yaml(f"--{key}", action, value, error))
    with tempfile.TemporaryDirectory(prefix="trl-extras-") as folder:
        path = os.path.join(folder, os.path.basename(ours[at]))
        with open(path, "w", encoding="utf-8") as file:
            yaml.safe_dump(kept, file, sort_keys=False, allow_unicode=True)
        yield [*ours[:at], path, *ours[at + 1 :]]


def _launch(arguments: argparse.Namespace) -> int:
    """Run `accelerate launch` and wait; a failed child has said why, so that only its status is passed on."""
    from accelerate.commands.launch import launch_command

    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as failed:
        return failed.returncode if failed.returncode > 0 else 128 - failed.returncode
    except Exception as failed:
        # torchrun's report of the processes that failed, as a table.
        if type(failed).__name__ == "ChildFailedError":
            print(failed, file=sys.stderr)
            return 1
        raise
    return 0


def _machine(words: list[str], plans: bool, error: Ledger) -> str | None:
    """What `--plan_for` says."""
    if not words:
        return None
    value = words[-1]
    if not plans:
        raise error.error(f"--plan_for is {value!r}, but nothing is planned: it wants --plan or --plan_json beside it")
    if value not in _MACHINES:
        raise error.error(f"--plan_for is {value!r}, but wants {' or '.join(_MACHINES)}")
    return value


def train(name: str, argv: Sequence[str]) -> int:
    """`trl-extras NAME ...`: launch the method's script as `trl dpo` launches TRL's, refusing unknown names first."""
    prog = f"trl-extras {name}"
    error = Ledger(prog, prog)
    module = import_module(f"trl_extras.scripts.{name}")
    parser: argparse.ArgumentParser = module.make_parser(prog=prog)
    script = option_actions(parser)
    if any(word in ("-h", "--help") for word in argv):
        parser.print_help()
        return 0
    launcher_parser, launcher = _launcher_options(error)
    error.note([], [], [*script, *launcher])
    ours, theirs = _split_words(argv, script, launcher, error)
    with _without_launcher_keys(ours, theirs, script, launcher, error) as ours:
        plans = [theirs.pop(flag.lstrip("-"), []) for flag in _PLAN]
        machine = _machine(theirs.pop("plan_for", []), any(plans), error)
        planning: Any = import_module("trl_extras.scripts._plan") if any(plans) else None
        # Once here, so that a wrong value is one line instead of one traceback a process.
        try:
            with planning.on_machine(machine) if planning else contextlib.nullcontext():
                parsed = module.parse_arguments(ours, prog)
        except UserError as refusal:
            if planning and _NO_GPU in refusal.message:
                hint = "To plan a run on GPUs on a machine without one, add --plan_for gpu."
                raise error.error(f"{refusal.message} {hint}") from refusal
            raise
        from trl.cli.accelerate_config import resolve_accelerate_config_argument

        words = [word for group in theirs.values() for word in group]
        path = str(_SCRIPTS / f"{name}.py")
        try:
            arguments = launcher_parser.parse_args([*resolve_accelerate_config_argument(words), path, *ours])
        except ValueError as problem:
            raise error.error(str(problem)) from problem
        if arguments.num_processes is not None and arguments.num_processes < 1:
            raise error.error(f"num_processes is {arguments.num_processes}, but wants at least 1")
        if planning:
            status: int = planning.show(module.script, parsed, arguments, as_json=bool(plans[1]), machine=machine)
            return status
        return _launch(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of the console script; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0
    command, rest = words[0], words[1:]
    if command == "--version":
        print(f"trl-extras {__version__}")
        return 0
    if command == "run":
        return run_main(rest, replace_path=argv is None)
    if command == "extrapolate":
        status: int = import_module("trl_extras.scripts.extrapolate").main(rest)
        return status
    prog = "trl-extras"
    try:
        if command in methods():
            prog = f"trl-extras {command}"
            return train(command, rest)
        commands = [*methods(), "run", "extrapolate"]
        known = ["--help", "--version"] if command.startswith("-") else commands
        kind = "flag" if command.startswith("-") else "command"
        raise UserError(f"unknown {kind} {command!r}: known are {', '.join(known)}{suggestion(command, known)}")
    except UserError as refusal:
        return report(refusal, prog)


if __name__ == "__main__":
    raise SystemExit(main())
