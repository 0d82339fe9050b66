"""The demo: distil the tiny student within a time budget, stream it before and after, and report what happened."""
