"""What the project's pages share: one look (`look.css`). Nothing of it needs a network."""

from pathlib import Path

LOOK = (Path(__file__).parent / "look.css").read_text(encoding="utf-8")
