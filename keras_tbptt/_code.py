"""What tells one function from another."""

from __future__ import annotations

import types
from typing import Any


def parts_of(code: types.CodeType) -> list[Any]:
    """The instructions, names and constants of code, without the file and lines it stands in.

    Args:
        code: The code of a function.
    """
    constants = [
        parts_of(value) if isinstance(value, types.CodeType) else repr(value)
        for value in code.co_consts
    ]
    return [code.co_code.hex(), *code.co_names, *constants]
