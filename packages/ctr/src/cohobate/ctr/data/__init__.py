"""Streaming click logs: schema, parquet reading, layouts of public sets, a seeded generator."""

from cohobate.ctr.data.module import ClickData
from cohobate.ctr.data.schema import Schema, Vocabulary, read_schema
from cohobate.ctr.data.stream import ClickRows

__all__ = ["ClickData", "ClickRows", "Schema", "Vocabulary", "read_schema"]
