"""Composition root: the only place that joins log, state, content and views into a store."""
