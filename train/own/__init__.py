"""Networks and recipes of the user's own: their code is read, tried out and fitted to a training."""
