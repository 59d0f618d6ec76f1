"""Looking at a run: the rollout log format, plots, the report page."""
