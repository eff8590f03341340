"""Stops or fails a process before any of its calls that change files, also those of SQLite.

Child processes of tests import this file: it needs neither pytest nor JAX.
"""

import _sqlite3
import contextlib
import ctypes
import functools
import itertools
import os
import signal
import sqlite3
import time

OF_PYTHON = ("fsync", "unlink", "rename", "replace", "mkdir", "rmdir")
OF_SQLITE = ("write", "pwrite", "pwrite64", "ftruncate", "unlink", "openDirectory")


class _Vfs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("version", "file_bytes", "longest_path")),
        *((name, ctypes.c_void_p) for name in ("next", "name", "data")),
        ("calls", ctypes.c_void_p * 16),
    ]


@contextlib.contextmanager
def before_writes(hook, also=(), every=1):
    """Calls `hook` before each call that changes files. An error number that it returns, if it is
    not 0, becomes the error of that call.

    Calls of `os` that are named in `also` count too. Of the calls by which SQLite writes a piece of
    a file, which are many, one of `every` counts.
    """
    pieces = itertools.count(1)

    def hook_of_pieces():
        return 0 if next(pieces) % every else hook()

    with contextlib.ExitStack() as stack:
        for name in (*OF_PYTHON, *also):
            stack.enter_context(_before_python(name, hook))
        for name in OF_SQLITE:
            counted = hook_of_pieces if "write" in name else hook
            stack.enter_context(_before_sqlite(name, counted))
        yield


@contextlib.contextmanager
def around_commits(hook):
    """Calls `hook` before and after each commit of SQLite and each change of its journal mode."""

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            counts = statement == "COMMIT" or statement.startswith("PRAGMA journal_mode")
            if counts:
                hook()
            result = super().execute(statement, *values)
            if counts:
                hook()
            return result

    really = sqlite3.connect
    sqlite3.connect = functools.partial(really, factory=Connection)
    try:
        yield
    finally:
        sqlite3.connect = really


def death(number):
    """Returns a hook that kills this process at call `number` of it, from 0 (None: never)."""
    calls = itertools.count()

    def dying():
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    return dying


def killed(work, number=None, wait=None):
    """Runs `work(hook)` in a process of its own; returns whether it was killed.

    The hook kills it at call `number` (`death`). With `wait` it is killed after that many seconds.
    """
    process = os.fork()
    if process:
        if wait is not None:
            time.sleep(wait)
            os.kill(process, signal.SIGKILL)
        return os.waitpid(process, 0)[1] == signal.SIGKILL
    try:
        work(death(number))
    finally:
        os._exit(0)


@contextlib.contextmanager
def _before_python(name, hook):
    really = getattr(os, name)

    def called(*arguments, **options):
        if number := hook():
            raise OSError(number, os.strerror(number))
        return really(*arguments, **options)

    setattr(os, name, called)
    try:
        yield
    finally:
        setattr(os, name, really)


@contextlib.contextmanager
def _before_sqlite(name, hook):
    """By `xSetSystemCall` of SQLite's VFS; arguments are passed as machine words."""
    library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
    if not hasattr(library, "sqlite3_vfs_find"):  # SQLite is hidden in Python: its writes too
        yield
        return
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    vfs = library.sqlite3_vfs_find(None)
    word, text = ctypes.c_long, ctypes.c_char_p
    call = ctypes.CFUNCTYPE(ctypes.c_long, *[word] * 4, use_errno=True)
    get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, text)(vfs.contents.calls[14])
    put = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, text, ctypes.c_void_p)(
        vfs.contents.calls[13]
    )
    address = get(vfs, name.encode())
    if not address:  # this SQLite has no such call
        yield
        return
    really = call(address)

    def called(*arguments):
        if number := hook():
            ctypes.set_errno(number)
            return -1
        return really(*arguments)

    kept = call(called)
    put(vfs, name.encode(), ctypes.cast(kept, ctypes.c_void_p))
    try:
        yield
    finally:
        put(vfs, name.encode(), address)
