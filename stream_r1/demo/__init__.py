"""The demo: distil the tiny student within a time budget, stream it before and after, report."""
