"""Stores of older versions, brought up to date when they are opened; what stands in them stays as it is.

Versions 1 and 2 knew SQLite only.
"""

import socket
import time

import psutil
from sqlalchemy import Connection, RowMapping, insert, inspect, select, update

from duet_ray.errors import StoreError
from duet_ray.store import schema


def version_of(connection: Connection, schema_name: str | None) -> int | None:
    """The version of the tables; 0 for old ones that hold no study, None where there are none."""
    tables = inspect(connection)
    if not tables.has_table("study", schema=schema_name) or not tables.has_table("driver", schema=schema_name):
        return None
    version = connection.scalar(select(schema.study.c.schema_version))
    if version is not None:
        return int(version)
    columns = {column["name"] for column in tables.get_columns("driver", schema=schema_name)}
    return schema.SCHEMA_VERSION if "n_writes" in columns else 0


def make_tables(connection: Connection) -> None:
    """Make what is missing. The driver's row is there from the start."""
    schema.metadata.create_all(connection)
    if connection.execute(select(schema.driver.c.id)).first() is None:
        connection.execute(insert(schema.driver).values(id=1, fence=0, n_writes=0))


def bring_up_to_date(connection: Connection, version: int) -> None:
    """Turn a store of an older version into one of this.

    Raises:
        StoreError: a driver of that version still runs on it.
    """
    lease = connection.exec_driver_sql("SELECT * FROM driver").mappings().first()
    if lease is not None and _still_runs(lease):
        raise StoreError(
            f"an older duet_ray runs this study: process {lease['pid']} on {lease['host']}; "
            f"stop it there, or wait until it ends"
        )
    if version == 1:
        for column in ("settings JSON NOT NULL DEFAULT '[]'", "fidelity FLOAT NOT NULL DEFAULT 1.0", "k INTEGER"):
            connection.exec_driver_sql(f"ALTER TABLE trial ADD COLUMN {column}")
    if version == 0:
        schema.metadata.drop_all(connection)  # It holds nothing.
    else:
        connection.exec_driver_sql("DROP TABLE driver")
    make_tables(connection)
    connection.execute(update(schema.driver).values(fence=lease["fence"] if lease is not None else 0))
    connection.execute(update(schema.study).values(schema_version=schema.SCHEMA_VERSION))


def _still_runs(lease: RowMapping) -> bool:
    """By the old rules, which trusted clocks: for want of better ones, and only once."""
    if lease["holder"] is None:
        return False
    if lease["host"] != socket.gethostname():
        return bool(lease["expires"] > time.time())
    try:
        return abs(psutil.Process(lease["pid"]).create_time() - lease["process_started"]) < 2.0
    except psutil.NoSuchProcess:
        return False
