"""One pass a file. Start with `base.py` (the contract) and `pipeline.py` (the runner).

Passes import `octavo.ir` only; they never see a backend.
"""
