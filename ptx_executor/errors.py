"""What can go wrong while PTX is read or run. Every error of this package is a `PtxError`."""


class PtxError(Exception):
    """Base of all errors; the message names the kernel and the line of PTX where that is known."""


class ParseError(PtxError):
    """The text is not PTX that this package understands."""


class UnsupportedInstruction(PtxError):
    """An opcode, modifier or type without an implementation. Nothing is ever skipped in silence."""


class LaunchError(PtxError, ValueError):
    """Grid, block, arguments or shared memory do not fit the kernel."""


class MemoryAccessError(PtxError):
    """An access outside the arguments, variables, shared or local memory, or one that is not aligned."""


class RaceError(PtxError):
    """Two warps touched the same shared memory, one of them writing, with nothing ordering them."""


class BarrierError(PtxError):
    """A barrier or a warp-wide instruction that not all of its threads reach."""


class DeviceAssertion(PtxError):
    """A failed `assert` or a trap inside the kernel."""


class ExecutionTimeout(PtxError):
    """The launch ran longer than its time limit."""
