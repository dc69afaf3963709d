"""How long does a mixture take to draw, against NumPy's own weighted draw without replacement?

    OMP_NUM_THREADS=1 python benchmarks/drawing.py

Both draw from the same law. NumPy draws with replacement and repeats for the duplicates, which is quick for a few rows
of many; ours takes the smallest of exponential keys in one pass, whatever is asked for. Medians, drawn in turn.
"""

import argparse
import platform
import statistics
import time

import numpy as np

from duet_ray.mixture import draw_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    weights = np.random.default_rng(0).exponential(size=arguments.rows)
    weights /= weights.sum()
    print(f"seconds to draw from {arguments.rows:,} weighted rows, median of {arguments.repeats}")
    print(f"{'rows drawn':>12} {'ours':>8} {'numpy':>8} {'ours / numpy':>13}")
    for n_rows in (arguments.rows // 1000, arguments.rows // 10, arguments.rows // 2):
        ours, numpys = [], []
        for repeat in range(arguments.repeats):
            started = time.perf_counter()
            rows = draw_rows(weights, n_rows, np.random.default_rng(repeat))
            ours.append(time.perf_counter() - started)
            assert len(np.unique(rows)) == n_rows
            started = time.perf_counter()
            np.random.default_rng(repeat).choice(arguments.rows, size=n_rows, replace=False, p=weights)
            numpys.append(time.perf_counter() - started)
        mine, peer = statistics.median(ours), statistics.median(numpys)
        print(f"{n_rows:>12,} {mine:>8.3f} {peer:>8.3f} {mine / peer:>13.2f}")
    print(f"numpy {np.__version__}, Python {platform.python_version()}, {platform.machine()}")


if __name__ == "__main__":
    main()
