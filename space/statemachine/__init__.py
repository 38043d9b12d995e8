"""State is the fold of the log: ``decide`` turns commands into events, ``apply`` folds events into rows."""
