"""How long does a mixture take to draw? 10,000 rows out of 10 million weighted ones, against NumPy's own way.

    python benchmarks/drawing.py

`Generator.choice(p=…, replace=False)` draws from the same law by repeated searches; ours takes the smallest of
exponential keys in one pass. Medians over `--repeats` draws each, taken in turn.
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
    parser.add_argument("--draw", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    weights = np.random.default_rng(0).exponential(size=arguments.rows)
    weights /= weights.sum()
    ours, numpys = [], []
    for repeat in range(arguments.repeats):
        started = time.perf_counter()
        rows = draw_rows(weights, arguments.draw, np.random.default_rng(repeat))
        ours.append(time.perf_counter() - started)
        assert len(set(rows.tolist())) == arguments.draw
        started = time.perf_counter()
        np.random.default_rng(repeat).choice(arguments.rows, size=arguments.draw, replace=False, p=weights)
        numpys.append(time.perf_counter() - started)
    mine, peer = statistics.median(ours), statistics.median(numpys)
    print(f"{arguments.draw:,} of {arguments.rows:,} weighted rows, median of {arguments.repeats}")
    print(f"  ours                 {mine:.3f} s  (min {min(ours):.3f}, max {max(ours):.3f})")
    print(f"  numpy choice         {peer:.3f} s  (min {min(numpys):.3f}, max {max(numpys):.3f})")
    print(f"  ratio ours / numpy   {mine / peer:.2f}")
    print(f"numpy {np.__version__}, Python {platform.python_version()}, {platform.machine()}")


if __name__ == "__main__":
    main()
