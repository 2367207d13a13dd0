from cohobate.toy.tiny.method import Points, Tiny

__all__ = ["Points", "Tiny"]
