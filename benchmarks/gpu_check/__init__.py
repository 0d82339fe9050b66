"""What somebody with a GPU runs, whatever Python and torch are there: stages that can't stop each other.

python -m benchmarks.gpu_check --budget 530 --out out/gpu-check
"""
