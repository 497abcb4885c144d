"""Error, predictions and scores of trained networks."""
