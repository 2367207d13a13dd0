"""Teacher outputs on disk: written once, read by every run after."""

from cohobate.core.cache.reader import TeacherCache, WithAnswers
from cohobate.core.cache.spec import CacheSpec
from cohobate.core.cache.writer import KeyedDataset, write_cache

__all__ = [
    "CacheSpec",
    "KeyedDataset",
    "TeacherCache",
    "WithAnswers",
    "write_cache",
]
