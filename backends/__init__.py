"""One runtime a family of files: its target table, lowering, audit and evaluator.

Backends import `octavo.ir` only; they never see a pass.
"""
