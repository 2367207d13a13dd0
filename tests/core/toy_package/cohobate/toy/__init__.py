"""A made-up domain: the smallest package that uses everything of the core."""
