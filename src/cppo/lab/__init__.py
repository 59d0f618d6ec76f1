"""The embedded laboratory: a small model, tasks with verifiers, training, evaluation. Needs the train extra."""
