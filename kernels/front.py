"""Launches past Triton's front: what was launched once, with as many programs, goes by its handle.

To find what it has compiled, Triton looks in each call at type and alignment of every argument, at
every constant, and at every global that the code reads: 29 to 43 µs on the host of an H200, where a
launch by the handle takes 9 to 10.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """What a kernel is compiled for, besides the types of its arguments."""

    constants: dict[str, Any]  # all constexprs, in the kernel's order
    options: dict[str, Any]  # of the launch


class Launched(NamedTuple):
    """A launch by its handle, which can go again."""

    handle: Callable[..., Any]
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]

    def with_addresses(self) -> Launched:
        """The same with addresses in place of tensors, which Triton would ask the driver about."""
        given = [x.data_ptr() if isinstance(x, Tensor) else x for x in self.arguments]
        return self._replace(arguments=tuple(given))

    def again(self, *last: int, stream: int | None) -> None:
        """The same once more, but for the last arguments, if any are given.

        stream: as `triton.runtime.driver` has it; None: the current one, for which Triton asks.
        """
        first = self.arguments[: len(self.arguments) - len(last)]
        self.handle(*first, *last, *self.constants, stream=stream)


class Front:
    """The kernels that have been launched on one device."""

    def __init__(self) -> None:
        self._handles: dict[Hashable, tuple[Callable[..., Any], tuple[Any, ...]]] = {}

    def launch(
        self,
        kernel: Any,
        key: Hashable,
        programs: int,
        arguments: tuple[Any, ...],
        call: Callable[[], Call],
    ) -> Launched | None:
        """Launch a kernel on the current stream; None where it does not go by a handle yet.

        key: stands for the kernel, for all that `call` returns, and for which arguments are None.
            Nothing else that a kernel is compiled for may change: dtypes of arguments, and that
            those are multiples of 16 bytes which it takes to be, as torch allocates them.
        """
        known = self._handles.get((key, programs))
        if known is not None:
            handle, constants = known
            handle(*arguments, *constants)
            return Launched(handle, arguments, constants)
        to_compile = call()
        compiled = kernel[(programs,)](*arguments, **to_compile.constants, **to_compile.options)
        if compiled is not None:  # the interpreter compiles nothing
            handle = compiled[(programs, 1, 1)]
            self._handles[key, programs] = handle, tuple(to_compile.constants.values())
        return None
