"""``python -m stream_r1`` is ``stream-r1``."""

from stream_r1.cli import main

if __name__ == "__main__":
    main()
