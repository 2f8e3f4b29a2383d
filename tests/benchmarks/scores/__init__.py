"""What a model is scored on: one module per task, each `task(model)` with its inputs and score."""
