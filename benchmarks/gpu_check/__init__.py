"""What somebody with a GPU runs: build, tests, timings, docs/gpu-measured.md.

make gpu-check
"""
