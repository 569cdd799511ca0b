"""The proof that the log is what it was: the hash chain, signed checkpoints outside of PostgreSQL, their audit."""
