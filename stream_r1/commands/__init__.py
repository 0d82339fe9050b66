"""What each command of ``stream-r1`` does: one module a command, imported when it runs."""
