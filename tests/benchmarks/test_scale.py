"""What the tables of `benchmarks/scale.py` rest on, at sizes of seconds."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
import scale
from scale_broker import Pace, Simulation, broker_bytes
from scale_data import measure
from scale_store import grow

from tests.tiny_model import tiny_tokenizer


def test_every_sample_is_leased_and_done_once() -> None:
    one = Simulation(8, 20, 4, seconds=3.0, n_domains=5).run()
    assert one.n_samples == 80
    assert set(one.n_leases.values()) == {1}
    assert set(one.n_done.values()) == {1}
    assert len(one.n_leases) == len(one.n_done) == 80
    assert one.calls["complete"] == 80
    assert scale.once(one).endswith("80 samples: right")


def test_what_dies_is_leased_again_and_done_once() -> None:
    one = Simulation(8, 20, 4, seconds=20.0, n_domains=5, n_deaths=12).run()
    assert one.n_deaths > 0
    assert 80 < one.n_leases.total() <= 80 + one.n_deaths
    assert len(one.n_done) == one.n_done.total() == 80
    one.n_leases["t0000-s0"] += one.n_deaths
    assert scale.once(one).endswith("WRONG")


def test_samples_of_one_pass_are_leased_together() -> None:
    one = Simulation(4, 10, 4, seconds=2.0, n_domains=5, fuse=2).run()
    assert set(one.n_leases.values()) == {1}
    assert len(one.n_done) == one.n_done.total() == 40


def test_calls_are_those_of_the_clock() -> None:
    """Beats, pulses and questions of trials come as often as their intervals say, on the simulated clock."""
    one = Simulation(16, 16, 4, seconds=30.0, n_domains=5).run()
    assert one.calls["beat"] / one.seconds == pytest.approx(16, rel=0.1)
    assert one.calls["pulse"] / one.seconds == pytest.approx(5, rel=0.1)
    # 4 trials at a time until the last ones end, 10 times a second each.
    assert 20 < one.calls["outcomes"] / one.seconds <= 41
    assert one.calls_per_sample == pytest.approx(one.calls.total() / 64)
    slow = Simulation(16, 16, 4, seconds=30.0, n_domains=5, pace=Pace(beat_seconds=2.0, poll_seconds=2.0)).run()
    assert slow.calls["beat"] / slow.seconds == pytest.approx(8, rel=0.1)
    assert slow.calls["outcomes"] < one.calls["outcomes"] / 5
    assert set(slow.n_done.values()) == {1}


def test_ten_times_the_groups_make_ten_times_the_calls() -> None:
    few, many = (Simulation(n, n, 4, seconds=20.0, n_domains=5).run() for n in (8, 80))
    for name in ("beat", "progress", "outcomes"):
        assert many.calls[name] / few.calls[name] == pytest.approx(10, rel=0.15)
    assert many.pulse_bytes > 4 * few.pulse_bytes


def test_the_broker_keeps_every_result() -> None:
    few, many = broker_bytes(40), broker_bytes(160)
    assert 2.5 < many / few < 4.5
    assert many / 160 > 1000, "bytes a sample"


def test_a_store_is_read_as_often_and_grows_as_it_says(tmp_path: Path) -> None:
    few, many = grow(tmp_path, [20, 160], n_domains=5)
    assert (few.n_samples, many.n_samples) == (20, 160)
    assert few.n_reads == many.n_reads >= 2
    assert 4 < many.trials_bytes / few.trials_bytes < 10
    assert many.trial_seconds >= many.suggest_seconds + many.complete_seconds


def test_rows_are_prepared_drawn_and_gathered(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    one = measure(tmp_path / "rows", 600, 3, tmp_path / "tokenizer", (50, 200))
    assert one.all_distinct
    assert one.source_bytes > 600 * 30
    # A token a character and one at the end: `12 word? word`.
    assert 8 < one.n_tokens / one.n_rows < 20
    assert one.gathered_tokens[200] > 2 * one.gathered_tokens[50] > 0
    assert one.again_seconds < one.prepare_seconds
    assert one.cache_bytes > 600 * 50
    assert not list((tmp_path / "rows").iterdir()), "nothing is left"
    assert "| draw 200 rows, s |" in scale.data_table([one])
