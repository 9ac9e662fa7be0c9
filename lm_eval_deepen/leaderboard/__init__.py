"""Leaderboards: many ensembles of the same loaded members on the same tasks, cell by cell."""
