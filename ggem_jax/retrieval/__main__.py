"""The tool: `python -m ggem_jax.retrieval COMMAND`, or `ggem-retrieval COMMAND` after installation.

What goes wrong is one sentence on standard error, and an exit code: 2 for wrong flags, 130 after
Ctrl-C, 141 where nobody reads the output, 1 for the rest. JAX is loaded when there is a picture to
describe or a vector to search, not before.
"""

import os
import signal
import sys

from ggem_jax.retrieval.tool.flags import Usage, parse

_OUT_OF_MEMORY = "out of memory: try a smaller --batch, --longest-side or --candidates"


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    _open_what_is_closed()
    prog = (
        "ggem-retrieval"
        if os.path.basename(sys.argv[0]).startswith("ggem-retrieval")
        else "python -m ggem_jax.retrieval"
    )
    unfinished = ""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv, prog)
        unfinished = (
            ": the same command goes on from where it was"
            if arguments.command in ("index", "add")
            else ""
        )
        from ggem_jax.retrieval.tool.commands import COMMANDS  # NumPy, Pillow and SQLite

        code = COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
        return code
    except Usage as error:
        return _said(str(error), 2)
    except KeyboardInterrupt:
        return _said(f"interrupted{unfinished}", 128 + signal.SIGINT)
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except MemoryError:
        return _said(_OUT_OF_MEMORY, 1)
    except ImportError as error:
        mend = "" if "pip install" in str(error) else ": pip install 'ggem-jax[retrieval]'"
        return _said(f"{error}{mend}", 1)
    except OSError as error:
        _drop_output()
        return _said(
            f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1
        )
    except ValueError as error:
        return _said(str(error), 1)
    except (
        RuntimeError
    ) as error:  # JAX's own errors, known by their text so that JAX need not be loaded to tell them
        if "RESOURCE_EXHAUSTED" in str(error):
            return _said(_OUT_OF_MEMORY, 1)
        if "nable to initialize backend" in str(error):
            return _said(str(error), 1)
        raise


def _said(sentence: str, code: int) -> int:
    sys.stderr.write(f"ggem-retrieval: {' '.join(sentence.split())}\n")
    return code


def _open_what_is_closed() -> None:
    """Streams that the caller has closed go nowhere; names that a terminal cannot show are
    escaped.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """What could not be written is not tried again when the process ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    sys.exit(main())
