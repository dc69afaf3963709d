"""What does a weighting make of real influence scores: how many rows are the weights worth, and who is drawn?

    python benchmarks/weighting.py --scores scores.npz

The file holds one array of raw scores per domain. For each weighting: the effective sample size as a share of the
rows, and the share of all draws that falls on the rows with the highest and the lowest fifth of the scores (0.20 each
under uniform weights).
"""

import argparse
from pathlib import Path

import numpy as np

from duet_ray.config import WeightingConfig
from duet_ray.selection.weighting import weigh

WEIGHTINGS = {
    "shift": WeightingConfig(kind="shift"),
    "rank": WeightingConfig(kind="rank"),
    "softmax, T = 1": WeightingConfig(kind="softmax", temperature=1.0),
    "softmax, T = 0.5": WeightingConfig(kind="softmax", temperature=0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, required=True, help="an .npz file, one array of scores per domain")
    arguments = parser.parse_args()
    print("effective sample size / rows (share of draws on the highest fifth, on the lowest fifth)\n")
    print("| domain | rows | " + " | ".join(WEIGHTINGS) + " |")
    print("|---" * (2 + len(WEIGHTINGS)) + "|")
    with np.load(arguments.scores, allow_pickle=False) as arrays:
        for name in sorted(arrays):
            scores = arrays[name].astype(np.float64)
            cells = [described(scores, weighting) for weighting in WEIGHTINGS.values()]
            print(f"| {name} | {len(scores):,} | " + " | ".join(cells) + " |")


def described(scores: np.ndarray, weighting: WeightingConfig) -> str:
    probabilities, notes = weigh(scores, weighting, "")
    if notes:
        return "uniform: all equal"
    size = 1 / np.square(probabilities).sum() / len(scores)
    order, fifth = np.argsort(scores, kind="stable"), len(scores) // 5
    high, low = probabilities[order[-fifth:]].sum(), probabilities[order[:fifth]].sum()
    return f"{size:.3f} ({high:.2f}, {low:.2f})"


if __name__ == "__main__":
    main()
