"""octavo makes exported models small and fast, and proves what it did."""

__version__ = "0.1.0"
