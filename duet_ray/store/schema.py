"""The tables of a study: the same in SQLite and in PostgreSQL, where each study has a schema of its own."""

from sqlalchemy import BigInteger, Column, Float, ForeignKey, Integer, MetaData, String, Table, Text, UniqueConstraint

from duet_ray.store.columns import Plain, Told, Words

SCHEMA_VERSION = 3
"""Raised with every change of a table. A store with a newer version than the code's is refused."""

metadata = MetaData()

study = Table(
    "study",
    metadata,
    Column("id", Integer, primary_key=True),  # always 1: one study a store
    Column("name", String(64), nullable=False),
    Column("schema_version", Integer, nullable=False),
    Column("config", Plain, nullable=False),  # the study file as plain data, every default filled in
    Column("inputs", Plain, nullable=False),  # fingerprints of the data and the model
    Column("resolved", Plain, nullable=False),  # what `auto` was resolved to
    Column("domains", Told(), nullable=False),  # what was found in the data, for the report
    Column("versions", Plain, nullable=False),
    Column("status", String(16), nullable=False),  # new, running, paused, done, failed
    Column("created", Float, nullable=False),  # seconds since the epoch
    Column("seconds", Float, nullable=False),  # spent running, over all sessions
)

trial = Table(
    "trial",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("counts", Plain, nullable=True),  # rows per domain; null for the base model
    Column("status", String(16), nullable=False),  # pending, done, failed
    Column("method", Text, nullable=False),
    Column("reason", Words, nullable=True),
    Column("settings", Plain, nullable=False, default=list),  # pairs: training settings that are not the study's
    Column("fidelity", Float, nullable=False, default=1.0),  # share of the mixture's rows that it trains on
    Column("k", Integer, nullable=True),  # samples; null where all trials have `sampling.k`
)

posterior = Table(
    "posterior",
    metadata,
    Column("trial", Integer, ForeignKey("trial.number"), primary_key=True),
    Column("mean", Float, nullable=False),  # in the user's own direction and units
    Column("sd", Float, nullable=True),  # null where the observation itself ranks
    Column("place", Integer, nullable=True),  # 0 is the best; null for a cheap look and for a repeat of a better one
)
"""What the search's model says of every trial's point once all is told: the ranking behind the recommendation."""

past_run = Table(
    "past_run",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("counts", Plain, nullable=False),  # rows per domain, on the study's lattice
    Column("value", Float, nullable=False),  # in the user's own direction
    Column("sem", Float, nullable=True),
    Column("fidelity", Float, nullable=False),
    Column("source", Text, nullable=False),  # file:line
)
"""Experiments from before the study, told to the search."""

sample = Table(
    "sample",
    metadata,
    Column("trial", Integer, ForeignKey("trial.number"), primary_key=True),
    Column("sample", Integer, primary_key=True),
    Column("value", Float, nullable=True),
    Column("result", Told(but=("spec", "adapter", "rows_digest")), nullable=False),  # a records.SampleResult
)

observation = Table(
    "observation",
    metadata,
    Column("trial", Integer, ForeignKey("trial.number"), primary_key=True),
    Column("value", Float, nullable=False),
    Column("sem", Float, nullable=True),
    Column("k", Integer, nullable=False),
    Column("k_used", Integer, nullable=False),
    Column("best_sample", Integer, nullable=False),
)

feedback_event = Table(
    "feedback_event",
    metadata,
    Column("id", String(64), primary_key=True),  # idempotency: the same event twice has no effect
    Column("trial", Integer, nullable=False),
    Column("sample", Integer, nullable=False),
    Column("value", Float, nullable=False),
    Column("received", Float, nullable=False),
)

artifact = Table(
    "artifact",
    metadata,
    Column("trial", Integer, nullable=False),
    Column("sample", Integer, nullable=False),
    Column("path", Text, nullable=False),  # relative to the study's folder, or a URL
    Column("kept", Integer, nullable=False),
    UniqueConstraint("trial", "sample"),
)

driver = Table(
    "driver",
    metadata,
    Column("id", Integer, primary_key=True),  # always 1: one driver a study
    Column("fence", Integer, nullable=False),  # grows with every new holder; every write checks it
    Column("n_writes", BigInteger, nullable=False),  # of this holder; grows with each, and with each renewal
    Column("holder", String(64), nullable=True),  # null: nobody
    Column("host", Text, nullable=True),  # for people
    Column("machine", Text, nullable=True),  # this and the next two: `processes.ProcessIdentity`
    Column("pid", Integer, nullable=True),
    Column("process_started", Float, nullable=True),
)
"""The driver's lease. Its one row is there from the start, so that it can be locked."""
