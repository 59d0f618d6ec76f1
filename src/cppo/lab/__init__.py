"""The embedded laboratory: a small language model, tasks with verifiers, training, evaluation. Needs the train extra."""
