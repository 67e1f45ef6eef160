"""Signals that wait for training to be saved."""

from __future__ import annotations

import inspect
import os
import signal
import threading
from types import FrameType
from typing import Any

import keras


class DeferredSignals:
    """SIGTERM and Ctrl-C while a model trains, put off until there is time for them.

    A second signal, or one after a training that an error ended, does at once what it would have
    done without.

    Attributes:
        received: The number of the signal that waits, or None.
    """

    _last: DeferredSignals | None = None

    def __init__(self) -> None:
        self.received: int | None = None
        self._handlers: dict[int, Any] = {}
        self._previous: dict[int, Any] = {}

    @property
    def installed(self) -> bool:
        """Whether signals are put off now."""
        return bool(self._previous)

    def install(self, model: keras.Model) -> None:
        """Puts signals off, as long as `model.fit` runs.

        Args:
            model: The model that trains.
        """
        last = DeferredSignals._last
        if last is not None and not last._is_training(inspect.currentframe()):
            last.restore()  # its training ended in an error
        DeferredSignals._last = self
        self.received = None
        self._model = model
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        """Gives the handlers back that were there before."""
        self._handlers.update(self._previous)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def pass_on(self) -> None:
        """Lets the signal do what it would have done."""
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
        # The second, or long after a training that an error ended: what it would have done, now.
        self.restore()
        os.kill(os.getpid(), number)

    def _is_training(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is self._model:
                return True
            frame = frame.f_back
        return False
