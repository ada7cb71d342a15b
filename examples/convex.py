"""Convex problems of scikit-learn: ``python -m examples.convex [--plot convex.png]``."""

from benchmarks.convex_problems import main

if __name__ == "__main__":
    main()
