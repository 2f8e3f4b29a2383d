"""The command line, which only wraps the public API of `octavo`."""
