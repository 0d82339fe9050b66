"""``python -m stream_r1`` is ``stream-r1``."""

from stream_r1.ends import reporting_errors


def main() -> None:
    """Run the command line; never returns (``SystemExit``)."""
    with reporting_errors():
        from stream_r1.cli import main as run

        run()


if __name__ == "__main__":
    main()
