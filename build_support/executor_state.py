"""Whether the PTX executor, its tests or the compilers are what `make test-executor` last passed with.

    python -m build_support.executor_state          exits with 1 where they are not
    python -m build_support.executor_state --keep   writes down what they are now

The executor is no part of the package; its tests take minutes and change their answer with these files alone.
"""

import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "tests/executor/passed.sha256"
COMPILERS = re.compile(r'"((?:nvidia-[a-z-]+|triton)[=><][^"]+)"')


def state() -> str:
    """A digest of the executor, its tests and the compilers' versions."""
    digest = hashlib.sha256()
    files = [*ROOT.glob("ptx_executor/**/*.py"), *ROOT.glob("tests/executor/**/*")]
    for file in sorted(path for path in files if path.is_file() and path.suffix in (".py", ".cu")):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    digest.update(" ".join(COMPILERS.findall((ROOT / "pyproject.toml").read_text())).encode())
    return digest.hexdigest()


def main() -> int:
    if "--keep" in sys.argv:
        KEPT.write_text(state() + "\n")
        return 0
    return int(not KEPT.exists() or KEPT.read_text().strip() != state())


if __name__ == "__main__":
    sys.exit(main())
