"""The command line, in this process."""

import pytest

from stream_r1.cli import main


def run(*arguments: object) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return end.value.code or 0
