"""Looking at a run: its rollout log read, judged again, summed up, and shown on a page or a terminal."""
