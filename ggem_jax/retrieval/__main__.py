"""The tool: `python -m ggem_jax.retrieval COMMAND`, or `ggem-retrieval COMMAND` after installation.

A failure is one sentence on standard error, and an exit code: 2 for wrong flags, 130 after Ctrl-C,
141 if the output is closed by its reader, 1 for all others. JAX is loaded when there is an image to
describe or a vector to search, not before.
"""

import os
import signal
import sys

from ggem_jax.retrieval.tool.flags import Usage, parse

_OUT_OF_MEMORY = "out of memory: try a smaller --batch, --longest-side or --candidates"


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    Args:
        argv: Arguments after the name of the program; None takes those of the process.
    """
    _open_closed_streams()
    prog = (
        "ggem-retrieval"
        if os.path.basename(sys.argv[0]).startswith("ggem-retrieval")
        else "python -m ggem_jax.retrieval"
    )
    resume = ""
    try:
        options = vars(parse(sys.argv[1:] if argv is None else argv, prog))
        command = options.pop("command")
        resume = (
            ": run the same command again to resume" if command in ("index", "add", "push") else ""
        )
        from ggem_jax.retrieval.tool.commands import run  # loads NumPy, Pillow and SQLite

        code = run(command, **options)
        sys.stdout.flush()
        return code
    except Usage as error:
        return _print_error(str(error), 2)
    except KeyboardInterrupt:
        return _print_error(f"interrupted{resume}", 128 + signal.SIGINT)
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except MemoryError:
        return _print_error(_OUT_OF_MEMORY, 1)
    except ImportError as error:
        remedy = "" if "pip install" in str(error) else ": pip install 'ggem-jax[retrieval]'"
        return _print_error(f"{error}{remedy}", 1)
    except OSError as error:
        _drop_output()
        file = f": {error.filename}" if error.filename else ""
        return _print_error(f"{error.strerror or error}{file}", 1)
    except ValueError as error:
        return _print_error(str(error), 1)
    except RuntimeError as error:  # errors of JAX are recognised by their text, without JAX
        if "RESOURCE_EXHAUSTED" in str(error):
            return _print_error(_OUT_OF_MEMORY, 1)
        if "nable to initialize backend" in str(error):
            return _print_error(str(error), 1)
        raise


def _print_error(sentence: str, code: int) -> int:
    line = " ".join(sentence.split())
    # a name must not send commands to the terminal
    safe = "".join(each if each.isprintable() else repr(each)[1:-1] for each in line)
    sys.stderr.write(f"ggem-retrieval: {safe}\n")
    return code


def _open_closed_streams() -> None:
    """Replaces closed streams by the null device, and escapes names that a terminal cannot show."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Drops buffered output, so that the process does not try to write it when it ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    sys.exit(main())
