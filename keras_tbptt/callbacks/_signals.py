"""Signals that are deferred until the training state is saved."""

from __future__ import annotations

import inspect
import os
import signal
import threading
from types import FrameType
from typing import Any

import keras


class DeferredSignals:
    """Defers SIGTERM and Ctrl-C while a model trains.

    A second signal takes effect immediately, and so does a signal after `fit` has ended in an
    error.

    Attributes:
        received: int or None. The number of the deferred signal.
    """

    _last: DeferredSignals | None = None

    def __init__(self) -> None:
        self.received: int | None = None
        self._handlers: dict[int, Any] = {}
        self._previous: dict[int, Any] = {}

    @property
    def installed(self) -> bool:
        """Whether signals are deferred now."""
        return bool(self._previous)

    def install(self, model: keras.Model) -> None:
        """Defers signals as long as `model.fit` runs.

        Args:
            model: The `keras.Model` that is being trained.
        """
        last = DeferredSignals._last
        if last is not None and not last._is_training(inspect.currentframe()):
            last.restore()  # its `fit` ended in an error, so nothing has restored the handlers
        DeferredSignals._last = self
        self.received = None
        self._model = model
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        """Puts back the handlers that `install` replaced."""
        self._handlers.update(self._previous)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def pass_on(self) -> None:
        """Lets the deferred signal take effect."""
        if self.received is None:
            return
        number, self.received = self.received, None
        handler = self._handlers[number]
        if callable(handler):
            handler(number, None)
        else:
            raise SystemExit(128 + number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None and self._is_training(frame):
            self.received = number
            return
        # This is the second signal, or `fit` has ended in an error.
        self.restore()
        os.kill(os.getpid(), number)

    def _is_training(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is self._model:
                return True
            frame = frame.f_back
        return False
