"""ONNX Runtime: its sessions get the slice's number of threads, which they take from no environment variable.

By default a session starts one thread per core of the machine and pins each to a CPU of its own choice, outside of the
slice too; TorchServe's own handler asks for one per CPU of the machine.
Source: onnxruntime, SessionOptions.intra_op_num_threads; ts/torch_handler/base_handler.py (setup_ort_session).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from ts_plugin.machine.words import count

LIBRARY = "onnxruntime"


class OnnxThreads:
    """Bounds the sessions of this process; ``threads`` returns what the slice has at that moment."""

    def __init__(self, threads: Callable[[], int], report: Callable[[str], None]) -> None:
        self._threads, self._report = threads, report
        self._patched = False

    def patch(self) -> None:
        """Patch the library now if it is imported already, else as soon as a handler imports it."""
        if LIBRARY in sys.modules:
            self._patch()
        elif self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find the library as Python does, and patch it when its code has run. Source: importlib, sys.meta_path."""
        found = PathFinder.find_spec(name) if name == LIBRARY else None
        if found is None or found.loader is None:
            return None
        run = found.loader.exec_module

        def run_and_patch(module: Any) -> None:
            run(module)
            self._patch()

        found.loader.exec_module = run_and_patch  # type: ignore[method-assign]  # this loader is this module's alone
        return found

    def _patch(self) -> None:
        library: Any = sys.modules[LIBRARY]
        if self._patched or not hasattr(library, "InferenceSession"):
            return
        self._patched = True
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        construct = library.InferenceSession.__init__

        @functools.wraps(construct)
        def bounded(session: Any, model: Any, sess_options: Any = None, *others: Any, **more: Any) -> None:
            options = library.SessionOptions() if sess_options is None else sess_options
            self._bound(options)
            construct(session, model, options, *others, **more)

        library.InferenceSession.__init__ = bounded

    def _bound(self, options: Any) -> None:
        threads, asked = self._threads(), options.intra_op_num_threads
        if 0 < asked <= threads:
            return
        options.intra_op_num_threads = threads
        self._report(
            f"a session of ONNX Runtime gets {count(threads, 'thread')} instead of "
            f"{asked or 'one per core of the machine'}, and keeps that number when the slice changes"
        )
