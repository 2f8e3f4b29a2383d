"""The graph and everything the layers above agree on: model, facts, quantization, targets, errors.

Nothing here imports another octavo folder. Start with `model.py`, then `facts.py`.
"""
