"""Do the scores of a selection method mean what they say? Against retraining, and on rows that were spoilt on purpose.

    OMP_NUM_THREADS=1 python benchmarks/selection_quality.py --texts FOLDER --model .demo/model
    OMP_NUM_THREADS=1 python benchmarks/selection_quality.py --texts FOLDER --quick

`FOLDER` holds one `NAME.jsonl` a domain, rows of `{"prompt": …, "response": …}`; `--domain` is scored, and the others
are what the small model is first trained on from scratch. What is measured stands in `leave_some_out.py` (parts
`facts` and `texts`) and `spoilt_rows.py` (parts `spoilt` and, on the model of `--model`, `real`); the methods and the
controls beside them in `method_scores.py`.
"""

import argparse
import os
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from corrupted_texts import CORRUPTIONS
from facts import Facts
from learners import Texts, learner_of_facts, learner_of_texts, real_learner
from leave_some_out import group_facts, group_texts, leave_some_out_table
from method_scores import OURS, SLOW
from small_domain import machine
from spoilt_rows import spoil_facts, spoil_texts, spoilt_rows_table

PARTS = ("facts", "texts", "spoilt", "real")


def facts_parts(asked: argparse.Namespace) -> None:
    draws = np.random.default_rng(0)
    former, facts = Facts.draw(draws), Facts.draw(draws)
    learner = learner_of_facts(former, asked.steps // 3)
    if "facts" in asked.parts:
        groupings = [group_facts(facts, asked.groups, asked.group_rows, seed) for seed in range(asked.groupings)]
        leave_some_out_table(learner, "made-up facts", groupings, asked.seeds, asked.methods, asked.processes)
    if "spoilt" in asked.parts:
        cases = {"wrong facts": [spoil_facts(facts, asked.rows, seed) for seed in range(2 * asked.spoilt_seeds)]}
        spoilt_rows_table(learner, "made-up facts, small model", cases, asked.methods, asked.processes)


def texts_parts(asked: argparse.Namespace, texts: Texts) -> None:
    learner = learner_of_texts(texts, asked.steps)
    if "texts" in asked.parts:
        groupings = [
            group_texts(learner, texts, asked.groups, asked.group_rows, seed) for seed in range(asked.text_groupings)
        ]
        leave_some_out_table(learner, asked.domain, groupings, asked.text_seeds, asked.methods, asked.processes)
    if "spoilt" in asked.parts:
        cases = {
            kind: [
                spoil_texts(learner, texts, kind, asked.rows, texts.n_validation, seed)
                for seed in range(asked.spoilt_seeds)
            ]
            for kind in asked.kinds
        }
        spoilt_rows_table(learner, f"{asked.domain}, small model", cases, asked.methods, asked.processes)


def real_part(asked: argparse.Namespace, texts: Texts) -> None:
    learner = real_learner(asked.model)
    cases = {
        kind: [spoil_texts(learner, texts, kind, asked.real_rows, 32, seed) for seed in range(asked.real_seeds)]
        for kind in asked.real_kinds
    }
    title = f"{asked.domain}, {learner.model.num_parameters() / 1e6:.0f} million parameters"
    spoilt_rows_table(learner, title, cases, asked.real_methods, asked.processes)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder of NAME.jsonl files (prompt, response)")
    parser.add_argument("--domain", default="dictionary", help="the file that is scored")
    parser.add_argument("--model", type=Path, help="folder of a real model, for the part `real`")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--methods", nargs="+", default=list(OURS), choices=list(OURS), help="controls always run")
    parser.add_argument("--kinds", nargs="+", default=list(CORRUPTIONS), choices=list(CORRUPTIONS))
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--group-rows", type=int, default=8)
    parser.add_argument("--groupings", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=4, help="of retraining")
    parser.add_argument("--text-groupings", type=int, default=2, help="of texts, where retraining costs more")
    parser.add_argument("--text-seeds", type=int, default=3)
    parser.add_argument("--spoilt-seeds", type=int, default=2, help="domains for each kind; twice as many of facts")
    parser.add_argument("--rows", type=int, default=240, help="of a domain with spoilt rows")
    parser.add_argument("--real-rows", type=int, default=100)
    parser.add_argument("--real-seeds", type=int, default=1)
    parser.add_argument("--real-kinds", nargs="+", default=["mixed"], choices=list(CORRUPTIONS))
    parser.add_argument("--real-methods", nargs="+", default=[name for name in OURS if name not in SLOW])
    parser.add_argument("--steps", type=int, default=600, help="of training the small model from scratch")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="few rows, groups and seeds: does it run?")
    asked = parser.parse_args()
    if asked.quick:
        asked.parts = [part for part in asked.parts if part in ("facts", "spoilt")]
        asked.groups, asked.group_rows, asked.groupings, asked.seeds = 6, 4, 1, 2
        asked.spoilt_seeds, asked.rows, asked.steps, asked.kinds = 1, 40, 60, ["mixed"]
        asked.methods = [name for name in asked.methods if name not in SLOW]
    return asked


def main() -> None:
    asked = parsed()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.disable_progress_bar()
    print(f"`OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')} python {shlex.join(sys.argv)}`", end=", ")
    print(f"{machine('torch', 'transformers', 'peft')}; {asked.processes} processes", flush=True)
    texts = Texts.read(asked.texts, asked.domain)
    if {"facts", "spoilt"} & set(asked.parts):
        facts_parts(asked)
    if {"texts", "spoilt"} & set(asked.parts):
        texts_parts(asked, texts)
    if "real" in asked.parts and asked.model is not None:
        real_part(asked, texts)


if __name__ == "__main__":
    main()
