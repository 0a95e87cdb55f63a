"""The metadata and the migration history that all services share: one database, one schema, a table prefix each."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import MetaData

from holdfast.db.migrate import History

metadata = MetaData(
    naming_convention={
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)

HISTORY = History(name="services", folder=Path(__file__).parent / "migrations")
