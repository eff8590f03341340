"""The command-line tool: `python -m neupims COMMAND`, or `neupims COMMAND` after installation.

An error is one sentence on standard error and an exit code: 2 for wrong flags, 130 after Ctrl-C,
141 if the reader of the output has gone, 1 for other errors. JAX is loaded only when a command
needs it.
"""

import argparse
import importlib
import os
import signal
import sys

from neupims.commands.compilation import keep_programs

COMMANDS = {
    "simulate": (
        "one decode step of a batch, or its prefill: cycles of every operation and stage,"
        " utilisation, energy"
    ),
    "validate": "the model's error against runs of the public simulator",
    "search": (
        "better schedules: channel and sub-batch of each request, with a bound on what is possible"
    ),
    "serve": (
        "requests that arrive, wait and are served in continuous batches: latencies, throughput"
    ),
    "fit": "the largest batch and the longest context that the memory of a machine holds",
    "explore": "a space of accelerator designs: Pareto front and sensitivities",
    "show": "hardware fields with units and sources, models, systems, constants",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    Args:
        argv: The words of the command line after the program (default: those of the process).
    """
    words = sys.argv[1:] if argv is None else argv
    keep_programs()
    try:
        arguments = _make_parser(words).parse_args(words)
    except SystemExit as stop:  # argparse has printed the error
        return int(stop.code or 0)
    try:
        code = importlib.import_module(f"neupims.commands.{arguments.command}").run(arguments)
        if sys.stdout:  # None if it was closed
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _report("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except MemoryError:
        return _report("out of memory: try a smaller --chunk, --budget or batch", 1)
    except ImportError as error:
        mend = "" if "pip install" in str(error) else ": pip install 'ggem-jax[neupims]'"
        return _report(f"{error}{mend}", 1)
    except OSError as error:
        return _report(
            f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1
        )
    except ValueError as error:
        return _report(str(error), 1)


def _make_parser(words: list[str]) -> argparse.ArgumentParser:
    """Returns the parser with the flags of the named command; other modules are not loaded."""
    parser = argparse.ArgumentParser(
        prog="neupims" if os.path.basename(sys.argv[0]) == "neupims" else "python -m neupims",
        description=__doc__.split("\n")[0],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in words if not word.startswith("-")), "")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(
            name, help=purpose, description=purpose[0].upper() + purpose[1:] + "."
        )
        if name == chosen:
            importlib.import_module(f"neupims.commands.{name}").add_arguments(command)
    return parser


def _report(sentence: str, code: int) -> int:
    sys.stderr.write(f"neupims: {' '.join(sentence.split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
